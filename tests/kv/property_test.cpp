// Random histories of appends, evictions, forks, drops, position compactions and side updates against the naive model.
#include <algorithm>

#include "support.hpp"

namespace kv_test {
namespace {

constexpr i32 kHeads = 3, kHeadDim = 4, kMaxTokens = 90, kUnit = 4, kOperations = kOnGpu ? 400 : 1500;
constexpr i64 kMaxPagesOf16 = 40;  // few enough that some appends, evictions and compactions find the pool full

struct Config {
  Dtype dtype;
  i32 page_size;
  bool poison;
  bool rebuilt_tokens;  // also a token side that does not move, so that granularity 1 is rebuilt
};

float unit_sum(const std::vector<Token>& tokens, i64 unit) {
  float sum = 0;
  for (i64 s = unit * kUnit; s < std::min<i64>((unit + 1) * kUnit, static_cast<i64>(tokens.size())); ++s) {
    sum += tokens[static_cast<std::size_t>(s)].k[0] + static_cast<float>(tokens[static_cast<std::size_t>(s)].position);
  }
  return sum;
}

/// Host copy of the dirty units of each head.
class Ranges {
 public:
  explicit Ranges(const sdk::Dirty& dirty)
      : max_units(dirty.max_units), begin_(download(dirty.begin, dirty.rows)), end_(download(dirty.end, dirty.rows)) {}
  i32 begin(i32 head) const { return begin_[static_cast<std::size_t>(head)]; }
  i32 end(i32 head) const { return end_[static_cast<std::size_t>(head)]; }
  const i32 max_units;

 private:
  std::vector<i32> begin_, end_;
};

struct Subject {
  KvCache cache;
  Model model;
  i64 next_position = 0;
};

class History {
 public:
  History(const Config& config, unsigned seed)
      : config_(config),
        rng_(seed),
        pool_(std::make_shared<PagePool>(test_device(), config.page_size, kHeadDim, config.dtype,
                                         kMaxPagesOf16 * 16 / config.page_size, config.poison)),
        rope_(RopeConfig{}, kHeadDim) {}

  void run() {
    for (int i = 0; i < kOperations; ++i) {
      step();
      check_all();
    }
    CHECK(refused_ > 0);  // the histories do reach a full pool or table
    subjects_.clear();
    CHECK(pool_->pages_in_use() == 0);
  }

 private:
  i32 below(i32 n) { return static_cast<i32>(rng_() % static_cast<unsigned>(n)); }

  void start() {
    Subject fresh{KvCache(pool_, kHeads, kMaxTokens), Model(kHeads)};
    fresh.cache.add_side({"sum", sdk::SidePer::token, 0, Dtype::f32, 1, 1});
    fresh.cache.add_side({"units", sdk::SidePer::unit, kUnit, Dtype::f32, 1, 0});
    if (config_.rebuilt_tokens) fresh.cache.add_side({"norm", sdk::SidePer::token, 0, Dtype::f32, 1, 0});
    subjects_.push_back(std::move(fresh));
  }

  void step() {
    if (subjects_.empty()) start();
    const auto which = static_cast<std::size_t>(below(static_cast<i32>(subjects_.size())));
    Subject& s = subjects_[which];
    const int dice = below(100);
    try {
      if (dice < 35)
        append(s);
      else if (dice < 60)
        evict(s);
      else if (dice < 70)
        compact(s);
      else if (dice < 85)
        update_sides(s);
      else if (dice < 93 && subjects_.size() < 5)
        subjects_.push_back({s.cache.fork(), s.model, s.next_position});
      else if (subjects_.size() > 1)
        subjects_.erase(subjects_.begin() + static_cast<std::ptrdiff_t>(which));
    } catch (const Error& error) {
      const std::string what = error.problem().what;
      CHECK((what == "the page pool is full" || what == "the page table is full"));
      ++refused_;
    }
  }

  void append(Subject& s) {
    const Batch batch(kHeads, kHeadDim, 1 + below(20), s.next_position + below(3), static_cast<unsigned>(rng_()));
    batch.append_to(s.cache, kHeadDim);  // throws before the model changes
    batch.append_to(s.model, kHeadDim, config_.dtype);
    s.next_position = batch.first_position + batch.n;
  }

  void evict(Subject& s) {
    std::vector<std::vector<i32>> slots(kHeads);
    for (i32 h = 0; h < kHeads; ++h) {
      const i32 n = static_cast<i32>(s.model[static_cast<std::size_t>(h)].size());
      const i32 prefix = below(n + 1), percent = below(110);
      for (i32 i = 0; i < n; ++i) {
        if (i < prefix || below(100) < percent) slots[static_cast<std::size_t>(h)].push_back(i);
      }
      if (below(4) == 0) slots[static_cast<std::size_t>(h)].resize(static_cast<std::size_t>(prefix));
    }
    s.cache.retain(slots);
    retain(s.model, slots);
  }

  void compact(Subject& s) {
    s.cache.compact_positions(rope_);
    for (auto& tokens : s.model) {
      bool turned = false;
      for (i32 i = 0; i < static_cast<i32>(tokens.size()); ++i) {
        Token& token = tokens[static_cast<std::size_t>(i)];
        turned |= token.carried != i;
        if (turned) token.taken = false;
        if (token.carried == i) continue;
        rope_.shift(token.k.data(), i - token.carried);
        for (float& x : token.k) x = rounded(x, config_.dtype);
        token.carried = i;
      }
    }
  }

  void update_sides(Subject& s) {
    SideCopy<float> sum(s.cache.side("sum"));
    for (i32 h = 0; h < kHeads; ++h) {
      auto& tokens = s.model[static_cast<std::size_t>(h)];
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        const float more = static_cast<float>(below(100));
        sum.at(h, static_cast<i64>(i)) += more;
        tokens[i].sum += more;
      }
    }
    sum.write_back();
    SideCopy<float> units(s.cache.side("units"));
    const Ranges dirty(s.cache.take_dirty(kUnit));
    for (i32 h = 0; h < kHeads; ++h) {
      const auto& tokens = s.model[static_cast<std::size_t>(h)];
      CHECK(dirty.end(h) - dirty.begin(h) <= dirty.max_units);
      for (i64 u = dirty.begin(h); u < dirty.end(h); ++u) units.at(h, u) = unit_sum(tokens, u);
      i64 wrong = 0;
      for (i64 u = 0; u * kUnit < static_cast<i64>(tokens.size()); ++u) wrong += units.at(h, u) != unit_sum(tokens, u);
      CHECK(wrong == 0);
    }
    units.write_back();
    take_tokens(s);
  }

  void take_tokens(Subject& s) {
    const Ranges dirty(s.cache.take_dirty(1));
    for (i32 h = 0; h < kHeads; ++h) {
      auto& tokens = s.model[static_cast<std::size_t>(h)];
      if (config_.rebuilt_tokens) {
        SideCopy<float> norm(s.cache.side("norm"));
        for (i64 i = dirty.begin(h); i < dirty.end(h); ++i) norm.at(h, i) = tokens[static_cast<std::size_t>(i)].k[1];
        norm.write_back();
        i64 wrong = 0;
        for (std::size_t i = 0; i < tokens.size(); ++i) wrong += norm.at(h, static_cast<i64>(i)) != tokens[i].k[1];
        CHECK(wrong == 0);
      } else {  // exactly the tokens that were never taken or that were rotated since
        const auto stale = std::find_if(tokens.begin(), tokens.end(), [](const Token& t) { return !t.taken; });
        CHECK(dirty.begin(h) == stale - tokens.begin());
        CHECK(dirty.end(h) == static_cast<i32>(tokens.size()));
      }
      for (Token& token : tokens) token.taken = true;
    }
  }

  void check_all() {
    std::vector<const KvCache*> caches;
    for (Subject& s : subjects_) {
      REQUIRE(differences(s.cache, s.model, config_.poison) == 0);
      caches.push_back(&s.cache);
    }
    REQUIRE(pool_->pages_in_use() == distinct_pages(caches));
    // Asking for a side un-shares it, so only one subject a step is looked at.
    if (subjects_.empty()) return;
    Subject& s = subjects_[static_cast<std::size_t>(below(static_cast<i32>(subjects_.size())))];
    SideCopy<float> sum(s.cache.side("sum"));
    i64 wrong = 0;
    for (i32 h = 0; h < kHeads; ++h) {
      const auto& tokens = s.model[static_cast<std::size_t>(h)];
      for (std::size_t i = 0; i < tokens.size(); ++i) wrong += sum.at(h, static_cast<i64>(i)) != tokens[i].sum;
      for (i64 i = static_cast<i64>(tokens.size()); i < kMaxTokens; ++i) {
        const float beyond = sum.at(h, i);
        wrong += config_.poison ? !std::isnan(beyond) : beyond != 0;
      }
    }
    REQUIRE(wrong == 0);
  }

  Config config_;
  std::mt19937 rng_;
  std::shared_ptr<PagePool> pool_;
  Rope rope_;
  std::vector<Subject> subjects_;
  i64 refused_ = 0;
};

}  // namespace

TEST_CASE("random histories equal the naive model and conserve pages") {
  const Config configs[] = {{Dtype::f32, 16, true, false},  {Dtype::bf16, 16, true, true},
                            {Dtype::f16, 5, true, false},   {Dtype::f32, 5, false, true},
                            {Dtype::bf16, 1, false, false}, {Dtype::f16, 16, false, true}};
  for (unsigned seed = 0; const Config& config : configs) {
    CAPTURE(static_cast<int>(config.dtype));
    CAPTURE(config.page_size);
    History(config, ++seed).run();
  }
}

}  // namespace kv_test
