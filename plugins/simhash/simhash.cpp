// SimHash (Charikar 2002, "Similarity estimation techniques from rounding algorithms"), as a ranking
//
//   g_1 .. g_b   = seeded Gaussian directions, one set a layer                        (state)
//   code(x)      = the b signs of g . x                    (keys: side data, written as tokens arrive)
//   score(token) = -hamming(code(q), code(k))              (the angle between q and k is about pi / b times that)
//
// q is the current query; in eviction, the last one before the cut. The loops below run on both back-ends. On a device
// the kernels of kernels.cu take their place where nvcc built this file: the way to bring own kernels.
#include <lacuna/sdk.hpp>

#include "kernels.hpp"

namespace {
using namespace lacuna::sdk;
using simhash::kWordBits;

struct SimHash : Strategy {
  struct Params {
    i32 words = 4;
  } params;

  static void schema(Schema<Params>& s) { s.field("words", &Params::words, "16-bit words of a code", "1..16"); }
  static Info info() {
    Info i{};
    i.name = "simhash";
    i.summary = "tokens ranked by the Hamming distance between SimHash codes of key and query";
    i.paper = "Charikar 2002";
    i.rule = "score(token) = -hamming(sign(G q), sign(G k)), G seeded Gaussian";
    i.phases = kDecode | kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.stochastic = 1;
    i.query_aware = 1;
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const i64 d = c.layer().head_dim;
    p.sides[p.num_sides++] = {"codes", SidePer::token, 1, Dtype::u16, params.words, 1};
    p.states[p.num_states++] = {"directions", Dtype::f32, params.words * kWordBits * d};
    p.workspace_bytes =
        static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads * params.words * size_of(Dtype::u16);
  }

  void index(Context& c, const Dirty& dirty) override {
    const Paged kv = c.kv();
    const auto codes = c.side<u16>("codes");
    const i64 d = kv.head_dim, words = params.words, set = words * kWordBits * d, units = dirty.max_units;
    const i32 heads_kv = c.layer().num_kv_heads;
    float* g = c.state<float>("directions");
    Random random = c.random();
    random.step = 0;  // the same directions whenever they are drawn
    c.for_each(c.call().num_seqs * set, [=] LACUNA_HD(i64 i) {
      if (g[i] == 0.f) g[i] = random.normal(i % set / d, i % d);
    });
    const double hashed = static_cast<double>(dirty.rows) * units * d;
    c.charge(hashed * size_of(kv.dtype), 2.0 * hashed * words * kWordBits);
#if defined(__CUDACC__)
    if (c.call().on_device && d <= simhash::kMaxHeadDim) {
      simhash::hash_keys(kv, dirty, heads_kv, {g, params.words, kv.head_dim}, codes, c.call().stream);
      return;
    }
#endif
    c.for_each(dirty.rows * units * words, [=] LACUNA_HD(i64 i) {
      const i64 word = i % words, row = i / words / units, token = dirty.begin[row] + i / words % units;
      if (token >= dirty.end[row]) return;
      const float* directions = g + row / heads_kv * set + word * kWordBits * d;
      codes.at(row, token, word) = code(directions, d, [=](i64 e) { return kv.key(row, token, e); });
    });
  }

  void score(Context& c, Scores& s) override {
    const Queries q = c.call().purpose == Purpose::evict ? c.last_queries(1) : c.current_queries();
    const Paged kv = c.kv();
    const auto codes = c.side<u16>("codes");
    const Rows rows = s.rows;
    const i64 d = q.head_dim, words = params.words, set = words * kWordBits * d, units = s.units, stride = s.stride;
    const i32 heads_kv = c.layer().num_kv_heads;
    const float* g = c.state<float>("directions");
    u16* wanted = c.workspace<u16>(rows.count() * words);
    float* value = s.value;
    const double compared = static_cast<double>(rows.count()) * units * words;
    c.charge(compared / c.layer().group() * size_of(Dtype::u16), 2.0 * compared);
#if defined(__CUDACC__)
    if (c.call().on_device) {
      simhash::hash_queries(q, rows, {g, params.words, q.head_dim}, wanted, c.call().stream);
      simhash::score_tokens(kv, heads_kv, wanted, params.words, codes, s, c.call().stream);
      return;
    }
#endif
    c.for_each(rows.count() * words, [=] LACUNA_HD(i64 i) {
      const i64 row = i / words, seq = rows.seq_of(row), head = rows.head_of(row);
      const float* directions = g + seq * set + i % words * kWordBits * d;
      wanted[i] = code(directions, d, [=](i64 e) { return q.at(seq, head, q.count - 1, e); });
    });
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, token = i % units, kv_row = rows.kv_row(row, heads_kv);
      if (token >= kv.length[kv_row]) return;
      i32 distance = 0;
      for (i64 w = 0; w < words; ++w) {
        for (u32 x = wanted[row * words + w] ^ codes.at(kv_row, token, w); x; x &= x - 1) ++distance;
      }
      value[row * stride + token] = static_cast<float>(-distance);
    });
  }

 private:
  /// Signs of one word's directions [kWordBits, d] against the vector x(e).
  template <class F>
  LACUNA_HD static u16 code(const float* directions, i64 d, F x) {
    u32 bits = 0;
    for (i32 b = 0; b < kWordBits; ++b) {
      float dot = 0.f;
      for (i64 e = 0; e < d; ++e) dot += directions[b * d + e] * x(e);
      bits |= (dot >= 0.f ? 1u : 0u) << b;
    }
    return static_cast<u16>(bits);
  }
};
}  // namespace

LACUNA_PLUGIN(SimHash)
