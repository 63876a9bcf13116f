#include "lacuna/strategy/contract.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "expect_error.hpp"

namespace {
using namespace lacuna::sdk;

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
const lacuna::Culprit kWho{"thief", "mark", 17};

/// Two heads of two tiles, of 4 queries each, over 8 tokens; row 3 is (head 1, tile 1).
const Rows kPrefill{.seqs = 1,
                    .heads = 2,
                    .tile_begin = 0,
                    .tiles = 2,
                    .q_tile = 4,
                    .per_query_head = 1,
                    .num_queries = 8,
                    .first_position = 0};
const Rows kKv{.seqs = 2,
               .heads = 2,
               .tile_begin = 0,
               .tiles = 1,
               .q_tile = 1,
               .per_query_head = 0,
               .num_queries = 1,
               .first_position = 7};

struct ScoreTable {
  std::vector<float> value = std::vector<float>(16, 0.25f);
  Scores scores{kPrefill, value.data(), 4, 4, 2, -1};  // 4 units of 2 tokens
  ScoreTable() = default;
  ScoreTable(const ScoreTable&) = delete;
};

struct BudgetTable {
  std::vector<i64> tokens = std::vector<i64>(4, 4), pairs = std::vector<i64>(4, 16);
  std::vector<i32> rule = std::vector<i32>(4, 0), sinks = std::vector<i32>(4, 0), recent = std::vector<i32>(4, 0);
  Budget budget{kPrefill, tokens.data(), pairs.data(), rule.data(), sinks.data(), recent.data(), 1, 0, 0, 0, -1};
  BudgetTable() = default;
  BudgetTable(const BudgetTable&) = delete;
};

struct SelectionTable {
  std::vector<i32> piece_count, pieces, token_count, tokens, sinks, window, full;
  std::vector<float> piece_weight, token_weight;
  std::vector<i64> visible = {4, 8, 4, 8};
  Selection set;
  explicit SelectionTable(const Rows& rows = kPrefill)
      : piece_count(4, 1),
        pieces(4 * 2, 0),
        token_count(4, 2),
        tokens(4 * 3, 0),
        sinks(4, 0),
        window(4, 0),
        full(4, 0),
        piece_weight(4 * 2, 0.f),
        token_weight(4 * 3, 0.f),
        set{rows,
            2,
            2,
            3,
            piece_count.data(),
            pieces.data(),
            token_count.data(),
            tokens.data(),
            sinks.data(),
            window.data(),
            full.data(),
            piece_weight.data(),
            token_weight.data(),
            0,
            nullptr,
            nullptr,
            nullptr,
            nullptr} {
    for (int r = 0; r < 4; ++r) tokens[r * 3] = 3, tokens[r * 3 + 1] = 1;
    if (!rows.per_query_head) piece_count.assign(4, 0);
  }
  SelectionTable(const SelectionTable&) = delete;
  void clear(int row) { piece_count[row] = token_count[row] = 0; }
};

template <class Table, class Damage, class Check>
void broken(Damage damage, Check check, std::initializer_list<const char*> parts) {
  Table table;
  damage(table);
  expect_error([&] { check(table); }, parts);
}
}  // namespace

TEST_CASE("scores") {
  const auto check = [](ScoreKind kind, double mass) {
    return [=](ScoreTable& t) { lacuna::check_scores({"thief", "score", 17}, t.scores, kind, mass); };
  };
  const auto rank = check(ScoreKind::rank, 1), mass = check(ScoreKind::mass, 1);
  ScoreTable sound;
  CHECK_NOTHROW(rank(sound));
  CHECK_NOTHROW(mass(sound));
  sound.value = {-kInf, kInf, 0.5f, 0.5f};
  sound.value.resize(16, 0.f);
  sound.scores.value = sound.value.data();
  CHECK_NOTHROW(mass(sound));
  sound.value[2] = sound.value[3] = kNan;  // row 0 sees 4 tokens: units 2 and 3 come after it
  CHECK_NOTHROW(mass(sound));

  broken<ScoreTable>([](auto& t) { t.value[13] = kNan; }, rank,
                     {"strategy 'thief'", "role score", "unit 1", "NaN", "layer 17", "head 1", "tile 1"});
  broken<ScoreTable>([](auto& t) { t.value[6] = -0.1f; }, mass, {"at least 0", "unit 2", "head 0", "tile 1"});
  broken<ScoreTable>([](auto& t) { t.value[15] = 0.3f; }, mass, {"sum", "at most 1", "1.05", "head 1", "tile 1"});
  ScoreTable many;
  many.value[15] = 0.3f;
  CHECK_NOTHROW(check(ScoreKind::mass, 4)(many));
}

TEST_CASE("budgets") {
  const auto check = [](BudgetTable& t) { lacuna::check_budget({"thief", "allocate_rows", 17}, t.budget, 64); };
  BudgetTable sound;
  CHECK_NOTHROW(check(sound));
  sound.pairs = {64, 1000, 0, 0};
  sound.rule[1] = static_cast<i32>(Rule::full);  // outside the ranking, outside the sum
  CHECK_NOTHROW(check(sound));

  broken<BudgetTable>(
      [](auto& t) { t.pairs[3] = 17; }, check,
      {"strategy 'thief'", "role allocate_rows", "at most 64", "48 and 17", "layer 17", "head 1", "tile 1"});
  broken<BudgetTable>(
      [](auto& t) {
        t.pairs = {std::numeric_limits<i64>::max(), std::numeric_limits<i64>::max(), 0, 0};
      },
      check, {"at most 64"});
  broken<BudgetTable>([](auto& t) { t.tokens[1] = -1; }, check, {"at least 0", "-1 tokens", "head 0", "tile 1"});
  broken<BudgetTable>([](auto& t) { t.pairs[2] = -5; }, check, {"at least 0", "-5 pairs", "head 1", "tile 0"});
  broken<BudgetTable>([](auto& t) { t.rule[2] = 4; }, check, {"rule", "0..3", "4"});
  broken<BudgetTable>(
      [](auto& t) {
        t.rule[2] = static_cast<i32>(Rule::window);
        t.recent[2] = -2;
      },
      check, {"window", "-2 recent"});
}

TEST_CASE("selections") {
  const auto check = [](SelectionTable& t) { lacuna::check_selection(kWho, t.set, t.visible.data()); };
  SelectionTable sound;
  CHECK_NOTHROW(check(sound));
  sound.clear(0), sound.full[0] = 1;
  sound.clear(1), sound.window[1] = 1;
  sound.clear(2), sound.sinks[2] = 2;
  sound.clear(3), sound.visible[3] = 0;
  CHECK_NOTHROW(check(sound));

  const auto where = {"strategy 'thief'", "role mark", "layer 17", "head 1", "tile 0"};
  broken<SelectionTable>([](auto& t) { t.clear(2); }, check, where);
  broken<SelectionTable>([](auto& t) { t.clear(2); }, check, {"nothing to read", "sees 4 tokens"});
  broken<SelectionTable>([](auto& t) { t.piece_count[1] = 3; }, check, {"number of pieces", "0..2", "3", "tile 1"});
  broken<SelectionTable>([](auto& t) { t.token_count[1] = -1; }, check, {"number of tokens", "0..3", "-1"});
  broken<SelectionTable>([](auto& t) { t.set.kv_block = 0; }, check, {"kv_block"});
  broken<SelectionTable>([](auto& t) { t.tokens[3 * 2 + 1] = 4; }, check,
                         {"token out of range", "0..3", "4", "head 1", "tile 0"});
  broken<SelectionTable>([](auto& t) { t.tokens[0] = -1; }, check, {"token out of range", "-1"});
  broken<SelectionTable>([](auto& t) { t.tokens[1] = 3; }, check, {"token listed twice", "3", "head 0"});
  broken<SelectionTable>([](auto& t) { t.token_count[0] = 3, t.tokens[2] = 3; }, check, {"token listed twice"});
  broken<SelectionTable>([](auto& t) { t.pieces[2] = 8; }, check, {"piece out of range", "0..7", "8"});
  broken<SelectionTable>([](auto& t) { t.piece_count[3] = 2; }, check, {"piece listed twice", "0", "head 1", "tile 1"});
  broken<SelectionTable>([](auto& t) { t.window[1] = -1; }, check, {"exact part", "-1"});
  broken<SelectionTable>([](auto& t) { t.sinks[1] = -3; }, check, {"exact part", "-3"});
  broken<SelectionTable>([](auto& t) { t.token_weight[1] = kInf; }, check, {"log weight of a token", "inf"});
  broken<SelectionTable>([](auto& t) { t.piece_weight[2] = kNan; }, check, {"log weight of a piece", "nan"});
  broken<SelectionTable>([](auto& t) { t.full[0] = 1, t.tokens[0] = 99; }, check, {"token out of range", "99"});
}

TEST_CASE("kept tokens") {
  const i32 length[] = {4, 8, 4, 8};
  const auto check = [&](SelectionTable& t) {
    t.set.rows = kKv;
    lacuna::check_kept({"thief", "retain", 17}, {t.set}, length);
  };
  SelectionTable sound;
  CHECK_NOTHROW(check(sound));
  broken<SelectionTable>(
      [](auto& t) { t.token_count[3] = 0; }, check,
      {"strategy 'thief'", "role retain", "nothing is kept", "none of 8", "layer 17", "KV head 1", "sequence 1"});
  broken<SelectionTable>([](auto& t) { t.tokens[0] = 4; }, check, {"kept token out of range", "0..3", "4"});
  broken<SelectionTable>([](auto& t) { t.tokens[4] = 3; }, check, {"kept token listed twice", "3"});
  broken<SelectionTable>([](auto& t) { t.token_count[2] = 4; }, check, {"number of kept tokens", "0..3"});
}
