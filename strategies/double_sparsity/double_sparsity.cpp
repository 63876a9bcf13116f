// Double Sparsity (Yang et al. 2024, "Post-training sparse attention with double sparsity", arXiv 2408.07092)
//
//   calibration, means over tokens per layer:  qk: |q_c k_c| of a token with itself, after RoPE, per query head
//     q: |q_c| before RoPE, per query head;  k: |k_c| before RoPE, per KV head
//   C = the `channels` channels with the largest mean of `list`, ties to the lower channel
//   label cache: the key's channels C in `label_bits` bits, min-max per token                           (side data)
//   score(token) = sum over C of q_c * label_c, per query head; nothing is forced
//
// The fast model calibrates `qk`, the evaluation scripts `q`; these also quantise the query, which is done here
// nowhere: it saves no memory. Channels by default: a quarter of the head.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/four_bit_keys.hpp>

namespace {
using namespace lacuna::sdk;

struct DoubleSparsity : Strategy {
  struct Params {
    Data calibration;
    i32 channels = 0, label_bits = 4;
    std::string list = "qk";
  } params;

  static void schema(Schema<Params>& s) {
    s.field("calibration", &Params::calibration, "mean magnitudes of the channels, from lacuna calibrate")
        .field("channels", &Params::channels, "channels that score; 0: a quarter of them", "0..")
        .field("label_bits", &Params::label_bits, "bits of a label", "1..4")
        .field("list", &Params::list, "what channels are ranked by", "qk|q|k");
  }
  static Info info() {
    Info i{};
    i.name = "double_sparsity";
    i.summary = "tokens ranked by q . k in a few calibrated channels, with 4-bit keys";
    i.paper = "Yang et al. 2024, arXiv 2408.07092";
    i.rule = "C = channels of the largest calibrated magnitude; score = sum over C of q_c label_c";
    i.phases = kDecode;
    i.defaults = R"({"dense_layers": [0, 1]})";
    i.presets = R"({"fast": {}, "evaluation": {"list": "q"}})";
    i.dense_point = R"({"density": 1.0, "dense_layers": []})";
    i.nested = 1;
    i.needs = kNeedsData;
    return i;
  }

  i64 channels(Context& c) const {
    const i32 d = c.layer().head_dim, quarter = d < 4 ? 1 : d / 4;
    return params.channels == 0 ? quarter : params.channels < d ? params.channels : d;
  }
  /// Channel lists, and so labels, of a KV head.
  i64 copies(Context& c) const { return params.list == "k" ? 1 : c.layer().group(); }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::rank;
    p.per_query_head = 1;
    const i64 of_head = copies(c);
    p.sides[p.num_sides++] = {"labels", SidePer::token, 1, Dtype::u8, of_head * ((channels(c) + 1) / 2), 1};
    p.sides[p.num_sides++] = {"range", SidePer::token, 1, Dtype::f32, of_head * 2, 1};
    p.workspace_bytes = c.layer().num_kv_heads * of_head * channels(c) * 4 + 256;
  }

  /// [num_kv_heads * copies, channels], the largest first.
  const i32* chosen(Context& c) const {
    const i64 lists = c.layer().num_kv_heads * copies(c), d = c.layer().head_dim, n = channels(c);
    const Array means = c.data("calibration", params.list.c_str());
    if (!means.data || means.rank != 2 || means.extent[0] != lists || means.extent[1] != d)
      throw Failure("calibration: layer " + std::to_string(c.layer().index) + " has no array '" + params.list +
                    "' of " + std::to_string(lists) + " heads x head_dim");
    const float* mean = static_cast<const float*>(means.data);
    i32* out = c.workspace<i32>(lists * n);
    c.for_each(lists * d, [=] LACUNA_HD(i64 i) {
      const i64 list = i / d, channel = i % d;
      i64 before = 0;
      for (i64 e = 0; e < d; ++e) {
        const float other = mean[list * d + e];
        before += other > mean[i] || (other == mean[i] && e < channel);
      }
      if (before < n) out[list * n + before] = static_cast<i32>(channel);
    });
    return out;
  }

  void index(Context& c, const Dirty& dirty) override {
    const auto labels = c.side<u8>("labels");
    const auto range = c.side<float>("range");
    const Paged kv = c.kv();
    const i32* channel = chosen(c);
    const i64 of_head = copies(c), n = channels(c), units = dirty.max_units, heads = c.layer().num_kv_heads;
    const i32 levels = (1 << params.label_bits) - 1;
    c.for_each(dirty.rows * units * of_head, [=] LACUNA_HD(i64 i) {
      const i64 copy = i % of_head, row = i / of_head / units, slot = dirty.begin[row] + i / of_head % units;
      if (slot >= dirty.end[row]) return;
      const i32* list = channel + (row % heads * of_head + copy) * n;
      encode_four_bits(&labels.at(row, slot, copy * ((n + 1) / 2)), &range.at(row, slot, copy * 2), n, levels,
                       [=](i64 e) { return kv.key(row, slot, list[e]); });
    });
    const double tokens = static_cast<double>(dirty.rows * units * of_head);
    c.charge(tokens * static_cast<double>(size_of(kv.dtype) * n + n / 2 + 8), 5.0 * tokens * static_cast<double>(n));
  }

  void score(Context& c, Scores& s) override {
    const auto labels = c.side<u8>("labels");
    const auto range = c.side<float>("range");
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i32* channel = chosen(c);
    const i32 heads_kv = c.layer().num_kv_heads;
    const i64 of_head = copies(c), n = channels(c), group = c.layer().group(), units = s.units, stride = s.stride;
    float* value = s.value;
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, slot = i % units, kv_row = rows.kv_row(row, heads_kv), head = rows.head_of(row);
      if (slot >= kv.length[kv_row]) return;
      const i64 copy = of_head == 1 ? 0 : head % group;
      const i32* list = channel + (head / group * of_head + copy) * n;
      value[row * stride + slot] =
          dot_four_bits(&labels.at(kv_row, slot, copy * ((n + 1) / 2)), &range.at(kv_row, slot, copy * 2), n,
                        [=](i64 e) { return q.at(rows.seq_of(row), head, 0, list[e]); });
    });
    const double cells = static_cast<double>(rows.count()) * static_cast<double>(units);
    c.charge(cells * static_cast<double>(of_head) / static_cast<double>(group) * static_cast<double>(n / 2 + 8),
             4.0 * cells * static_cast<double>(n));
  }

  void calibrate(Context& c, Calibration& to) override {
    const Paged kv = c.kv();
    const Queries rotated = c.seen_queries(), q = c.unrotated_seen_queries();
    const float* k = c.unrotated_keys();
    const i64 d = kv.head_dim, n = kv.max_length, heads = q.heads, group = c.layer().group(), heads_kv = kv.rows;
    double *qk = to.sums("qk", heads * d), *of_q = to.sums("q", heads * d), *of_k = to.sums("k", heads_kv * d);
    double* tokens = to.sums("tokens", 1);
    c.for_each(heads * d, [=] LACUNA_HD(i64 i) {
      const i64 head = i / d, e = i % d;
      for (i64 t = 0; t < q.count; ++t) {
        qk[i] += fabs(static_cast<double>(rotated.at(0, head, t, e)) *
                      static_cast<double>(kv.key(head / group, q.first_position + t, e)));
        of_q[i] += fabs(static_cast<double>(q.at(0, head, t, e)));
      }
    });
    c.for_each(heads_kv * d, [=] LACUNA_HD(i64 i) {
      for (i64 t = 0; t < n; ++t) of_k[i] += fabs(static_cast<double>(k[(i / d * n + t) * d + i % d]));
    });
    tokens[0] += static_cast<double>(n);
    if (!to.last()) return;
    put_means(to, "qk", qk, heads, d, tokens[0]);
    put_means(to, "q", of_q, heads, d, tokens[0]);
    put_means(to, "k", of_k, heads_kv, d, tokens[0]);
  }

  static void put_means(Calibration& to, const char* name, const double* sums, i64 heads, i64 d, double tokens) {
    std::vector<float> means;
    for (i64 i = 0; i < heads * d; ++i) means.push_back(static_cast<float>(sums[i] / tokens));
    const i64 extent[2] = {heads, d};
    to.put(name, means.data(), 2, extent);
  }
};
}  // namespace

LACUNA_PLUGIN(DoubleSparsity)
