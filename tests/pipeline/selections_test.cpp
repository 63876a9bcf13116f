// Selections of a device and their copies on the host, on a device whose memory happens to be the host's.
#include "pipeline/selections.hpp"

#include <doctest/doctest.h>

#include "forwarding_device.hpp"
#include "lacuna/base/error.hpp"

using namespace lacuna;
using namespace lacuna::sdk;
using lacuna::testing::ForwardingDevice;

namespace {

/// The CPU's memory, taken for a device's.
class OtherMemory final : public ForwardingDevice {
 public:
  OtherMemory() : ForwardingDevice(cpu_device()) {}
  bool on_device() const override { return true; }
};

/// Row r lists r % 5 pieces and r % 7 tokens, numbered; facts, too.
void fill(const Selection& s) {
  for (i64 r = 0; r < s.rows.count(); ++r) {
    s.piece_count[r] = s.piece_capacity > 0 ? static_cast<i32>(r % 5) : 0;
    s.token_count[r] = static_cast<i32>(r % 7);
    s.exact_sinks[r] = static_cast<i32>(r + 1);
    s.exact_window[r] = static_cast<i32>(r + 2);
    s.full[r] = r % 2;
    for (i32 i = 0; i < s.piece_count[r]; ++i) {
      s.pieces[r * s.piece_capacity + i] = static_cast<i32>(1000 * r + i);
      if (s.piece_log_weight) s.piece_log_weight[r * s.piece_capacity + i] = 0.5f * static_cast<float>(r + i);
    }
    for (i32 i = 0; i < s.token_count[r]; ++i) {
      s.tokens[r * s.token_capacity + i] = static_cast<i32>(2000 * r + i);
      if (s.token_log_weight) s.token_log_weight[r * s.token_capacity + i] = 0.25f * static_cast<float>(r + i);
    }
  }
}

void check_equal(const Selection& a, const Selection& b) {
  for (i64 r = 0; r < a.rows.count(); ++r) {
    REQUIRE(a.piece_count[r] == b.piece_count[r]);
    REQUIRE(a.token_count[r] == b.token_count[r]);
    CHECK(a.exact_sinks[r] == b.exact_sinks[r]);
    CHECK(a.exact_window[r] == b.exact_window[r]);
    CHECK(a.full[r] == b.full[r]);
    for (i32 i = 0; i < a.piece_count[r]; ++i) {
      CHECK(a.pieces[r * a.piece_capacity + i] == b.pieces[r * b.piece_capacity + i]);
      if (a.piece_log_weight)
        CHECK(a.piece_log_weight[r * a.piece_capacity + i] == b.piece_log_weight[r * b.piece_capacity + i]);
    }
    for (i32 i = 0; i < a.token_count[r]; ++i) {
      CHECK(a.tokens[r * a.token_capacity + i] == b.tokens[r * b.token_capacity + i]);
      if (a.token_log_weight)
        CHECK(a.token_log_weight[r * a.token_capacity + i] == b.token_log_weight[r * b.token_capacity + i]);
    }
  }
}

}  // namespace

TEST_CASE("a selection's copy holds what its lists hold, whatever room they have") {
  Scratch scratch(std::make_shared<OtherMemory>());
  const Rows rows{1, 3, 0, 11, 4, 1, 44, 0};
  for (const bool weighted : {false, true})
    for (const auto& [pieces, tokens] : {std::pair<i64, i64>{5, 7}, {0, 7}, {5, 100000}, {40000, 7}}) {
      const Scratch::Frame frame(scratch);
      const Selection s = make_selection(scratch, rows, 16, pieces, tokens, weighted);
      fill(s);
      const HostSelection copy(scratch, s);
      CHECK(copy.view().pieces != s.pieces);
      CHECK_NOTHROW(copy.check_guards({"x", "mark", 0}));
      check_equal(s, copy.view());
    }
}

TEST_CASE("a list that runs over is found") {
  for (const auto& device : {cpu_device(), std::shared_ptr<Device>(std::make_shared<OtherMemory>())})
    for (const i64 room : {8, 100000}) {
      Scratch scratch(device);
      const Rows rows{1, 2, 0, 3, 4, 1, 12, 0};
      const Selection s = make_selection(scratch, rows, 16, 4, room, false);
      fill(s);
      s.tokens[rows.count() * room] = 1;
      CHECK_THROWS_WITH_AS(HostSelection(scratch, s).check_guards({"x", "mark", 0}),
                           doctest::Contains("beyond its lists"), lacuna::Error);
    }
}

TEST_CASE("a budget's copy is the budget") {
  Scratch scratch(std::make_shared<OtherMemory>());
  const Rows rows{1, 3, 0, 3, 4, 1, 12, 0};
  const Budget b = make_budget(scratch, rows);
  for (i64 r = 0; r < rows.count(); ++r) {
    CHECK(b.rule[r] == static_cast<i32>(Rule::ranked));
    b.tokens[r] = r;
    b.pairs[r] = 10 * r;
    b.rule[r] = static_cast<i32>(r % 4);
    b.window_sinks[r] = static_cast<i32>(100 + r);
    b.window_recent[r] = static_cast<i32>(200 + r);
  }
  const HostBudget host(scratch, b);
  const Budget& copy = host.view();
  CHECK(copy.tokens != b.tokens);
  for (i64 r = 0; r < rows.count(); ++r) {
    CHECK(copy.tokens[r] == b.tokens[r]);
    CHECK(copy.pairs[r] == b.pairs[r]);
    CHECK(copy.rule[r] == b.rule[r]);
    CHECK(copy.window_sinks[r] == b.window_sinks[r]);
    CHECK(copy.window_recent[r] == b.window_recent[r]);
  }
}
