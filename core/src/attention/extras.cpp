#include "lacuna/attention/extras.hpp"

#include "lacuna/device/parallel.hpp"

namespace lacuna {
using namespace sdk;

i64 extras_workspace(const Attention& a) {
  return a.read->extra_capacity * static_cast<i64>(a.q.seqs) * a.q.heads * a.q.count;
}

void attend_extras(const Device& device, const Attention& a, float* workspace, float* out, float* lse) {
  const Selection read = *a.read;
  const Rows rows = read.rows;
  const Queries q = a.q;
  const float scale = a.layer.softmax_scale;
  const i64 room = read.extra_capacity, d = q.head_dim, heads_per_row = rows.per_query_head ? 1 : a.layer.group();
  const i64 n = static_cast<i64>(q.seqs) * q.heads * q.count;
  // The row of query (sequence, head, i), or -1 where its tile is not of this range.
  const auto row_of = [=] LACUNA_HD(i64 query) -> i64 {
    const i64 i = query % q.count, head = query / q.count % q.heads, seq = query / q.count / q.heads;
    const i64 tile = i / rows.q_tile - rows.tile_begin;
    if (tile < 0 || tile >= rows.tiles) return -1;
    return (seq * rows.heads + head / heads_per_row) * rows.tiles + tile;
  };
  // A strategy that counts beyond its room must not lead out of it.
  const auto count_of = [=] LACUNA_HD(i64 row) -> i64 {
    return read.extra_count[row] < room ? read.extra_count[row] : room;
  };
  for_each(device, n * room, [=] LACUNA_HD(i64 e) {
    const i64 query = e / room, extra = e % room, row = row_of(query);
    if (row < 0 || extra >= count_of(row)) return;
    const i64 i = query % q.count, head = query / q.count % q.heads, seq = query / q.count / q.heads;
    const float* key = read.extra_k + (row * room + extra) * d;
    float dot = 0.f;
    for (i64 c = 0; c < d; ++c) dot += q.at(seq, head, i, c) * key[c];
    workspace[e] = dot * scale + read.extra_log_weight[row * room + extra];
  });
  for_each(device, n * d, [=] LACUNA_HD(i64 e) {
    const i64 query = e / d, c = e % d, row = row_of(query);
    if (row < 0 || count_of(row) == 0) return;
    const float* logit = workspace + query * room;
    const i64 count = count_of(row);
    const float old = lse[query];
    float most = old;
    for (i64 x = 0; x < count; ++x) most = logit[x] > most ? logit[x] : most;
    double total = exp(static_cast<double>(old) - static_cast<double>(most));
    double sum = total * static_cast<double>(out[e]);
    for (i64 x = 0; x < count; ++x) {
      const double p = exp(static_cast<double>(logit[x]) - static_cast<double>(most));
      total += p;
      sum += p * static_cast<double>(read.extra_v[(row * room + x) * d + c]);
    }
    out[e] = static_cast<float>(sum / total);
  });
  for_each(device, n, [=] LACUNA_HD(i64 query) {
    const i64 row = row_of(query);
    if (row < 0 || count_of(row) == 0) return;
    const float* logit = workspace + query * room;
    const i64 count = count_of(row);
    float most = lse[query];
    for (i64 x = 0; x < count; ++x) most = logit[x] > most ? logit[x] : most;
    double total = exp(static_cast<double>(lse[query]) - static_cast<double>(most));
    for (i64 x = 0; x < count; ++x) total += exp(static_cast<double>(logit[x]) - static_cast<double>(most));
    lse[query] = static_cast<float>(static_cast<double>(most) + log(total));
  });
}

}  // namespace lacuna
