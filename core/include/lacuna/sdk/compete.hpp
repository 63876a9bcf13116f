// For allocators: the heads of a layer compete for its units in one ranking.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// The units of a row that are taken before all others: sinks, recent tokens, and scores of +inf.
struct ForcedUnits {
  i64 unit, sinks, recent;  // tokens

  LACUNA_HD bool hold(i64 u, i64 length, float value) const {
    return value == INFINITY || u * unit < sinks || (recent > 0 && (u + 1) * unit > length - recent);
  }
};

/// The best wanted[seq] of `ranked` [rows, units] over all heads of a sequence, ties to the lower head, then to the
/// lower unit: taken[row] grows by those of its row. `list` is scratch, [rows, units]; workspace: two arrays of i32
/// [seqs].
inline void compete(Context& c, const Rows& rows, const float* ranked, i64 units, const i32* wanted, i32* list,
                    i32* taken) {
  const i64 heads = rows.heads, all = heads * units;
  i32* pool = c.workspace<i32>(rows.seqs);  // one ranking per sequence, head after head
  i32* chosen = c.workspace<i32>(rows.seqs);
  c.for_each(rows.seqs, [=] LACUNA_HD(i64 seq) { pool[seq] = static_cast<i32>(all); });
  c.topk(ranked, rows.seqs, all, pool, wanted, list, chosen, all);
  c.for_each(rows.seqs, [=] LACUNA_HD(i64 seq) {
    for (i64 i = 0; i < chosen[seq]; ++i) ++taken[seq * heads + list[seq * all + i] / units];
  });
}

}  // namespace lacuna::sdk
