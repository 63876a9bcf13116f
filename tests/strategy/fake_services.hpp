// Services of a core that has only the facts of a call to offer.
#pragma once

#include <cstdlib>

#include "lacuna/sdk/context.hpp"

class FakeServices final : public lacuna::sdk::Services {
  using i32 = lacuna::sdk::i32;
  using i64 = lacuna::sdk::i64;
  using Error = lacuna::sdk::Error;

 public:
  const lacuna::sdk::Call& call() const noexcept override { return call_; }
  lacuna::sdk::Ops& ops() noexcept override { std::abort(); }
  i32 array(lacuna::sdk::ArrayKind, const char*, i64, lacuna::sdk::Array*, Error*) noexcept override { return 1; }
  i32 queries(lacuna::sdk::Span, i64, lacuna::sdk::Queries*, Error*) noexcept override { return 1; }
  i32 oracle_mass(lacuna::sdk::Scores*, Error*) noexcept override { return 1; }
  i32 base_scores(lacuna::sdk::Scores*, Error*) noexcept override { return 1; }
  void charge(double, double) noexcept override {}

 private:
  lacuna::sdk::Call call_{};
};
