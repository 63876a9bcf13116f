// Loki (Singhania et al. 2024, "Loki: low-rank keys for efficient sparse attention", arXiv 2406.02542)
//
//   calibration: B = eigenvectors of the keys' covariance per layer and KV head, largest eigenvalue first, of keys
//                before (`rope = pre`) or after RoPE (`post`)
//   k~ = the first `rank` coordinates B k of the rotated key                                             (side data)
//   score(token) = first `rank` coordinates of B q . k~, per query head; nothing is forced
//
// The basis is always applied to rotated queries and keys, and the keys' mean is not subtracted, as in the original.
// The original keeps every coordinate of the turned keys in place of the keys; here the first ones stand beside them.
#include <algorithm>
#include <cmath>
#include <lacuna/sdk.hpp>
#include <numeric>

namespace {
using namespace lacuna::sdk;

/// Eigenvectors of the symmetric a [d, d], as rows, largest eigenvalue first (cyclic Jacobi; a is overwritten).
std::vector<double> eigenvectors(std::vector<double>& a, i64 d) {
  const auto at = [d](i64 i, i64 j) { return static_cast<std::size_t>(i * d + j); };
  std::vector<double> v(a.size());
  for (i64 i = 0; i < d; ++i) v[at(i, i)] = 1;
  for (int sweep = 0; sweep < 60; ++sweep) {
    double off = 0, all = 0;
    for (i64 i = 0; i < d; ++i)
      for (i64 j = 0; j < d; ++j) (i == j ? all : off) += a[at(i, j)] * a[at(i, j)];
    if (off <= 1e-28 * all) break;
    for (i64 p = 0; p < d; ++p)
      for (i64 q = p + 1; q < d; ++q) {
        if (a[at(p, q)] == 0) continue;
        const double theta = (a[at(q, q)] - a[at(p, p)]) / (2 * a[at(p, q)]);
        const double t = (theta < 0 ? -1 : 1) / (std::abs(theta) + std::sqrt(theta * theta + 1));
        const double cosine = 1 / std::sqrt(t * t + 1), sine = t * cosine;
        const auto turn = [=](double& x, double& y) {
          const double first = cosine * x - sine * y;
          y = sine * x + cosine * y;
          x = first;
        };
        for (i64 i = 0; i < d; ++i) turn(a[at(i, p)], a[at(i, q)]);
        for (i64 i = 0; i < d; ++i) turn(a[at(p, i)], a[at(q, i)]);
        for (i64 i = 0; i < d; ++i) turn(v[at(p, i)], v[at(q, i)]);
      }
  }
  std::vector<i64> order(static_cast<std::size_t>(d));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](i64 x, i64 y) { return a[at(x, x)] > a[at(y, y)]; });
  std::vector<double> out;
  for (const i64 row : order) out.insert(out.end(), v.begin() + row * d, v.begin() + (row + 1) * d);
  return out;
}

struct Loki : Strategy {
  struct Params {
    Data basis;
    i32 rank = 32;
    std::string rope = "post";
  } params;

  static void schema(Schema<Params>& s) {
    s.field("basis", &Params::basis, "principal components of the keys, from lacuna calibrate")
        .field("rank", &Params::rank, "components that score", "1..")
        .field("rope", &Params::rope, "keys that the basis was made from: before or after RoPE", "post|pre");
  }
  static Info info() {
    Info i{};
    i.name = "loki";
    i.summary = "tokens ranked by q . k in the leading principal components of the keys";
    i.paper = "Singhania et al. 2024, arXiv 2406.02542";
    i.rule = "score = sum over the first `rank` components of (B q)_c (B k)_c";
    i.phases = kDecode;
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.needs = kNeedsData;
    return i;
  }

  i64 rank(Context& c) const { return std::min(params.rank, c.layer().head_dim); }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::rank;
    p.per_query_head = 1;
    p.sides[p.num_sides++] = {"projected", SidePer::token, 1, Dtype::f32, rank(c), 1};
    p.workspace_bytes = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads * rank(c) * 4 + 256;
  }

  /// [num_kv_heads, head_dim, head_dim], components as rows.
  const float* basis(Context& c) const {
    const Array b = c.data("basis", params.rope.c_str());
    const i64 d = c.layer().head_dim;
    if (!b.data || b.rank != 3 || b.extent[0] != c.layer().num_kv_heads || b.extent[1] != d || b.extent[2] != d)
      throw Failure("basis: layer " + std::to_string(c.layer().index) + " has no array '" + params.rope +
                    "' of num_kv_heads x head_dim x head_dim");
    return static_cast<const float*>(b.data);
  }

  void index(Context& c, const Dirty& dirty) override {
    const auto projected = c.side<float>("projected");
    const Paged kv = c.kv();
    const float* components = basis(c);
    const i64 d = kv.head_dim, r = rank(c), units = dirty.max_units, heads = c.layer().num_kv_heads;
    c.for_each(dirty.rows * units * r, [=] LACUNA_HD(i64 i) {
      const i64 e = i % r, row = i / r / units, slot = dirty.begin[row] + i / r % units;
      if (slot >= dirty.end[row]) return;
      const float* component = components + (row % heads * d + e) * d;
      float sum = 0.f;
      for (i64 x = 0; x < d; ++x) sum += component[x] * kv.key(row, slot, x);
      projected.at(row, slot, e) = sum;
    });
    const double tokens = static_cast<double>(dirty.rows * units);
    c.charge(tokens * static_cast<double>(size_of(kv.dtype) * d + 4 * r), 2.0 * tokens * static_cast<double>(d * r));
  }

  void score(Context& c, Scores& s) override {
    const auto projected = c.side<float>("projected");
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const float* components = basis(c);
    const i32 heads_kv = c.layer().num_kv_heads;
    const i64 d = q.head_dim, r = rank(c), n = s.units, stride = s.stride, count = rows.count();
    float* query = c.workspace<float>(count * r);
    c.for_each(count * r, [=] LACUNA_HD(i64 i) {
      const i64 row = i / r;
      const float* component = components + (rows.kv_row(row, heads_kv) % heads_kv * d + i % r) * d;
      float sum = 0.f;
      for (i64 x = 0; x < d; ++x) sum += component[x] * q.at(rows.seq_of(row), rows.head_of(row), 0, x);
      query[i] = sum;
    });
    float* value = s.value;
    c.for_each(count * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n, kv_row = rows.kv_row(row, heads_kv);
      if (slot >= kv.length[kv_row]) return;
      float sum = 0.f;
      for (i64 e = 0; e < r; ++e) sum += query[row * r + e] * projected.at(kv_row, slot, e);
      value[row * stride + slot] = sum;
    });
    const double cells = static_cast<double>(count) * static_cast<double>(n * r);
    c.charge(4.0 * cells / c.layer().group(), 2.0 * cells);
  }

  void calibrate(Context& c, Calibration& to) override {
    gather(c, to, "post", {c.kv(), nullptr});
    gather(c, to, "pre", {c.kv(), c.unrotated_keys()});
  }

  /// Keys before RoPE where `before` is given, else after it.
  struct Keys {
    Paged kv;
    const float* before;

    LACUNA_HD double at(i64 row, i64 slot, i64 x) const {
      return static_cast<double>(before ? before[(row * kv.max_length + slot) * kv.head_dim + x]
                                        : kv.key(row, slot, x));
    }
  };

  /// Moments of the keys, and at the last trace their principal components.
  void gather(Context& c, Calibration& to, const char* name, Keys key) const {
    const Paged kv = key.kv;
    const i64 d = kv.head_dim, heads = kv.rows, of_head = d * d + d + 1;  // second moments, sums, count
    double* sums = to.sums(name, heads * of_head);
    c.for_each(heads * d, [=] LACUNA_HD(i64 i) {
      const i64 head = i / d, a = i % d;
      double* out = sums + head * of_head;
      for (i64 slot = 0; slot < kv.length[head]; ++slot) {
        const double k = key.at(head, slot, a);
        for (i64 b = 0; b < d; ++b) out[a * d + b] += k * key.at(head, slot, b);
        out[d * d + a] += k;
      }
      if (a == 0) out[d * d + d] += kv.length[head];
    });
    if (!to.last()) return;
    std::vector<float> all;
    for (i64 head = 0; head < heads; ++head) {
      const double* in = sums + head * of_head;
      std::vector<double> covariance(static_cast<std::size_t>(d * d));
      for (i64 i = 0; i < d * d; ++i)
        covariance[static_cast<std::size_t>(i)] = in[i] - in[d * d + i / d] * in[d * d + i % d] / in[d * d + d];
      for (const double x : eigenvectors(covariance, d)) all.push_back(static_cast<float>(x));
    }
    const i64 extent[3] = {heads, d, d};
    to.put(name, all.data(), 3, extent);
  }
};
}  // namespace

LACUNA_PLUGIN(Loki)
