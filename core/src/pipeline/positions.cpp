#include "pipeline/positions.hpp"

#include "lacuna/device/parallel.hpp"
#include "lacuna/pipeline/budget.hpp"

namespace lacuna {
using namespace sdk;

namespace {
/// Channels (x, y) of a pair, turned back from `position`.
LACUNA_HD void turn_back(const Rotation& r, i64 pair, i64 position, float x, float y, float* to_x, float* to_y) {
  const double angle = -static_cast<double>(position) * r.frequency[pair];
  const double c = cos(angle) / r.scale, s = sin(angle) / r.scale;
  *to_x = static_cast<float>(product(x, c) - product(y, s));
  *to_y = static_cast<float>(product(y, c) + product(x, s));
}
}  // namespace

void unrotate_queries(const Device& device, const Rotation& rotation, const Queries& q, float* out) {
  const Rotation r = rotation;
  const Queries from = q;
  const i64 half = q.head_dim / 2;
  for_each(device, static_cast<i64>(q.seqs) * q.heads * q.count * half, [=] LACUNA_HD(i64 i) {
    const i64 pair = i % half, row = i / half, at = row % from.count, head = row / from.count % from.heads,
              seq = row / from.count / from.heads;
    float* to = out + row * from.head_dim;
    turn_back(r, pair, from.first_position + at, from.at(seq, head, at, pair), from.at(seq, head, at, pair + half),
              to + pair, to + pair + half);
  });
}

void unrotate_keys(const Device& device, const Rotation& rotation, const Paged& kv, float* out) {
  const Rotation r = rotation;
  const Paged from = kv;
  const i64 half = kv.head_dim / 2, slots = kv.max_length;
  for_each(device, kv.rows * slots * half, [=] LACUNA_HD(i64 i) {
    const i64 pair = i % half, row = i / half / slots, slot = i / half % slots;
    float* to = out + i / half * from.head_dim;
    if (slot >= from.length[row]) {
      to[pair] = to[pair + half] = 0.f;
      return;
    }
    turn_back(r, pair, from.position_of(row, slot), from.key(row, slot, pair), from.key(row, slot, pair + half),
              to + pair, to + pair + half);
  });
}

void gather_keys(const Device& device, const StoredKeys& stored, const Paged& kv, float* out) {
  const StoredKeys s = stored;
  const Paged to = kv;
  const i64 d = kv.head_dim, slots = kv.max_length;
  for_each(device, kv.rows * slots * d, [=] LACUNA_HD(i64 i) {
    const i64 row = i / d / slots, slot = i / d % slots;
    out[i] =
        slot < to.length[row] ? load(s.data, s.dtype, (row * s.tokens + to.position_of(row, slot)) * d + i % d) : 0.f;
  });
}

void write_rotations(const Device& device, const Rotation& rotation, i64 begin, i64 n, i32 head_dim, float* out) {
  const Rotation r = rotation;
  const i64 half = head_dim / 2, d = head_dim;
  for_each(device, n * half, [=] LACUNA_HD(i64 i) {
    const i64 pair = i % half, row = i / half;
    const double angle = static_cast<double>(begin + row) * r.frequency[pair];
    out[row * d + pair] = static_cast<float>(cos(angle) * r.scale);
    out[row * d + half + pair] = static_cast<float>(sin(angle) * r.scale);
  });
}

}  // namespace lacuna
