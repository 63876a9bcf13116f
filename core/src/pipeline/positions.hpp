// Rotary positions on host and device from one source: rows before RoPE, and the rotations themselves. Every array is
// memory of the device.
#pragma once

#include "lacuna/device/device.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// A Rope in numbers: radians a token of each channel pair, in memory of the device, and the factor of cos and sin.
struct Rotation {
  const double* frequency;  // [head_dim / 2]
  double scale;
};

/// out [seqs, heads, count, head_dim] fp32: the queries before RoPE.
void unrotate_queries(const Device& device, const Rotation& rotation, const sdk::Queries& q, float* out);
/// out [kv.rows, kv.max_length, head_dim] fp32: the cached keys before RoPE; 0 past a row's length.
void unrotate_keys(const Device& device, const Rotation& rotation, const sdk::Paged& kv, float* out);
/// Keys [num_kv_heads, tokens, head_dim] of one sequence by original position, in memory of the device.
struct StoredKeys {
  const void* data;
  sdk::Dtype dtype;
  sdk::i64 tokens;
};
/// out as unrotate_keys: what `stored` has at the cached tokens' positions.
void gather_keys(const Device& device, const StoredKeys& stored, const sdk::Paged& kv, float* out);
/// out [n, head_dim]: cosines, then sines, at positions begin ..., times the scale.
void write_rotations(const Device& device, const Rotation& rotation, sdk::i64 begin, sdk::i64 n, sdk::i32 head_dim,
                     float* out);

}  // namespace lacuna
