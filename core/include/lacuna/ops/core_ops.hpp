// The operations of one backend as the core sees them: what strategies may ask for, and what the core needs besides.
#pragma once

#include <cstddef>
#include <memory>

#include "lacuna/sdk/context.hpp"

namespace lacuna {

/// Work of a call: bytes read and written, and FLOPs.
struct Cost {
  double bytes = 0, flops = 0;
};

/// As sdk::Ops: every pointer is device memory iff Call::on_device, and nothing synchronises. These throw Error.
class CoreOps : public sdk::Ops {
 public:
  virtual ~CoreOps() = default;

  /// True softmax mass of every unit of out.rows, summed over each row's queries (and, for KV-head rows, over the
  /// group's heads); what the clairvoyant strategies see. out.rows: ranges of q's tiles. Units that no query of the row
  /// sees are left as they are.
  virtual void unit_mass(const sdk::Queries& q, sdk::Scores& out) = 0;

  /// Shortest descending prefix of each row (first n[r] values, ties to the lower index, -inf and NaN never taken)
  /// whose fp64 sum reaches target[r]; nothing where target[r] <= 0, everything above -inf where it is never reached.
  /// out [rows, out_stride] ascending, out_count [rows]. topp with a target in place of a share: the two take the same
  /// elements for target[r] = p times the row's sum, but for sums that differ from it by less than rounding.
  virtual void top_mass(const float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n, const double* target,
                        sdk::i32* out, sdk::i32* out_count, sdk::i64 out_stride) = 0;

  /// Replaces each row's finite values among the first n[r] by 1 - rank / n[r] (rank 0: the best; ties to the lower
  /// index); -inf, NaN and +inf (which has a rank) stay, as does what lies past n[r]. For allocators that compare heads
  /// whose scores are not comparable.
  virtual void rank_normalise(float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n) = 0;
};

/// The operations of the call's backend. `call` and `cost` must outlive them; the workspace is device memory, 256-byte
/// aligned (on the CPU it is not used). Throws Error where call.on_device and the build has no CUDA.
std::unique_ptr<CoreOps> make_ops(const sdk::Call& call, Cost& cost, void* workspace, std::size_t bytes);

/// Workspace that suffices for every operation on `seqs` sequences of at most `max_tokens` tokens, cached or evicted
/// (positions count), with at most `max_queries` queries a call; 0 on the CPU. Throws as make_ops.
std::size_t ops_workspace_bytes(bool on_device, const sdk::Layer& layer, sdk::i32 seqs, sdk::i64 max_tokens,
                                sdk::i64 max_queries);

}  // namespace lacuna
