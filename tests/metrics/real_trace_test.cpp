// The shipped trace through attention, metrics and the oracle together.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>

#include "lacuna/attention/attention.hpp"
#include "lacuna/kv/kv_cache.hpp"
#include "lacuna/metrics/matched_oracle.hpp"
#include "lacuna/metrics/metric.hpp"
#include "lacuna/trace/trace.hpp"

using namespace lacuna;
using sdk::i32;
using sdk::i64;

namespace {

constexpr i32 kTile = 64, kBlock = 16;

/// Random blocks for every row, and sinks and a window where asked.
struct RandomSelection {
  std::vector<i32> count, pieces, sinks, window;
  sdk::Selection selection{};

  RandomSelection(const sdk::Layer& layer, i64 queries, bool exact, std::mt19937& random) {
    const auto tiles = static_cast<i32>((queries + kTile - 1) / kTile);
    selection.rows = {1, layer.num_qo_heads, 0, tiles, kTile, 1, queries, 0};
    selection.kv_block = kBlock;
    selection.piece_capacity = static_cast<i32>(queries / kBlock) + 1;
    const auto rows = static_cast<std::size_t>(selection.rows.count());
    pieces.resize(rows * static_cast<std::size_t>(selection.piece_capacity));
    for (std::size_t row = 0; row < rows; ++row) {
      const i64 visible = selection.rows.query_end(static_cast<i64>(row));
      i32 n = 0;
      for (i32 block = 0; block * kBlock < visible; ++block) {
        if (block == 0 || random() % 8 == 0) {  // every query reads something
          pieces[row * static_cast<std::size_t>(selection.piece_capacity) + static_cast<std::size_t>(n++)] =
              block * kBlock;
        }
      }
      count.push_back(n);
      sinks.push_back(exact ? 4 : 0);
      window.push_back(exact ? 100 : 0);
    }
    selection.piece_count = count.data();
    selection.pieces = pieces.data();
    selection.exact_sinks = sinks.data();
    selection.exact_window = window.data();
  }
};

}  // namespace

TEST_CASE("on the shipped trace lse_error is ln mass_kept, and no method beats the matched oracle") {
  const Trace trace = Trace::open(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors");
  std::mt19937 random(1);
  for (const int index : {0, 27}) {
    const sdk::Layer layer = trace.info().layer(index);
    const LayerTensors tensors = trace.layer(index);
    const i64 n = trace.info().tokens();
    auto pool = std::make_shared<PagePool>(cpu_device(), 16, layer.head_dim, tensors.k.dtype,
                                           layer.num_kv_heads * (n / 16 + 1), false);
    KvCache cache(pool, layer.num_kv_heads, n);
    cache.append(tensors.k.data, tensors.v.data, tensors.k.dtype, n * layer.head_dim, n, 0);
    Attention a{};
    a.layer = layer;
    a.kv = cache.view();
    a.q = {tensors.q.data,
           tensors.q.dtype,
           1,
           layer.num_qo_heads,
           layer.head_dim,
           n,
           0,
           layer.num_qo_heads * n * layer.head_dim,
           n * layer.head_dim,
           layer.head_dim};
    const auto samples = static_cast<std::size_t>(layer.num_qo_heads * n);
    const auto elements = samples * static_cast<std::size_t>(layer.head_dim);
    std::vector<float> dense_out(elements), dense_lse(samples), out(elements), lse(samples);
    std::vector<double> mass(samples), regret(samples);
    attend(a, dense_out.data(), dense_lse.data());

    for (const bool exact : {false, true}) {
      const RandomSelection blocks(layer, n, exact, random);
      std::vector<RowSet> sets;
      for (i64 row = 0; row < blocks.selection.rows.count(); ++row) {
        sets.push_back(expand_row(blocks.selection, row, blocks.selection.rows.query_end(row)));
      }
      Attention sparse = a;
      sparse.read = &blocks.selection;
      attend(sparse, out.data(), lse.data());
      set_mass(a, sets, kTile, dense_lse.data(), mass.data());
      const auto oracle = matched_oracle(a, kTile, dense_lse.data(), {oracle_request(a, sets, kTile)});
      regret_of_rows(oracle[0], mass.data(), layer.num_qo_heads, n, kTile, regret.data());

      Comparison comparison;
      comparison.heads = layer.num_qo_heads;
      comparison.head_dim = layer.head_dim;
      comparison.queries = n;
      comparison.dense_out = dense_out.data();
      comparison.dense_lse = dense_lse.data();
      comparison.sparse_out = out.data();
      comparison.sparse_lse = lse.data();
      comparison.mass_kept = mass.data();
      const std::vector<float> error = evaluate(find_metric("lse_error"), comparison).value;
      double worst = 0;
      for (std::size_t i = 0; i < samples; ++i) worst = std::max(worst, std::abs(error[i] - std::log(mass[i])));
      CHECK(worst < 2e-5);
      CHECK(*std::min_element(regret.begin(), regret.end()) > -1e-5);
      CHECK(std::accumulate(regret.begin(), regret.end(), 0.0) / static_cast<double>(samples) > 0.01);
    }
  }
}
