// What a strategy is given in every call: facts about the call, the core's services, and the loops that run on either
// backend. `Services` and `Oracle`-like powers are core-owned tables; `Context` is the strategy's own, inline view of
// them: it turns error codes into exceptions inside the plug-in, so that none crosses the boundary.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

#include "lacuna/sdk/types.hpp"

namespace lacuna::sdk {

/// Thrown inside a plug-in; the generated entry points catch it (and everything else) and hand its text to the core.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Facts of one call. Host memory, valid for the call.
struct Call {
  Layer layer;
  Phase phase;
  Purpose purpose;
  i64 step;  // decode step (or query after the cut), -1 in prefill
  i32 num_seqs;
  Paged kv;  // keys after the sequence's length are poisoned under --check, like later queries
  Gqa gqa;   // how this strategy's scores are shared by a group
  Random random;
  i32 on_device;
  void* stream;  // cudaStream_t, or null on the CPU
  // Since ABI 1.2.
  i64 prompt_tokens;                    // of the sequence; later positions were generated
  i64 question_begin, question_tokens;  // the prompt's question as positions; 0 tokens where none is known
};

/// The fused operations. Every pointer is device memory iff Call::on_device; nothing synchronises; results do not
/// depend on the number of threads. Head-major arrays [heads, stride]. All return 0, or fill Error.
class Ops {
 public:
  /// Softmax of each query over every cached key at or before its position, accumulated over the queries by `reduce`
  /// (mean divides by q.count). columns [seqs * q.heads, stride]: per slot; diagonals likewise per offset
  /// query position - key position, or null. Slots past the visible ones get 0. fp32.
  virtual i32 window_mass(const Queries& q, Reduce reduce, float* columns, float* diagonals, i64 stride,
                          Error*) noexcept = 0;
  /// columns[seqs * num_qo_heads, stride] += sum over queries of exp(logit - lse) over the cells that attention read.
  virtual i32 read_mass(const Attended& attended, float* columns, i64 stride, Error*) noexcept = 0;
  /// out [seqs * num_kv_heads, stride] = reduce over each group's rows of in [seqs * num_qo_heads, stride], first n
  /// columns.
  virtual i32 group_reduce(const float* in, float* out, i64 n, i64 stride, Reduce reduce, Error*) noexcept = 0;
  /// 1-D pooling over positions, stride 1, padding kernel / 2: max pads with -inf, mean counts the zero padding.
  /// Row r has count[r] elements; in and out may not alias.
  virtual i32 pool(const float* in, float* out, i32 rows, const i32* count, i64 stride, i32 kernel, Reduce reduce,
                   Error*) noexcept = 0;
  /// The k[r] largest of the first n[r] values of each row, ties to the lower index, -inf never taken.
  /// out [rows, out_stride] ascending, out_count [rows].
  virtual i32 topk(const float* values, i32 rows, i64 stride, const i32* n, const i32* k, i32* out, i32* out_count,
                   i64 out_stride, Error*) noexcept = 0;
  /// The shortest descending prefix of each row (ties to the lower index) whose sum reaches p times the row's sum, the
  /// crossing element included; at most k[r] elements where k is not null. out ascending.
  virtual i32 topp(const float* values, i32 rows, i64 stride, const i32* n, const i32* k, double p, i32* out,
                   i32* out_count, i64 out_stride, Error*) noexcept = 0;
  /// Mean key of every `block` consecutive slots: out [kv.rows, blocks, head_dim], blocks = ceil(kv.max_length /
  /// block). full_divisor: a partial last block divides by `block` (zero padding counted), else by its tokens.
  virtual i32 mean_keys(i32 block, i32 full_divisor, float* out, Error*) noexcept = 0;
  /// Mean query of every `tile` consecutive queries: out [seqs * q.heads, tiles, head_dim].
  virtual i32 mean_queries(const Queries& q, i32 tile, i32 full_divisor, float* out, Error*) noexcept = 0;
  /// XAttention's estimate (Xu et al. 2025): within strides of `stride` tokens the reversed queries against the keys,
  /// over sqrt(head_dim) * stride, causal softmax over key groups, summed over the groups of a (query tile, key block)
  /// pair and divided by the tile's groups, so that a row sums to at most 1. out.rows per query head, q_tile ==
  /// unit_tokens.
  virtual i32 antidiagonal_mass(const Queries& q, i32 stride, Scores& out, Error*) noexcept = 0;

 protected:
  ~Ops() = default;
};

/// Some of the cached tokens of each KV head, for a wrapper that scores parts of a cache.
struct Subset {
  const i32* count;  // [kv.rows]
  const i32* slots;  // [kv.rows, stride] ascending
  i64 stride;
  i64 now;  // queries at or after this position do not exist yet
};

enum class ArrayKind : i32 { side, state, workspace };
enum class Span : i32 { current, last, seen };

/// Core-owned services; vtable grows only at its end.
class Services {
 public:
  virtual const Call& call() const noexcept = 0;
  virtual Ops& ops() noexcept = 0;
  virtual i32 array(ArrayKind kind, const char* name, i64 bytes, Array* out, Error*) noexcept = 0;
  virtual i32 queries(Span span, i64 n, Queries* out, Error*) noexcept = 0;
  virtual i32 oracle_mass(Scores* out, Error*) noexcept = 0;
  virtual i32 base_scores(Scores* out, Error*) noexcept = 0;
  virtual void charge(double bytes, double flops) noexcept = 0;

  // Since ABI 1.2. A core that cannot serve one says so.
  /// out [n, head_dim]: cosines, then sines, of the head_dim / 2 channel pairs (rotate-half) at positions begin ...
  virtual i32 rotations(i64 /*begin*/, i64 /*n*/, float* /*out*/, Error* e) noexcept {
    return unserved("rotations", e);
  }
  virtual i32 unrotated_queries(Span, i64 /*n*/, Queries*, Error* e) noexcept {
    return unserved("unrotated queries", e);
  }
  virtual i32 unrotated_keys(Array*, Error* e) noexcept { return unserved("unrotated keys", e); }
  virtual i32 output_projection(Array*, Error* e) noexcept { return unserved("the output projection", e); }
  virtual i32 data(const char* /*param*/, const char* /*array*/, i32 /*layer*/, Array*, Error* e) noexcept {
    return unserved("calibration data", e);
  }
  virtual i32 carried(const char* /*name*/, Dtype, i64 /*elements*/, Array*, Error* e) noexcept {
    return unserved("arrays carried from layer to layer", e);
  }
  virtual i32 base_scores_of(const Subset&, Scores*, Error* e) noexcept { return unserved("scores of a subset", e); }

 protected:
  ~Services() = default;

 private:
  static i32 unserved(const char* what, Error* error) noexcept {
    error->code = 1;
    std::snprintf(error->text, sizeof error->text, "%s cannot be had here", what);
    return 1;
  }
};

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr Dtype value = Dtype::f32;
};
template <>
struct dtype_of<i32> {
  static constexpr Dtype value = Dtype::i32;
};
template <>
struct dtype_of<u16> {
  static constexpr Dtype value = Dtype::u16;
};
template <>
struct dtype_of<u8> {
  static constexpr Dtype value = Dtype::u8;
};

/// Side data of one kind, ready for a lambda: element e of unit u of KV row r.
template <class T>
struct SideView {
  T* data;
  i64 row_stride, unit_stride;
  LACUNA_HD T& at(i64 row, i64 unit, i64 e = 0) const { return data[row * row_stride + unit * unit_stride + e]; }
};

class Context {
 public:
  explicit Context(Services& services) : services_(services), call_(services.call()) {}

  const Call& call() const { return call_; }
  const Layer& layer() const { return call_.layer; }
  const Paged& kv() const { return call_.kv; }
  bool prefill() const { return call_.phase == Phase::prefill; }
  Random random() const { return call_.random; }

  /// The queries of this call (prefill: the whole prompt, whatever range of tiles is asked for; decode: one).
  Queries current_queries() { return queries(Span::current, 0); }
  /// The last min(n, seen) queries up to now.
  Queries last_queries(i64 n) { return queries(Span::last, n); }
  /// All queries up to now.
  Queries seen_queries() { return queries(Span::seen, 0); }

  /// This strategy's array beside the KV pages, declared in plan().
  template <class T>
  SideView<T> side(const char* name) {
    const Array a = array(ArrayKind::side, name, 0);
    check_dtype(a, dtype_of<T>::value, name);
    return {static_cast<T*>(a.data), a.stride[0], a.stride[1]};
  }
  /// This strategy's array per (sequence, layer), declared in plan(): [seqs, elements].
  template <class T>
  T* state(const char* name) {
    const Array a = array(ArrayKind::state, name, 0);
    check_dtype(a, dtype_of<T>::value, name);
    return static_cast<T*>(a.data);
  }
  /// n elements, zero-filled, until the end of the call, out of Plan::workspace_bytes (256-byte aligned).
  template <class T>
  T* workspace(i64 n) {
    return static_cast<T*>(array(ArrayKind::workspace, "workspace", n * static_cast<i64>(sizeof(T))).data);
  }

  // The fused operations; see Ops.
  void window_mass(const Queries& q, Reduce r, float* columns, float* diagonals, i64 stride) {
    run([&](Error* e) { return ops().window_mass(q, r, columns, diagonals, stride, e); });
  }
  void read_mass(const Attended& a, float* columns, i64 stride) {
    run([&](Error* e) { return ops().read_mass(a, columns, stride, e); });
  }
  void group_reduce(const float* in, float* out, i64 n, i64 stride, Reduce r) {
    run([&](Error* e) { return ops().group_reduce(in, out, n, stride, r, e); });
  }
  void pool(const float* in, float* out, i32 rows, const i32* count, i64 stride, i32 kernel, Reduce r) {
    run([&](Error* e) { return ops().pool(in, out, rows, count, stride, kernel, r, e); });
  }
  void topk(const float* v, i32 rows, i64 stride, const i32* n, const i32* k, i32* out, i32* count, i64 out_stride) {
    run([&](Error* e) { return ops().topk(v, rows, stride, n, k, out, count, out_stride, e); });
  }
  void topp(const float* v, i32 rows, i64 stride, const i32* n, const i32* k, double p, i32* out, i32* count,
            i64 out_stride) {
    run([&](Error* e) { return ops().topp(v, rows, stride, n, k, p, out, count, out_stride, e); });
  }
  void mean_keys(i32 block, bool full_divisor, float* out) {
    run([&](Error* e) { return ops().mean_keys(block, full_divisor, out, e); });
  }
  void mean_queries(const Queries& q, i32 tile, bool full_divisor, float* out) {
    run([&](Error* e) { return ops().mean_queries(q, tile, full_divisor, out, e); });
  }
  void antidiagonal_mass(const Queries& q, i32 stride, Scores& out) {
    run([&](Error* e) { return ops().antidiagonal_mass(q, stride, out, e); });
  }

  /// True softmax mass of every unit, summed over the row's queries (eviction: over the queries still to come). Only
  /// for strategies that declare `clairvoyant`.
  void oracle_mass(Scores& out) {
    run([&](Error* e) { return services_.oracle_mass(&out, e); });
  }
  /// Wrappers: the base's own scores into `out` (rows and unit as the base's plan). In eviction they come as they would
  /// be ranked: reduced over the group, with the tokens that the base forces at +inf; a base that chooses explicitly
  /// gives 0 to what it would keep of out.budget_tokens, -inf to the rest.
  void base_scores(Scores& out) {
    run([&](Error* e) { return services_.base_scores(&out, e); });
  }
  /// Eviction wrappers: the scores that the base gives to the tokens of a subset when nothing else is cached, at their
  /// slots; -inf elsewhere. Waits for the device.
  void base_scores_of(const Subset& subset, Scores& out) {
    run([&](Error* e) { return services_.base_scores_of(subset, &out, e); });
  }

  /// Queries as they were before RoPE, fp32, good until the call ends; see last_queries() and seen_queries().
  Queries unrotated_last_queries(i64 n) { return unrotated_queries(Span::last, n); }
  Queries unrotated_seen_queries() { return unrotated_queries(Span::seen, 0); }
  /// Keys as they were before RoPE: fp32 [kv.rows, kv.max_length, head_dim] by slot, good until the call ends.
  const float* unrotated_keys() {
    Array out{};
    run([&](Error* e) { return services_.unrotated_keys(&out, e); });
    return static_cast<const float*>(out.data);
  }
  /// Cosines, then sines, of RoPE at positions [begin, begin + n), scaled as the model scales them: out [n, head_dim];
  /// pair c turns channels c and c + head_dim / 2.
  void rotations(i64 begin, i64 n, float* out) {
    run([&](Error* e) { return services_.rotations(begin, n, out, e); });
  }
  /// W_O [d_model, num_qo_heads * head_dim]; data is null where the trace has none (declare kNeedsProjection).
  Array output_projection() {
    Array out{};
    run([&](Error* e) { return services_.output_projection(&out, e); });
    return out;
  }
  /// An array of the parameter's calibration file, of this layer or another one (fp32, device memory iff the call runs
  /// there); data is null where the file has none.
  Array data(const char* param, const char* array) { return data(param, array, layer().index); }
  Array data(const char* param, const char* array, i32 of_layer) {
    Array out{};
    run([&](Error* e) { return services_.data(param, array, of_layer, &out, e); });
    return out;
  }
  /// An array that goes from layer to layer: one per (sequence, phase, step, name), zero-filled when first asked for.
  /// What a layer writes the next ones read. Declare kNeedsAllLayers.
  template <class T>
  T* carried(const char* name, i64 elements) {
    Array out{};
    run([&](Error* e) { return services_.carried(name, dtype_of<T>::value, elements, &out, e); });
    return static_cast<T*>(out.data);
  }
  /// Work of loops over the arrays below (the fused operations charge themselves).
  void charge(double bytes, double flops) { services_.charge(bytes, flops); }

  /// f(i) for i in [0, n): OpenMP threads on the CPU, the call's stream on a device. f is a `[=] LACUNA_HD (i64 i)`
  /// lambda that writes to places that no other i touches, so the result is the same on any number of threads.
  template <class F>
  void for_each(i64 n, F f);

 private:
  Ops& ops() { return services_.ops(); }
  Array array(ArrayKind kind, const char* name, i64 bytes) {
    Array out{};
    run([&](Error* e) { return services_.array(kind, name, bytes, &out, e); });
    return out;
  }
  Queries queries(Span span, i64 n) {
    Queries out{};
    run([&](Error* e) { return services_.queries(span, n, &out, e); });
    return out;
  }
  Queries unrotated_queries(Span span, i64 n) {
    Queries out{};
    run([&](Error* e) { return services_.unrotated_queries(span, n, &out, e); });
    return out;
  }
  static void check_dtype(const Array& a, Dtype expected, const char* name) {
    if (a.dtype != expected)
      throw Failure(std::string("array '") + name + "' has another element type than it is read as");
  }
  template <class F>
  static void run(F f) {
    Error error{};
    if (f(&error) != 0) throw Failure(error.text);
  }

  Services& services_;
  const Call& call_;
};

namespace detail {
#if defined(__CUDACC__)
template <class F>
__global__ void for_each_kernel(i64 n, F f) {
  for (i64 i = blockIdx.x * static_cast<i64>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<i64>(gridDim.x) * blockDim.x)
    f(i);
}
#endif

/// f(i) for i in [0, n) by OpenMP threads or, where nvcc compiles this, on the stream. Throws Failure.
template <class F>
void for_each(bool on_device, [[maybe_unused]] void* stream, i64 n, F f) {
  if (n <= 0) return;
  if (on_device) {
#if defined(__CUDACC__)
    constexpr i64 kThreads = 128, kMaxBlocks = 1 << 16;
    const i64 blocks = (n + kThreads - 1) / kThreads;
    for_each_kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0,
                      static_cast<cudaStream_t>(stream)>>>(n, f);
    if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess) throw Failure(cudaGetErrorString(e));
    return;
#else
    throw Failure("this code was compiled without CUDA and cannot run on a GPU");
#endif
  }
  [[maybe_unused]] constexpr i64 kWorthThreads = 1024;  // nvcc does not count its use in the pragma
#pragma omp parallel for schedule(static) if (n >= kWorthThreads)
  for (i64 i = 0; i < n; ++i) f(i);
}
}  // namespace detail

template <class F>
void Context::for_each(i64 n, F f) {
  detail::for_each(call_.on_device != 0, call_.stream, n, f);
}

}  // namespace lacuna::sdk
