// Attention in fp64, as its definition reads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "lacuna/attention/attention.hpp"
#include "shapes.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

// Keys or values of a KV row as [length, head_dim] doubles.
std::vector<double> as_doubles(const sdk::Paged& kv, i64 row, const void* data) {
  std::vector<double> out;
  out.reserve(static_cast<std::size_t>(kv.length[row]) * kv.head_dim);
  for (i64 s = 0; s < kv.length[row]; ++s)
    for (i64 c = 0; c < kv.head_dim; ++c)
      out.push_back(sdk::load(data, kv.dtype, kv.physical(row, s) * kv.head_dim + c));
  return out;
}

}  // namespace

void attend_fp64(const Attention& a, double* out, double* lse, double* pv_norm) {
  check_shapes(a);
  const i64 d = a.layer.head_dim;
  const double scale = a.layer.softmax_scale;
  for (i64 kv_row = 0; kv_row < a.kv.rows; ++kv_row) {
    const std::vector<double> k = as_doubles(a.kv, kv_row, a.kv.k), v = as_doubles(a.kv, kv_row, a.kv.v);
    for (const Reader& reader : split_queries(a, 1)) {
      const TileQueries& tile = reader.queries;
      if (tile.kv_row != kv_row) continue;
      const i64 first = slot_of_query(a, kv_row, tile.begin);
      RowSet set;
      if (reader.row >= 0) set = expand_row(*a.read, reader.row, first + tile.count());
      const bool weighted = !a.ignore_weights && !set.log_weight.empty();

#pragma omp parallel for schedule(dynamic)
      for (i64 n = 0; n < tile.heads * tile.count(); ++n) {
        const i64 head = tile.head_begin + n / tile.count(), i = tile.begin + n % tile.count();
        const i64 slot = slot_of_query(a, kv_row, i);
        std::vector<double> q(static_cast<std::size_t>(d));
        for (i64 c = 0; c < d; ++c) q[static_cast<std::size_t>(c)] = a.q.at(tile.seq, head, i, c);

        std::vector<i64> cells;
        std::vector<double> logits;
        for (i64 j = 0; j <= slot; ++j) {
          double weight = 0;
          if (reader.row < 0) {
            if (a.layer.sliding_window > 0 &&
                a.kv.position_of(kv_row, slot) - a.kv.position_of(kv_row, j) >= a.layer.sliding_window)
              continue;
          } else {
            const auto member = std::lower_bound(set.slots.begin(), set.slots.end(), j);
            const bool listed = member != set.slots.end() && *member == j;
            if (!listed && j >= set.exact_sinks && slot - j >= set.exact_window) continue;
            if (listed && weighted) weight = set.log_weight[static_cast<std::size_t>(member - set.slots.begin())];
          }
          double dot = 0;
          for (i64 c = 0; c < d; ++c) dot += q[static_cast<std::size_t>(c)] * k[static_cast<std::size_t>(j * d + c)];
          cells.push_back(j);
          logits.push_back(scale * dot + weight);
        }

        const i64 at = (tile.seq * a.layer.num_qo_heads + head) * a.q.count + i;
        std::fill(out + at * d, out + (at + 1) * d, 0.);
        lse[at] = -std::numeric_limits<double>::infinity();
        if (pv_norm) pv_norm[at] = 0;
        if (cells.empty()) continue;
        const double top = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (const double x : logits) sum += std::exp(x - top);
        lse[at] = top + std::log(sum);
        for (std::size_t n_cell = 0; n_cell < cells.size(); ++n_cell) {
          const double p = std::exp(logits[n_cell] - top) / sum;
          const double* value = v.data() + cells[n_cell] * d;
          double norm = 0;
          for (i64 c = 0; c < d; ++c) {
            out[at * d + c] += p * value[c];
            norm += value[c] * value[c];
          }
          if (pv_norm) pv_norm[at] += p * std::sqrt(norm);
        }
      }
    }
  }
}

}  // namespace lacuna
