#include "attention/bound.hpp"

namespace {

using namespace lacuna;
using namespace lacuna::test;

struct State {
  std::vector<float> out;
  float lse;
};

State merged(State a, const State& b) {
  merge(a.out.data(), &a.lse, b.out.data(), b.lse, static_cast<i32>(a.out.size()));
  return a;
}

bool close(const State& a, const State& b) {
  if (a.lse != b.lse && !(std::abs(a.lse - b.lse) <= 1e-6f * std::max(1.f, std::abs(a.lse)))) return false;
  for (std::size_t c = 0; c < a.out.size(); ++c)
    if (!(std::abs(a.out[c] - b.out[c]) <= 2e-6f)) return false;
  return true;
}

}  // namespace

TEST_CASE("merge is a commutative monoid with identity (0, -inf)") {
  const float none = -std::numeric_limits<float>::infinity();
  const State identity{std::vector<float>(16, 0.f), none};
  const float levels[] = {-1e4f, -3.f, 0.f, 2.f, 2.f, 50.f, 1e4f, none};
  std::vector<State> states;
  for (unsigned n = 0; n < 8; ++n)
    states.push_back({levels[n] == none ? identity.out : random_floats(16, n), levels[n]});
  for (const State& a : states) {
    CHECK(merged(a, identity).out == a.out);
    CHECK(merged(a, identity).lse == a.lse);
    CHECK(merged(identity, a).out == a.out);
    CHECK(merged(identity, a).lse == a.lse);
    for (const State& b : states) {
      CHECK(close(merged(a, b), merged(b, a)));
      for (const State& c : states) CHECK(close(merged(merged(a, b), c), merged(a, merged(b, c))));
    }
  }
}

TEST_CASE("merging the parts of a set gives the whole") {
  PagedFixture cache({consecutive(300)}, 32);
  cache.fill(3);
  const auto q = random_floats(32, 4);
  Attention a{{0, 1, 1, 1, 32, 0.2f, 0}, cache.view(), queries_of(q, 1, 1, 32, 1, 299)};
  const Reference whole = oracle(a);
  State sum{std::vector<float>(32, 0.f), -std::numeric_limits<float>::infinity()};
  for (i32 begin = 0; begin < 300; begin += 100) {
    SelectionFixture::Row row;
    row.pieces = {begin};
    const SelectionFixture part(rows_of(1, 1, true, 1, 1, 299), 100, {row});
    a.read = &part.selection;
    const Result r = run(a);
    sum = merged(sum, {r.out, r.lse[0]});
  }
  CHECK(worst_excess(sum.out.data(), &sum.lse, whole, 32) <= 1.);
}
