// The loops over rows of a selection, on host and device from one source. Every array is memory of the device.
#pragma once

#include "lacuna/device/device.hpp"
#include "lacuna/sdk/types.hpp"
#include "pipeline/row_math.hpp"

namespace lacuna {

/// Targets before allocation; every row ranked.
void set_targets(const Device& device, const sdk::i32* length, const RankRule& rule, const sdk::Budget& budget);

/// Pairs as they were, and as an allocator left them: rows that it changed get tokens = pairs / queries.
void follow_pairs(const Device& device, const sdk::i32* length, sdk::i32 num_kv_heads, const sdk::i64* before,
                  const sdk::Budget& budget);

/// What the ranking operations are called with, [rows] each.
struct RankCounts {
  sdk::i32 *units, *wanted;  // candidates' range, and how many are taken
  sdk::i32* floor;           // 1: what must be read exceeds the target
  double* mass;              // with top_p: mass that ranked units must reach beside the forced ones; else null
};

/// Fills `counts`. value [rows, stride] before mask_settled; partial: [rows, mass_partials(stride)] with top_p.
void count_rows(const Device& device, const sdk::i32* length, const RankRule& rule, const sdk::Budget& budget,
                const float* value, sdk::i64 stride, double* partial, const RankCounts& counts);
sdk::i64 mass_partials(sdk::i64 stride);

/// -inf for units that are forced or that the exact part holds: they do not compete.
void mask_settled(const Device& device, const sdk::i32* length, const RankRule& rule, const sdk::Rows& rows,
                  float* value, sdk::i64 stride);

/// Completes a selection whose lists hold, from place rule.first_units on, count[row] ranked units in ascending order:
/// forced units around them, pieces' slots for units, exact parts, full rows.
void write_rows(const Device& device, const sdk::i32* length, const RankRule& rule, const sdk::Budget& budget,
                const sdk::i32* count, const sdk::Selection& selection);

/// exact_sinks and exact_window at least these.
void widen_exact(const Device& device, const sdk::Selection& selection, sdk::i32 sinks, sdk::i32 recent);

/// member [out.rows, stride] (all -inf before): 1 for every slot that the lists of a group's query-head rows name.
/// `tokens`: the token lists, else the pieces.
void mark_members(const Device& device, const sdk::Selection& in, const sdk::Selection& out, bool tokens, float* member,
                  sdk::i64 stride);

/// exact_sinks, exact_window and full of the groups.
void unite_facts(const Device& device, const sdk::Selection& in, const sdk::Selection& out);

void fill_rows(const Device& device, sdk::i32* values, sdk::i32 value, sdk::i64 n);
void fill_floats(const Device& device, float* values, float value, sdk::i64 n);

/// Lists [from.rows, stride] of what `from` reads (entries may carry a sign bit; count -1: every visible slot) become
/// token lists of query-head rows.
void spread_lists(const Device& device, const sdk::i32* length, const sdk::Rows& from, const sdk::i32* slot,
                  const float* weight, const sdk::i32* count, sdk::i64 stride, sdk::i32 num_kv_heads,
                  const sdk::Selection& to);

/// count[r] = units of a row that its last query sees, in part or whole.
void row_units(const Device& device, const sdk::i32* length, const sdk::Rows& rows, const RankRule& rule,
               sdk::i32* count);

/// +inf for the first `sinks` and last `recent` slots of each row: what is taken first.
void lift_ends(const Device& device, const sdk::i32* length, const sdk::Rows& rows, sdk::i32 num_kv_heads,
               sdk::i32 sinks, sdk::i32 recent, float* value, sdk::i64 stride);

/// Entry i < count[r] of row r goes to the place slots[r, i] of `out`; the other places stay. in, slots, out
/// [rows, (their stride)].
void scatter_floats(const Device& device, sdk::i64 rows, const sdk::i32* count, const float* in, sdk::i64 in_stride,
                    const sdk::i32* slots, sdk::i64 slots_stride, float* out, sdk::i64 out_stride);

/// Fills `k` and `v` with what the cache holds; places beyond a row's tokens stay.
void unpack_cache(const Device& device, const sdk::Paged& kv, const sdk::Rewrite& rewrite);
/// Zero in the channels that are dropped, and bad[row, slots] = 1 for each kept place whose key or value is not finite.
void settle_rewrite(const Device& device, const sdk::Rewrite& rewrite, sdk::u8* bad);

/// end[r] = units of KV row r, ceil(length / unit_tokens).
void count_units(const Device& device, const sdk::i32* length, sdk::i32 rows, sdk::i32 unit_tokens, sdk::i32* end);

}  // namespace lacuna
