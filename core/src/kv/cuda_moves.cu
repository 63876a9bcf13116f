// Data movement of the cache on a GPU, in vectors of up to 16 bytes where a row allows it. On an H100, for 128K tokens
// x 8 heads x 128 channels in bf16: append 0.38 ms, as fast as a copy (2.8 TB/s); keeping a tenth in place 0.18 ms (0.6
// TB/s: a block a slice, in order); rotating every key 0.67 ms (0.8 TB/s, angles in fp64).

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "lacuna/base/error.hpp"
#include "moves.hpp"

namespace lacuna {
namespace {

using sdk::Dtype, sdk::i32, sdk::i64, sdk::u16, sdk::u32, sdk::u8;

constexpr int kThreads = 256;

template <Dtype kType>
struct ElementOf {
  using type = u16;
};
template <>
struct ElementOf<Dtype::f32> {
  using type = float;
};
template <Dtype kType>
using Element = typename ElementOf<kType>::type;

template <Dtype kType>
__device__ float widen(Element<kType> x) {
  if constexpr (kType == Dtype::f32) return x;
  if constexpr (kType == Dtype::bf16) return sdk::from_bf16(x);
  if constexpr (kType == Dtype::f16) return sdk::from_f16(x);
}

template <Dtype kType>
__device__ Element<kType> narrow(float x) {
  if constexpr (kType == Dtype::f32) return x;
  if constexpr (kType == Dtype::bf16) return sdk::to_bf16(x);
  if constexpr (kType == Dtype::f16) return sdk::to_f16(x);
}

/// kWidth consecutive channels, read and written by 16 bytes where there are as many.
template <Dtype kType, int kWidth>
struct alignas(std::min<std::size_t>(16, kWidth * sizeof(Element<kType>))) Channels {
  Element<kType> x[kWidth];
};

template <Dtype kFrom, Dtype kTo, int kWidth>
__device__ void convert(void* to, i64 at, const void* from, i64 index) {
  const auto in = *reinterpret_cast<const Channels<kFrom, kWidth>*>(static_cast<const Element<kFrom>*>(from) + index);
  auto& out = *reinterpret_cast<Channels<kTo, kWidth>*>(static_cast<Element<kTo>*>(to) + at);
  if constexpr (kFrom == kTo) {
    out = in;
  } else {
    Channels<kTo, kWidth> converted;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) converted.x[i] = narrow<kTo>(widen<kFrom>(in.x[i]));
    out = converted;
  }
}

/// Threads (channels / kWidth, tokens), blocks (tokens, heads).
template <Dtype kFrom, Dtype kTo, int kWidth>
__global__ void append_kernel(PageArrays pages, PageTable to, const i32* length, NewTokens tokens) {
  const i64 head = blockIdx.y, token = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens.n) return;
  const i64 slot = to.physical(head, length[head] + token, pages.page_size);
  const i64 at = slot * pages.head_dim, from = head * tokens.head_stride + token * pages.head_dim;
  for (i32 c = static_cast<i32>(threadIdx.x) * kWidth; c < pages.head_dim; c += static_cast<i32>(blockDim.x) * kWidth) {
    convert<kFrom, kTo, kWidth>(pages.k, at + c, tokens.k, from + c);
    convert<kFrom, kTo, kWidth>(pages.v, at + c, tokens.v, from + c);
  }
  if (threadIdx.x == 0) pages.position[slot] = static_cast<i32>(tokens.first_position + token);
}

/// Where the rows of slots lie: through a page table, or one after another.
struct PagedSlots {
  PageTable table;
  i32 page_size;
  __device__ i64 row(i64 head, i64 slot) const { return table.physical(head, slot, page_size); }
};
struct LinearSlots {
  i64 head_rows;
  __device__ i64 row(i64 head, i64 slot) const { return head * head_rows + slot; }
};

constexpr int kGatherThreads = 512, kGatherRows = 8;
constexpr i64 kSliceBytes = 32;

/// Blocks (slices of a row, heads, arrays). A block owns its slice of all rows of a head, so it alone keeps the order
/// that moving in place needs: it reads a batch of slots, all threads wait, and it writes them. A later batch reads
/// from[i] >= i, which is behind everything that was written.
template <class Word, class Slots>
__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(Word* first, Word* second, i32 row_words, i32 slice_words, Slots from, Slots to, Gather gather) {
  const i64 head = blockIdx.y;
  Word* data = blockIdx.z == 0 ? first : second;
  const i32 rows = kGatherThreads / slice_words, row = static_cast<i32>(threadIdx.x) / slice_words;
  const i32 word = static_cast<i32>(blockIdx.x) * slice_words + static_cast<i32>(threadIdx.x) % slice_words;
  const bool active = row < rows && word < row_words;
  const i32* source = gather.from + gather.indptr[head];
  const i64 count = gather.indptr[head + 1] - gather.indptr[head];
  for (i64 batch = gather.begin[head]; batch < count; batch += rows * kGatherRows) {
    Word held[kGatherRows];
#pragma unroll
    for (int r = 0; r < kGatherRows; ++r) {
      const i64 i = batch + r * rows + row;
      if (active && i < count) held[r] = data[from.row(head, source[i]) * row_words + word];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kGatherRows; ++r) {
      const i64 i = batch + r * rows + row;
      if (active && i < count) data[to.row(head, i) * row_words + word] = held[r];
    }
  }
}

constexpr int kMaxPairs = 256;  // 2 KiB of the kernel's arguments

struct Frequencies {
  double of_pair[kMaxPairs];
};

/// Threads (channel pairs, slots), blocks (slots, heads). Angles in fp64, as on the CPU.
template <Dtype kType>
__global__ void rotate_kernel(PageArrays pages, PageTable table, const i64* indptr, const i32* delta,
                              const __grid_constant__ Frequencies frequencies) {
  const i64 head = blockIdx.y, count = indptr[head + 1] - indptr[head];
  const i32 half = pages.head_dim / 2;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y; i < count;
       i += static_cast<i64>(gridDim.x) * blockDim.y) {
    const i32 turn = delta[indptr[head] + i];
    if (turn == 0) continue;
    auto* key = static_cast<Element<kType>*>(pages.k) + table.physical(head, i, pages.page_size) * pages.head_dim;
    for (i32 pair = static_cast<i32>(threadIdx.x); pair < half; pair += static_cast<i32>(blockDim.x)) {
      double s, c;
      sincos(turn * frequencies.of_pair[pair], &s, &c);
      const double x = widen<kType>(key[pair]), y = widen<kType>(key[pair + half]);
      key[pair] = narrow<kType>(static_cast<float>(x * c - y * s));
      key[pair + half] = narrow<kType>(static_cast<float>(y * c + x * s));
    }
  }
}

/// Threads (channels, slots), blocks (slots, heads).
template <Dtype kType>
__global__ void overwrite_kernel(PageArrays pages, PageTable table, const i32* length, NewContent content) {
  const i64 head = blockIdx.y, slot = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (slot >= length[head]) return;
  const i64 to = table.physical(head, slot, pages.page_size) * pages.head_dim;
  const i64 from = (head * content.slots + content.from[head * content.slots + slot]) * pages.head_dim;
  auto *k = static_cast<Element<kType>*>(pages.k) + to, *v = static_cast<Element<kType>*>(pages.v) + to;
  for (i32 c = static_cast<i32>(threadIdx.x); c < pages.head_dim; c += static_cast<i32>(blockDim.x)) {
    k[c] = narrow<kType>(content.k[from + c]);
    v[c] = narrow<kType>(content.v[from + c]);
  }
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error({std::string(what) + " failed on the GPU", "", cudaGetErrorString(status), "KV cache", ""});
}

unsigned blocks_for(i64 n, i64 per_block) { return static_cast<unsigned>((n + per_block - 1) / per_block); }

/// As many threads along x as there are columns, up to a block, and the rest along y.
dim3 block_for(i64 columns) {
  const auto x = static_cast<unsigned>(std::clamp<i64>(columns, 1, kThreads));
  return {x, kThreads / x};
}

/// f with the dtype as a constant; f32, f16 or bf16 (the cache has checked).
template <class F>
void with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::f32) return f(std::integral_constant<Dtype, Dtype::f32>());
  if (dtype == Dtype::bf16) return f(std::integral_constant<Dtype, Dtype::bf16>());
  f(std::integral_constant<Dtype, Dtype::f16>());
}

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

class CudaMoves final : public Moves {
 public:
  explicit CudaMoves(const Device& device) : stream_(static_cast<cudaStream_t>(device.stream())) {
    check(cudaStreamGetDevice(stream_, &index_), "cudaStreamGetDevice");
  }

  void append(const PageArrays& pages, const PageTable& to, const i32* length, const NewTokens& tokens) const override {
    constexpr int kWide = 8;
    const bool wide =
        pages.head_dim % kWide == 0 && tokens.head_stride % kWide == 0 && aligned(tokens.k) && aligned(tokens.v);
    const dim3 block = block_for(pages.head_dim / (wide ? kWide : 1));
    const dim3 grid(blocks_for(tokens.n, block.y), static_cast<unsigned>(to.heads));
    use();
    with_dtype(tokens.dtype, [&](auto from) {
      with_dtype(pages.dtype, [&](auto stored) {
        if (wide)
          append_kernel<from(), stored(), kWide><<<grid, block, 0, stream_>>>(pages, to, length, tokens);
        else
          append_kernel<from(), stored(), 1><<<grid, block, 0, stream_>>>(pages, to, length, tokens);
      });
    });
    check(cudaGetLastError(), "append");
  }

  void gather_pages(const PageArrays& pages, const PageTable& from, const PageTable& to,
                    const Gather& gather) const override {
    const PagedSlots source{from, pages.page_size}, target{to, pages.page_size};
    gather_rows(pages.k, pages.v, pages.head_dim * sdk::size_of(pages.dtype), source, target, gather);
    gather_rows(pages.position, nullptr, sizeof(i32), source, target, gather);
  }

  void gather_side(void* side, i64 head_bytes, i64 token_bytes, const Gather& gather) const override {
    const LinearSlots slots{head_bytes / token_bytes};
    gather_rows(side, nullptr, token_bytes, slots, slots, gather);
  }

  void rotate_keys(const PageArrays& pages, const PageTable& table, const i64* indptr, const i32* delta,
                   const Rope& rope) const override {
    constexpr unsigned kMostBlocks = 1024;
    Frequencies frequencies{};
    if (rope.frequencies().size() > kMaxPairs) {
      throw Error({"head too large for rotating keys on the GPU", std::to_string(2 * kMaxPairs) + " channels at most",
                   std::to_string(pages.head_dim), "KV cache", "Use positions = \"original\", or device = \"cpu\"."});
    }
    std::copy(rope.frequencies().begin(), rope.frequencies().end(), frequencies.of_pair);
    const dim3 block = block_for(pages.head_dim / 2);
    const unsigned most = blocks_for(static_cast<i64>(table.max_pages) * pages.page_size, block.y);
    const dim3 grid(std::min(most, kMostBlocks), static_cast<unsigned>(table.heads));
    use();
    with_dtype(pages.dtype, [&](auto stored) {
      rotate_kernel<stored()><<<grid, block, 0, stream_>>>(pages, table, indptr, delta, frequencies);
    });
    check(cudaGetLastError(), "rotate_keys");
  }

  void overwrite(const PageArrays& pages, const PageTable& table, const i32* length,
                 const NewContent& content) const override {
    const dim3 block = block_for(pages.head_dim);
    const dim3 grid(blocks_for(content.slots, block.y), static_cast<unsigned>(table.heads));
    use();
    with_dtype(pages.dtype, [&](auto stored) {
      overwrite_kernel<stored()><<<grid, block, 0, stream_>>>(pages, table, length, content);
    });
    check(cudaGetLastError(), "overwrite");
  }

 private:
  // The current device belongs to the thread, and a caller may come from any.
  void use() const { check(cudaSetDevice(index_), "cudaSetDevice"); }

  /// Rows of `row_bytes` of one or two arrays, in the largest words that a row is made of.
  template <class Slots>
  void gather_rows(void* first, void* second, i64 row_bytes, const Slots& from, const Slots& to,
                   const Gather& gather) const {
    if (row_bytes % 16 == 0) return gather_words<uint4>(first, second, row_bytes, from, to, gather);
    if (row_bytes % 8 == 0) return gather_words<uint2>(first, second, row_bytes, from, to, gather);
    if (row_bytes % 4 == 0) return gather_words<u32>(first, second, row_bytes, from, to, gather);
    if (row_bytes % 2 == 0) return gather_words<u16>(first, second, row_bytes, from, to, gather);
    gather_words<u8>(first, second, row_bytes, from, to, gather);
  }
  template <class Word, class Slots>
  void gather_words(void* first, void* second, i64 row_bytes, const Slots& from, const Slots& to,
                    const Gather& gather) const {
    const i64 row_words = row_bytes / static_cast<i64>(sizeof(Word));
    const i64 slice_words = std::min(row_words, kSliceBytes / static_cast<i64>(sizeof(Word)));
    const dim3 grid(blocks_for(row_words, slice_words), static_cast<unsigned>(gather.heads), second ? 2 : 1);
    use();
    gather_kernel<<<grid, kGatherThreads, 0, stream_>>>(static_cast<Word*>(first), static_cast<Word*>(second),
                                                        static_cast<i32>(row_words), static_cast<i32>(slice_words),
                                                        from, to, gather);
    check(cudaGetLastError(), "gather");
  }

  cudaStream_t stream_;
  int index_ = 0;
};

}  // namespace

std::unique_ptr<Moves> make_cuda_moves(const Device& device) { return std::make_unique<CudaMoves>(device); }

}  // namespace lacuna
