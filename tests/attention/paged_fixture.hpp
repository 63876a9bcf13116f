// A paged cache made by hand: pages scattered over the pool, given K and V, any length per KV row.
#pragma once

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "lacuna/sdk/types.hpp"

namespace lacuna::test {

using sdk::i32;
using sdk::i64;

inline std::vector<float> random_floats(i64 n, unsigned seed, float scale = 1.f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.f, scale);
  std::vector<float> out(static_cast<std::size_t>(n));
  for (float& x : out) x = normal(rng);
  return out;
}

/// Rows of different length; unused slots of a page hold NaN, as a poisoned pool's do.
class PagedFixture {
 public:
  /// positions[row]: ascending original positions of the row's tokens.
  PagedFixture(std::vector<std::vector<i32>> positions, i32 head_dim, sdk::Dtype dtype = sdk::Dtype::f32,
               i32 page_size = 16)
      : length(positions.size()), head_dim_(head_dim), page_size_(page_size), dtype_(dtype) {
    i64 most = 0, pages = 0;
    for (const auto& row : positions) {
      most = std::max<i64>(most, static_cast<i64>(row.size()));
      pages += (static_cast<i64>(row.size()) + page_size - 1) / page_size;
    }
    max_pages_ = static_cast<i32>((most + page_size - 1) / page_size);
    std::vector<i32> order(static_cast<std::size_t>(pages));
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<i32>(i);
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    table.assign(positions.size() * static_cast<std::size_t>(max_pages_), -1);
    position.assign(static_cast<std::size_t>(pages * page_size), -1);
    k.assign(static_cast<std::size_t>(pages * page_size * head_dim * sdk::size_of(dtype)),
             0xff);  // NaN in every float type
    v = k;
    i64 next = 0;
    for (std::size_t row = 0; row < positions.size(); ++row) {
      length[row] = static_cast<i32>(positions[row].size());
      for (i64 s = 0; s < length[row]; ++s) {
        i32& page = table[row * static_cast<std::size_t>(max_pages_) + static_cast<std::size_t>(s / page_size)];
        if (page < 0) page = order[static_cast<std::size_t>(next++)];
        position[static_cast<std::size_t>(page * page_size + s % page_size)] =
            positions[row][static_cast<std::size_t>(s)];
      }
    }
  }

  void set(i64 row, i64 slot, const float* key, const float* value) {
    const i64 at = view().physical(row, slot) * head_dim_;
    for (i64 c = 0; c < head_dim_; ++c) {
      store(k, at + c, key[c]);
      store(v, at + c, value[c]);
    }
  }

  /// Every token from a normal distribution.
  void fill(unsigned seed, float key_scale = 1.f, float value_scale = 1.f) {
    for (std::size_t row = 0; row < length.size(); ++row) {
      const i64 n = static_cast<i64>(length[row]) * head_dim_;
      const auto keys = random_floats(n, seed + 2 * static_cast<unsigned>(row), key_scale);
      const auto values = random_floats(n, seed + 2 * static_cast<unsigned>(row) + 1, value_scale);
      for (i64 s = 0; s < length[row]; ++s)
        set(static_cast<i64>(row), s, keys.data() + s * head_dim_, values.data() + s * head_dim_);
    }
  }

  sdk::Paged view() const {
    return {table.data(),
            length.data(),
            position.data(),
            k.data(),
            v.data(),
            dtype_,
            static_cast<i32>(length.size()),
            max_pages_,
            page_size_,
            head_dim_,
            *std::max_element(length.begin(), length.end())};
  }

  std::vector<i32> table, length, position;
  std::vector<unsigned char> k, v;

 private:
  void store(std::vector<unsigned char>& to, i64 i, float x) {
    if (dtype_ == sdk::Dtype::f32)
      reinterpret_cast<float*>(to.data())[i] = x;
    else
      reinterpret_cast<sdk::u16*>(to.data())[i] = dtype_ == sdk::Dtype::bf16 ? sdk::to_bf16(x) : sdk::to_f16(x);
  }

  i32 head_dim_, page_size_, max_pages_ = 0;
  sdk::Dtype dtype_;
};

inline std::vector<i32> consecutive(i64 n) {
  std::vector<i32> out(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<i32>(i);
  return out;
}

/// Queries [seqs, heads, count, head_dim], contiguous.
inline sdk::Queries queries_of(const std::vector<float>& data, i32 seqs, i32 heads, i32 head_dim, i64 count,
                               i64 first_position) {
  return {data.data(),      sdk::Dtype::f32, seqs, heads, head_dim, count, first_position, heads * count * head_dim,
          count * head_dim, head_dim};
}

/// A selection that owns its lists; rows are given one by one.
struct SelectionFixture {
  struct Row {
    std::vector<i32> pieces, tokens;
    std::vector<float> piece_weight, token_weight;
    i32 sinks = 0, window = 0, full = 0;
  };

  SelectionFixture(sdk::Rows rows, i32 kv_block, std::vector<Row> content, bool weighted = false) {
    std::size_t most_pieces = 0, most_tokens = 0;
    for (const Row& r : content) {
      most_pieces = std::max(most_pieces, r.pieces.size());
      most_tokens = std::max(most_tokens, r.tokens.size());
    }
    const auto pad = [](auto& to, const auto& from, std::size_t capacity) {
      const std::size_t begin = to.size();
      to.resize(begin + capacity);
      std::copy(from.begin(), from.end(), to.begin() + static_cast<std::ptrdiff_t>(begin));
    };
    for (const Row& r : content) {
      piece_count.push_back(static_cast<i32>(r.pieces.size()));
      token_count.push_back(static_cast<i32>(r.tokens.size()));
      sinks.push_back(r.sinks);
      window.push_back(r.window);
      full.push_back(r.full);
      pad(pieces, r.pieces, most_pieces);
      pad(tokens, r.tokens, most_tokens);
      pad(piece_weight, r.piece_weight, most_pieces);
      pad(token_weight, r.token_weight, most_tokens);
    }
    selection = {rows,
                 kv_block,
                 static_cast<i32>(most_pieces),
                 static_cast<i32>(most_tokens),
                 piece_count.data(),
                 pieces.data(),
                 token_count.data(),
                 tokens.data(),
                 sinks.data(),
                 window.data(),
                 full.data(),
                 weighted ? piece_weight.data() : nullptr,
                 weighted ? token_weight.data() : nullptr,
                 0,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr};
  }
  SelectionFixture(const SelectionFixture&) = delete;

  std::vector<i32> piece_count, pieces, token_count, tokens, sinks, window, full;
  std::vector<float> piece_weight, token_weight;
  sdk::Selection selection;
};

inline sdk::Rows rows_of(i32 seqs, i32 heads, bool per_query_head, i32 q_tile, i64 count, i64 first_position) {
  return {seqs,   heads,          0,     static_cast<i32>((count + q_tile - 1) / q_tile),
          q_tile, per_query_head, count, first_position};
}

}  // namespace lacuna::test
