// A layer of random queries, keys and values in a scattered paged cache, and its probabilities in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "lacuna/attention/attention.hpp"

namespace lacuna::test {

using sdk::i32;
using sdk::i64;

struct RandomLayer {
  i32 heads, kv_heads, dim;
  i64 length, queries;
  std::vector<i32> table, lengths, position;
  std::vector<float> k, v, q, lse;
  std::vector<double> p;  // [heads, queries, length]

  /// `local`: how much of the key at its own slot a query holds.
  RandomLayer(i32 heads, i32 kv_heads, i32 dim, i64 length, i64 queries, unsigned seed, float local = 0)
      : heads(heads), kv_heads(kv_heads), dim(dim), length(length), queries(queries) {
    constexpr i32 kPage = 4;
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const i64 pages = (length + kPage - 1) / kPage;
    table.resize(static_cast<std::size_t>(kv_heads * pages));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), random);
    lengths.assign(static_cast<std::size_t>(kv_heads), static_cast<i32>(length));
    position.resize(table.size() * kPage);
    k.resize(table.size() * kPage * static_cast<std::size_t>(dim));
    q.resize(static_cast<std::size_t>(heads * queries * dim));
    for (float& x : k) x = normal(random);
    v = k;
    for (float& x : v) x = normal(random);
    for (float& x : q) x = 1.5f * normal(random);
    lse.resize(static_cast<std::size_t>(heads * queries));
    p.assign(static_cast<std::size_t>(heads * queries * length), 0);
    const Attention a = attention();
    for (i64 h = 0; h < heads; ++h) {
      for (i64 i = 0; i < queries; ++i) {
        for (i32 c = 0; c < dim; ++c) {
          q[static_cast<std::size_t>((h * queries + i) * dim + c)] += local * a.kv.key(h / a.layer.group(), slot(i), c);
        }
        double sum = 0;
        for (i64 j = 0; j <= slot(i); ++j) {
          double logit = 0;
          for (i32 c = 0; c < dim; ++c) {
            logit += static_cast<double>(a.q.at(0, h, i, c)) * a.kv.key(h / a.layer.group(), j, c);
          }
          sum += probability(h, i, j) = std::exp(logit * a.layer.softmax_scale);
        }
        for (i64 j = 0; j <= slot(i); ++j) probability(h, i, j) /= sum;
        lse[static_cast<std::size_t>(h * queries + i)] = static_cast<float>(std::log(sum));
      }
    }
  }

  i64 slot(i64 query) const { return length - queries + query; }
  double& probability(i64 head, i64 query, i64 key) {
    return p[static_cast<std::size_t>((head * queries + query) * length + key)];
  }
  double probability(i64 head, i64 query, i64 key) const {
    return p[static_cast<std::size_t>((head * queries + query) * length + key)];
  }

  Attention attention() const {
    Attention a{};
    a.layer = {0, 1, heads, kv_heads, dim, 1.f / std::sqrt(static_cast<float>(dim)), 0};
    a.kv.table = table.data();
    a.kv.length = lengths.data();
    a.kv.position = position.data();
    a.kv.k = k.data();
    a.kv.v = v.data();
    a.kv.dtype = sdk::Dtype::f32;
    a.kv.rows = kv_heads;
    a.kv.max_pages = static_cast<i32>(table.size()) / kv_heads;
    a.kv.page_size = 4;
    a.kv.head_dim = dim;
    a.kv.max_length = static_cast<i32>(length);
    a.q.data = q.data();
    a.q.dtype = sdk::Dtype::f32;
    a.q.seqs = 1;
    a.q.heads = heads;
    a.q.head_dim = dim;
    a.q.count = queries;
    a.q.first_position = length - queries;
    a.q.seq_stride = heads * queries * dim;
    a.q.head_stride = queries * dim;
    a.q.row_stride = dim;
    return a;
  }

  /// Whether the query reads the key of this set.
  bool reads(const RowSet& set, i64 query, i64 key) const {
    const i64 s = slot(query);
    if (key > s) return false;
    return key < set.exact_sinks || s - key < set.exact_window ||
           std::binary_search(set.slots.begin(), set.slots.end(), static_cast<i32>(key));
  }
};

}  // namespace lacuna::test
