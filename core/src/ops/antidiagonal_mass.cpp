// XAttention's estimate (Xu et al. 2025, "XAttention: block sparse attention with antidiagonal scoring", arXiv
// 2503.16428). A group of `stride` queries, reversed, against a group of keys is one product of vectors stride *
// head_dim long; it is summed residue by residue, so that each residue's keys come from the pages like any block. fp64:
// blocks are ranked by small differences, and the work is 1 / stride of attention's.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "guarded.hpp"
#include "lacuna/ops/cpu_ops.hpp"
#include "visible.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

constexpr int kGroups = 64;  // key groups at a time

struct Estimate {
  const sdk::Paged& kv;
  const sdk::Queries& q;
  i64 stride, groups_per_tile, first_group;  // first_group: group of query 0
  i32 heads;                                 // of a KV head
  int depth;
};

// One query tile of the heads of a KV head: lane h * groups_per_tile + i is group i of head h.
struct GroupTile {
  i64 seq, head_begin, kv_row, query_begin, groups, key_groups;
  int lanes;
};

// queries [stride][depth][lanes]: residue r holds q[i * stride + stride - 1 - r] / (sqrt(d) * stride), zeros after the
// end.
void load_groups(const Estimate& e, const GroupTile& t, simd::Aligned<double>& out) {
  out.assign(static_cast<std::size_t>(e.stride * e.depth * t.lanes), 0.);
  const double scale = 1. / (std::sqrt(static_cast<double>(e.q.head_dim)) * static_cast<double>(e.stride));
  std::vector<float> row(static_cast<std::size_t>(e.q.head_dim));
  for (i64 h = 0; h < e.heads; ++h)
    for (i64 n = 0; n < t.groups * e.stride; ++n) {
      const i64 query = t.query_begin + n, residue = e.stride - 1 - n % e.stride,
                lane = h * e.groups_per_tile + n / e.stride;
      if (query >= e.q.count) break;
      convert_row(e.q.data, e.q.dtype,
                  t.seq * e.q.seq_stride + (t.head_begin + h) * e.q.head_stride + query * e.q.row_stride, e.q.head_dim,
                  row.data());
      for (i64 c = 0; c < e.q.head_dim; ++c)
        out[static_cast<std::size_t>((residue * e.depth + c) * t.lanes + lane)] =
            scale * row[static_cast<std::size_t>(c)];
    }
}

// logits [key_groups rounded up to kGroups][lanes]
void group_logits(const Estimate& e, const GroupTile& t, const simd::Aligned<double>& queries,
                  simd::Aligned<double>& logits) {
  simd::Aligned<float> k(static_cast<std::size_t>(kGroups * e.depth));
  simd::Aligned<double> wide(k.size()), ones(static_cast<std::size_t>(t.lanes), 1.);
  logits.resize(static_cast<std::size_t>(round_up<i64>(t.key_groups, kGroups) * t.lanes));
  for (i64 begin = 0; begin < t.key_groups; begin += kGroups)
    for (i64 r = 0; r < e.stride; ++r) {
      i64 element[kGroups];
      int n = 0;
      for (; n < kGroups && (begin + n) * e.stride + r < e.kv.length[t.kv_row]; ++n)
        element[n] = e.kv.physical(t.kv_row, (begin + n) * e.stride + r) * e.kv.head_dim;
      convert_rows(e.kv.k, e.kv.dtype, element, n, e.kv.head_dim, k.data(), e.depth);
      std::copy(k.begin(), k.begin() + n * e.depth, wide.begin());
      std::fill(wide.begin() + n * e.depth, wide.end(), 0.);
      multiply<double>(wide.data(), e.depth, 1, kGroups, e.depth, queries.data() + r * e.depth * t.lanes, t.lanes,
                       logits.data() + begin * t.lanes, r == 0 ? nullptr : ones.data());
    }
}

// Adds a lane's causal softmax over the key groups to its head's blocks.
void add_softmax(const Estimate& e, const GroupTile& t, const simd::Aligned<double>& logits, i64 lane, i64 last_group,
                 double* blocks) {
  double top = logits[static_cast<std::size_t>(lane)], sum = 0;
  for (i64 j = 0; j <= last_group; ++j) top = std::max(top, logits[static_cast<std::size_t>(j * t.lanes + lane)]);
  for (i64 j = 0; j <= last_group; ++j) sum += std::exp(logits[static_cast<std::size_t>(j * t.lanes + lane)] - top);
  for (i64 j = 0; j <= last_group; ++j)
    blocks[j / e.groups_per_tile] += std::exp(logits[static_cast<std::size_t>(j * t.lanes + lane)] - top) / sum;
}

void check(const sdk::Scores& out, const sdk::Queries& q, const sdk::Layer& layer, i32 stride) {
  const auto refuse = [](const char* what, const char* expected, std::string found) {
    throw Error({what, expected, std::move(found), "antidiagonal_mass", ""});
  };
  if (!out.rows.per_query_head || out.rows.heads != layer.num_qo_heads)
    refuse("rows are not those of the query heads", "per_query_head = 1", fmt::format("{} heads", out.rows.heads));
  if (stride < 1 || out.unit_tokens != out.rows.q_tile || out.unit_tokens % stride != 0)
    refuse("tile, unit and stride do not fit", "q_tile = unit_tokens, a multiple of the stride",
           fmt::format("q_tile {}, unit_tokens {}, stride {}", out.rows.q_tile, out.unit_tokens, stride));
  if (q.first_position % stride != 0)
    refuse("the queries begin inside a group", "first_position a multiple of the stride",
           fmt::format("{}", q.first_position));
}

}  // namespace

i32 CpuOps::antidiagonal_mass(const sdk::Queries& q, i32 stride, sdk::Scores& out, sdk::Error* error) noexcept {
  return guarded(error, [&] {
    check(out, q, call_.layer, stride);
    const sdk::Rows& rows = out.rows;
    const sdk::Paged& kv = call_.kv;
    const Estimate e{kv,
                     q,
                     stride,
                     rows.q_tile / stride,
                     q.first_position / stride,
                     call_.layer.group(),
                     round_up(q.head_dim, kRowStep)};
    double cells = 0;
#pragma omp parallel reduction(+ : cells)
    {
      simd::Aligned<double> queries, logits;
      std::vector<double> blocks;
#pragma omp for schedule(dynamic) collapse(2)
      for (i64 kv_row = 0; kv_row < kv.rows; ++kv_row)
        for (i32 tile = rows.tiles - 1; tile >= 0; --tile) {
          GroupTile t{};
          t.seq = kv_row / call_.layer.num_kv_heads;
          t.head_begin = kv_row % call_.layer.num_kv_heads * e.heads;
          t.kv_row = kv_row;
          t.query_begin = static_cast<i64>(rows.tile_begin + tile) * rows.q_tile;
          t.groups = (std::min<i64>(q.count - t.query_begin, rows.q_tile) + stride - 1) / stride;
          const i64 tile_group = e.first_group + t.query_begin / stride;
          t.key_groups = std::min<i64>(tile_group + t.groups, (kv.length[kv_row] + stride - 1) / stride);
          t.lanes = static_cast<int>(round_up<i64>(e.heads * e.groups_per_tile, kLaneStep));
          if (t.key_groups <= 0) continue;
          load_groups(e, t, queries);
          group_logits(e, t, queries, logits);
          cells += static_cast<double>(t.key_groups * t.groups * e.heads);
          const i64 units = (t.key_groups + e.groups_per_tile - 1) / e.groups_per_tile;
          for (i64 h = 0; h < e.heads; ++h) {
            blocks.assign(static_cast<std::size_t>(units), 0.);
            for (i64 i = 0; i < t.groups; ++i)
              add_softmax(e, t, logits, h * e.groups_per_tile + i, std::min(tile_group + i, t.key_groups - 1),
                          blocks.data());
            const i64 row = (t.seq * rows.heads + t.head_begin + h) * rows.tiles + tile;
            for (i64 u = 0; u < std::min<i64>(units, out.units); ++u)
              out.value[row * out.stride + u] =
                  static_cast<float>(blocks[static_cast<std::size_t>(u)] / static_cast<double>(t.groups));
          }
        }
    }
    cost_.flops += 2. * cells * stride * q.head_dim;
    cost_.bytes += key_bytes(kv) + query_bytes(q) + 4. * static_cast<double>(rows.count() * out.units);
  });
}

}  // namespace lacuna
