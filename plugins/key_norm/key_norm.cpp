// Key norms (Devoto et al. 2024, "A simple and effective L2 norm-based strategy for KV cache compression", arXiv
// 2406.11430)
//
//   score(token) = -|k|      (small keys attract attention; layers 0 and 1 stay dense, as in the paper)
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct KeyNorm : Strategy {
  static Info info() {
    Info i{};
    i.name = "key_norm";
    i.summary = "tokens ranked by the norm of their key, smallest first";
    i.paper = "Devoto et al. 2024, arXiv 2406.11430";
    i.rule = "score(token) = -|k|";
    i.phases = kDecode | kEvict;
    i.defaults = R"({"dense_layers": [0, 1]})";
    i.dense_point = R"({"dense_layers": [], "density": 1.0})";
    i.nested = 1;
    return i;
  }

  void plan(Context&, Plan& p) override { p.per_query_head = 0; }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i32 heads_kv = c.layer().num_kv_heads;
    const i64 units = s.units, stride = s.stride;
    float* value = s.value;
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, token = i % units, kv_row = rows.kv_row(row, heads_kv);
      if (token >= kv.length[kv_row]) return;
      float sum = 0.f;
      for (i64 e = 0; e < kv.head_dim; ++e) {
        const float k = kv.key(kv_row, token, e);
        sum += k * k;
      }
      value[row * stride + token] = -sqrtf(sum);
    });
    const double read = static_cast<double>(rows.count()) * units * kv.head_dim;
    c.charge(read * size_of(kv.dtype), 2.0 * read);
  }
};
}  // namespace

LACUNA_PLUGIN(KeyNorm)
