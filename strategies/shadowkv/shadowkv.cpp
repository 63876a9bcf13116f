// ShadowKV (Sun et al. 2024, "ShadowKV: KV cache in shadows for high-throughput long-context LLM inference", arXiv
// 2410.21465)
//
//   ranked: the prompt's whole chunks of `chunk` tokens but the last `local_chunks`
//   taken first: everything after them (the local chunks, the prompt's remainder, every generated token)
//   landmark = mean key of a chunk
//   taken next: the `outlier_chunks` ranked chunks with the lowest min over their keys of cos(key, landmark)
//   score(chunk) = softmax over the landmarks that are left of q . landmark * softmax_scale, max over the group (gqa)
//
// Exact keys of the selected chunks: the original rebuilds them from a low-rank factor of the keys before RoPE. Its
// local and outlier chunks lie on top of its budget, here inside; a budget too small for them is spent on them alone.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/prompt.hpp>
#include <lacuna/sdk/softmax.hpp>

namespace {
using namespace lacuna::sdk;

constexpr float kAboveMass = 3.f;  // lifts 1 - cosine and more above any softmax mass

struct ShadowKv : Strategy {
  struct Params {
    i32 chunk = 8, outlier_chunks = 48, local_chunks = 4;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("chunk", &Params::chunk, "tokens of a chunk", "1..4096")
        .field("outlier_chunks", &Params::outlier_chunks, "chunks that a landmark does not stand for, taken exactly",
               "0..1000000")
        .field("local_chunks", &Params::local_chunks, "last whole chunks of the prompt, always taken", "0..1000000");
  }
  static Info info() {
    Info i{};
    i.name = "shadowkv";
    i.summary = "chunks ranked by their mean key, outlier chunks and the prompt's end taken first";
    i.paper = "Sun et al. 2024, arXiv 2410.21465";
    i.rule =
        "score(chunk) = max over the group of softmax over landmarks of q . mean key; local, generated and outlier "
        "chunks first";
    i.phases = kDecode;
    i.defaults = R"({"gqa": "max"})";
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.cost = "d_h S / chunk H_kv elements read, 2 d_h S / chunk H FLOPs";
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const Layer& l = c.layer();
    const i64 rows = static_cast<i64>(c.call().num_seqs) * l.num_kv_heads;
    max_chunks = (p.max_cached + params.chunk - 1) / params.chunk;
    p.unit_tokens = params.chunk;
    p.last_units = 1;
    p.score_kind = ScoreKind::rank;
    p.sides[p.num_sides++] = {"landmark", SidePer::unit, params.chunk, Dtype::f32, l.head_dim, 0};
    p.sides[p.num_sides++] = {"cosine", SidePer::unit, params.chunk, Dtype::f32, 1, 0};
    p.states[p.num_states++] = {"outlier", Dtype::i32, l.num_kv_heads * max_chunks};
    p.workspace_bytes = 4 * rows * (2 * max_chunks + 3) + 5 * 256 + softmax_bytes(rows * l.group());
  }

  void index(Context& c, const Dirty& dirty) override {
    const auto landmark = c.side<float>("landmark"), cosine = c.side<float>("cosine");
    const Paged kv = c.kv();
    const i64 d = kv.head_dim, chunk = params.chunk, units = dirty.max_units;
    c.for_each(dirty.rows * units * d, [=] LACUNA_HD(i64 i) {
      const i64 channel = i % d, row = i / d / units, unit = dirty.begin[row] + i / d % units;
      if (unit >= dirty.end[row]) return;
      const i64 begin = unit * chunk, end = begin + chunk < kv.length[row] ? begin + chunk : kv.length[row];
      double sum = 0;
      for (i64 t = begin; t < end; ++t) sum += kv.key(row, t, channel);
      landmark.at(row, unit, channel) = static_cast<float>(sum / static_cast<double>(end - begin));
    });
    c.for_each(dirty.rows * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, unit = dirty.begin[row] + i % units;
      if (unit >= dirty.end[row]) return;
      const i64 begin = unit * chunk, end = begin + chunk < kv.length[row] ? begin + chunk : kv.length[row];
      double least = 1;
      for (i64 t = begin; t < end; ++t) {
        double dot = 0, kk = 0, mm = 0;
        for (i64 e = 0; e < d; ++e) {
          const double k = kv.key(row, t, e), m = landmark.at(row, unit, e);
          dot += k * m, kk += k * k, mm += m * m;
        }
        const double of_key = kk * mm > 0 ? dot / sqrt(kk * mm) : 0.0;
        least = of_key < least ? of_key : least;
      }
      cosine.at(row, unit) = static_cast<float>(least);
    });
    const double keys = static_cast<double>(dirty.rows) * static_cast<double>(units * chunk * d);
    c.charge(size_of(kv.dtype) * keys + 4.0 * keys / static_cast<double>(chunk), 7.0 * keys);
    if (units > 1) find_outliers(c);  // later only chunks after the prompt's change, one at a time
  }

  void score(Context& c, Scores& s) override {
    const auto landmark = c.side<float>("landmark"), cosine = c.side<float>("cosine");
    const i32* outlier = c.state<i32>("outlier");
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const float scale = c.layer().softmax_scale;
    const i32 kv_heads = c.layer().num_kv_heads, local = params.local_chunks;
    const i64 d = q.head_dim, chunk = params.chunk, units = s.units, stride = s.stride, most = max_chunks,
              prompt = prompt_end(c);
    float* value = s.value;
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, unit = i % units, kv_row = rows.kv_row(row, kv_heads);
      if (unit >= kv.visible(kv_row, prompt - 1) / chunk - local || outlier[kv_row * most + unit]) return;
      double sum = 0;
      for (i64 e = 0; e < d; ++e)
        sum += static_cast<double>(q.at(rows.seq_of(row), rows.head_of(row), 0, e)) * landmark.at(kv_row, unit, e);
      value[row * stride + unit] = static_cast<float>(sum * scale);
    });
    softmax_rows(c, value, rows.count(), stride, units);
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, unit = i % units, kv_row = rows.kv_row(row, kv_heads);
      if (unit >= kv.visible(kv_row, prompt - 1) / chunk - local)
        value[row * stride + unit] = INFINITY;
      else if (outlier[kv_row * most + unit])
        value[row * stride + unit] = kAboveMass - cosine.at(kv_row, unit);
    });
    const double scored = static_cast<double>(units) * static_cast<double>(d);
    c.charge(4.0 * scored * static_cast<double>(kv.rows), 2.0 * scored * static_cast<double>(rows.count()));
  }

  i64 max_chunks = 0;  // of a KV head, fixed by plan()

  /// Marks the outliers among the prompt's ranked chunks.
  void find_outliers(Context& c) const {
    const auto cosine = c.side<float>("cosine");
    i32* outlier = c.state<i32>("outlier");
    const Paged kv = c.kv();
    const i64 chunk = params.chunk, most = max_chunks, prompt = prompt_end(c);
    const i32 local = params.local_chunks, outliers = params.outlier_chunks;
    float* strangeness = c.workspace<float>(kv.rows * most);
    i32 *list = c.workspace<i32>(kv.rows * most), *ranked = c.workspace<i32>(kv.rows),
        *wanted = c.workspace<i32>(kv.rows), *found = c.workspace<i32>(kv.rows);
    c.for_each(kv.rows, [=] LACUNA_HD(i64 row) {
      const i64 chunks = kv.visible(row, prompt - 1) / chunk - local;
      ranked[row] = static_cast<i32>(chunks > 0 ? chunks : 0);
      wanted[row] = outliers;
    });
    c.for_each(kv.rows * most, [=] LACUNA_HD(i64 i) {
      if (i % most < ranked[i / most]) strangeness[i] = -cosine.at(i / most, i % most);
      outlier[i] = 0;
    });
    c.topk(strangeness, kv.rows, most, ranked, wanted, list, found, most);
    c.for_each(kv.rows * most, [=] LACUNA_HD(i64 i) {
      if (i % most < found[i / most]) outlier[i / most * most + list[i]] = 1;
    });
  }
};
}  // namespace

LACUNA_PLUGIN(ShadowKv)
