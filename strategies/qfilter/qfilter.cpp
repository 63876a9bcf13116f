// Q-Filters (Godey et al. 2025, "Q-Filters: leveraging QK geometry for efficient KV cache compression",
// arXiv 2503.02812)
//
//   calibrate: X    = 3000 of a query head's queries after RoPE, over all traces, not centred
//              v, u = first right and left singular vectors of X;  s = 1 if more than half of u is positive, else -1
//              filter = mean over the GQA group of -s v
//   score(j) = -(filter . k_j)   per KV head, key after RoPE; nothing forced
//
// The original draws its rows at random from 19 texts; here each trace gives evenly spaced ones. The original also
// keeps the most recent tokens (`recent`).
#include <cmath>
#include <lacuna/sdk.hpp>
#include <vector>

namespace {
using namespace lacuna::sdk;

constexpr i64 kSamples = 3000;

/// The eigenvector of the largest eigenvalue of a positive semidefinite matrix [d, d], by repeated squaring: 2^40 steps
/// of the power iteration.
std::vector<double> leading_eigenvector(std::vector<double> m, i64 d) {
  const auto at = [d](i64 a, i64 b) { return static_cast<std::size_t>(a * d + b); };
  for (int round = 0; round < 40; ++round) {
    double trace = 0;
    for (i64 a = 0; a < d; ++a) trace += m[at(a, a)];
    if (!(trace > 0)) break;
    for (double& x : m) x /= trace;
    std::vector<double> square(m.size());
    for (i64 a = 0; a < d; ++a)
      for (i64 k = 0; k < d; ++k)
        for (i64 b = 0; b < d; ++b) square[at(a, b)] += m[at(a, k)] * m[at(k, b)];
    m.swap(square);
  }
  i64 largest = 0;
  for (i64 a = 1; a < d; ++a)
    if (m[at(a, a)] > m[at(largest, largest)]) largest = a;
  double norm = 0;
  for (i64 a = 0; a < d; ++a) norm += m[at(a, largest)] * m[at(a, largest)];
  std::vector<double> v(static_cast<std::size_t>(d));
  for (i64 a = 0; a < d && norm > 0; ++a) v[static_cast<std::size_t>(a)] = m[at(a, largest)] / std::sqrt(norm);
  return v;
}

/// -s v of the rows x [count, d].
std::vector<double> head_filter(const double* x, i64 count, i64 d) {
  std::vector<double> gram(static_cast<std::size_t>(d * d));
  for (i64 i = 0; i < count; ++i)
    for (i64 a = 0; a < d; ++a)
      for (i64 b = 0; b < d; ++b) gram[static_cast<std::size_t>(a * d + b)] += x[i * d + a] * x[i * d + b];
  std::vector<double> v = leading_eigenvector(std::move(gram), d);
  i64 positive = 0;
  for (i64 i = 0; i < count; ++i) {
    double dot = 0;
    for (i64 a = 0; a < d; ++a) dot += x[i * d + a] * v[static_cast<std::size_t>(a)];
    positive += dot > 0;
  }
  if (2 * positive > count)
    for (double& e : v) e = -e;
  return v;
}

struct QFilter : Strategy {
  struct Params {
    Data filters;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("filters", &Params::filters, "calibrated directions, one a KV head");
  }
  static Info info() {
    Info i{};
    i.name = "qfilter";
    i.summary = "tokens ranked by their key along a calibrated query direction";
    i.paper = "Godey et al. 2025, arXiv 2503.02812";
    i.rule = "score(j) = -(filter . k_j), filter = first right-singular direction of the head's queries";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean"})";
    i.presets = R"({"kvpress": {}})";
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.needs = kNeedsData;
    return i;
  }

  void plan(Context&, Plan& p) override {
    p.score_kind = ScoreKind::rank;
    p.per_query_head = 0;
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const i64 rows = s.rows.count(), n = kv.max_length, stride = s.stride, d = kv.head_dim;
    const i64 heads = c.layer().num_kv_heads;
    const Array a = c.data("filters", "filter");
    if (!a.data || a.rank != 2 || a.extent[0] != heads || a.extent[1] != d)
      throw Failure("filters: no filter [num_kv_heads, head_dim] of this layer: make the file with lacuna calibrate");
    const float* filter = static_cast<const float*>(a.data);
    float* value = s.value;
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;  // rows are KV heads
      if (slot >= kv.length[row]) return;
      const i64 at = kv.physical(row, slot) * d;
      double dot = 0;
      for (i64 e = 0; e < d; ++e)
        dot += static_cast<double>(filter[row % heads * d + e]) * load(kv.k, kv.dtype, at + e);
      value[row * stride + slot] = -static_cast<float>(dot);
    });
    const double elements = 1.0 * rows * n * d;
    c.charge(elements * size_of(kv.dtype) + 4.0 * rows * n, 2.0 * elements);
  }

  void calibrate(Context& c, Calibration& out) override {
    const Queries q = c.seen_queries();
    const i64 heads = q.heads, d = q.head_dim, group = c.layer().group();
    double* samples = out.sums("samples", heads * kSamples * d);  // [heads, kSamples, d]
    double* taken = out.sums("taken", 1);
    const i64 wanted = kSamples * (out.trace + 1) / out.traces - kSamples * out.trace / out.traces;
    const i64 count = wanted < q.count ? wanted : q.count, begin = static_cast<i64>(*taken);
    for (i64 head = 0; head < heads; ++head)
      for (i64 i = 0; i < count; ++i)
        for (i64 e = 0; e < d; ++e)
          samples[(head * kSamples + begin + i) * d + e] = q.at(0, head, i * q.count / count, e);
    *taken += static_cast<double>(count);
    if (!out.last()) return;

    std::vector<double> sum(static_cast<std::size_t>(heads / group * d));
    for (i64 head = 0; head < heads; ++head) {
      const std::vector<double> own = head_filter(samples + head * kSamples * d, begin + count, d);
      for (i64 e = 0; e < d; ++e)
        sum[static_cast<std::size_t>(head / group * d + e)] += own[static_cast<std::size_t>(e)];
    }
    std::vector<float> filter;
    for (const double x : sum) filter.push_back(static_cast<float>(x / static_cast<double>(group)));
    const i64 extent[2] = {heads / group, d};
    out.put("filter", filter.data(), 2, extent);
  }
};
}  // namespace

LACUNA_PLUGIN(QFilter)
