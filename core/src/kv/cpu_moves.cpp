// Data movement of the cache on the CPU. Every output row is written by one iteration, so results do not depend on the
// number of threads.
#include <cstddef>
#include <cstring>
#include <vector>

#include "moves.hpp"

namespace lacuna {
namespace {

using sdk::Dtype, sdk::i32, sdk::i64, sdk::u16;

constexpr i64 kParallelTokens = 64;  // fewer rows than this cost less than waking the threads

std::byte* element(void* base, Dtype dtype, i64 index) {
  return static_cast<std::byte*>(base) + index * sdk::size_of(dtype);
}
const std::byte* element(const void* base, Dtype dtype, i64 index) {
  return static_cast<const std::byte*>(base) + index * sdk::size_of(dtype);
}

template <Dtype kFrom, Dtype kTo>
void convert_row(void* to, const void* from, i64 n) {
  if constexpr (kFrom == kTo) {
    std::memcpy(to, from, static_cast<std::size_t>(n * sdk::size_of(kTo)));
  } else {
    for (i64 i = 0; i < n; ++i) {
      const float x = sdk::load(from, kFrom, i);
      if constexpr (kTo == Dtype::f32) static_cast<float*>(to)[i] = x;
      if constexpr (kTo == Dtype::bf16) static_cast<u16*>(to)[i] = sdk::to_bf16(x);
      if constexpr (kTo == Dtype::f16) static_cast<u16*>(to)[i] = sdk::to_f16(x);
    }
  }
}

using ConvertRow = void (*)(void* to, const void* from, i64 n);

template <Dtype kFrom>
ConvertRow converter_to(Dtype to) {
  if (to == Dtype::f32) return convert_row<kFrom, Dtype::f32>;
  return to == Dtype::bf16 ? convert_row<kFrom, Dtype::bf16> : convert_row<kFrom, Dtype::f16>;
}

/// Both are f32, f16 or bf16; the cache has checked.
ConvertRow converter(Dtype from, Dtype to) {
  if (from == Dtype::f32) return converter_to<Dtype::f32>(to);
  return from == Dtype::bf16 ? converter_to<Dtype::bf16>(to) : converter_to<Dtype::f16>(to);
}

class CpuMoves final : public Moves {
 public:
  void append(const PageArrays& pages, const PageTable& to, const i32* length, const NewTokens& tokens) const override {
    const ConvertRow convert = converter(tokens.dtype, pages.dtype);
#pragma omp parallel for collapse(2) schedule(static) if (to.heads * tokens.n >= kParallelTokens)
    for (i32 h = 0; h < to.heads; ++h) {
      for (i64 i = 0; i < tokens.n; ++i) {
        const i64 slot = to.physical(h, length[h] + i, pages.page_size);
        const i64 from = h * tokens.head_stride + i * pages.head_dim;
        convert(element(pages.k, pages.dtype, slot * pages.head_dim), element(tokens.k, tokens.dtype, from),
                pages.head_dim);
        convert(element(pages.v, pages.dtype, slot * pages.head_dim), element(tokens.v, tokens.dtype, from),
                pages.head_dim);
        pages.position[slot] = static_cast<i32>(tokens.first_position + i);
      }
    }
  }

  void gather_pages(const PageArrays& pages, const PageTable& from, const PageTable& to,
                    const Gather& gather) const override {
    const std::size_t row_bytes = static_cast<std::size_t>(pages.head_dim * sdk::size_of(pages.dtype));
#pragma omp parallel for schedule(static, 1)
    for (i32 h = 0; h < gather.heads; ++h) {
      const i32* source = gather.from + gather.indptr[h];
      const i64 count = gather.indptr[h + 1] - gather.indptr[h];
      for (i64 i = gather.begin[h]; i < count; ++i) {
        const i64 a = from.physical(h, source[i], pages.page_size), b = to.physical(h, i, pages.page_size);
        for (void* base : {pages.k, pages.v}) {
          std::memcpy(element(base, pages.dtype, b * pages.head_dim), element(base, pages.dtype, a * pages.head_dim),
                      row_bytes);
        }
        pages.position[b] = pages.position[a];
      }
    }
  }

  void gather_side(void* side, i64 head_bytes, i64 token_bytes, const Gather& gather) const override {
#pragma omp parallel for schedule(static, 1)
    for (i32 h = 0; h < gather.heads; ++h) {
      std::byte* base = static_cast<std::byte*>(side) + h * head_bytes;
      const i32* source = gather.from + gather.indptr[h];
      const i64 count = gather.indptr[h + 1] - gather.indptr[h];
      for (i64 i = gather.begin[h]; i < count; ++i) {
        std::memcpy(base + i * token_bytes, base + source[i] * token_bytes, static_cast<std::size_t>(token_bytes));
      }
    }
  }

  void rotate_keys(const PageArrays& pages, const PageTable& table, const i64* indptr, const i32* delta,
                   const Rope& rope) const override {
    const ConvertRow widen = converter(pages.dtype, Dtype::f32), narrow = converter(Dtype::f32, pages.dtype);
#pragma omp parallel
    {
      std::vector<float> row(static_cast<std::size_t>(pages.head_dim));
      for (i32 h = 0; h < table.heads; ++h) {
        const i32* turn = delta + indptr[h];
        const i64 count = indptr[h + 1] - indptr[h];
#pragma omp for schedule(static) nowait
        for (i64 i = 0; i < count; ++i) {
          if (turn[i] == 0) continue;
          std::byte* key = element(pages.k, pages.dtype, table.physical(h, i, pages.page_size) * pages.head_dim);
          widen(row.data(), key, pages.head_dim);
          rope.shift(row.data(), turn[i]);
          narrow(key, row.data(), pages.head_dim);
        }
      }
    }
  }

  void overwrite(const PageArrays& pages, const PageTable& table, const i32* length,
                 const NewContent& content) const override {
    const ConvertRow narrow = converter(Dtype::f32, pages.dtype);
#pragma omp parallel for collapse(2) schedule(static) if (table.heads * content.slots >= kParallelTokens)
    for (i32 h = 0; h < table.heads; ++h) {
      for (i64 i = 0; i < content.slots; ++i) {
        if (i >= length[h]) continue;
        const i64 to = table.physical(h, i, pages.page_size) * pages.head_dim;
        const i64 from = (h * content.slots + content.from[h * content.slots + i]) * pages.head_dim;
        narrow(element(pages.k, pages.dtype, to), content.k + from, pages.head_dim);
        narrow(element(pages.v, pages.dtype, to), content.v + from, pages.head_dim);
      }
    }
  }
};

}  // namespace

std::unique_ptr<Moves> make_moves(const Device& device) {
  if (device.on_device()) return make_cuda_moves(device);
  return std::make_unique<CpuMoves>();
}

}  // namespace lacuna
