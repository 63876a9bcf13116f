// A layer of a trace as a hand-made paged cache and queries.
#pragma once

#include <cstring>

#include "attention/paged_fixture.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna::test {

struct TraceLayer {
  TraceLayer(const Trace& trace, int index)
      : layer(trace.info().layer(index)), tensors(trace.layer(index)), tokens(trace.info().tokens()) {}

  /// The first n tokens, in scattered pages of the trace's dtype.
  PagedFixture cache(i64 n) const {
    PagedFixture out(std::vector<std::vector<i32>>(static_cast<std::size_t>(layer.num_kv_heads), consecutive(n)),
                     layer.head_dim, tensors.k.dtype);
    const sdk::Paged view = out.view();
    const i64 bytes = layer.head_dim * sdk::size_of(tensors.k.dtype);
    for (i64 row = 0; row < layer.num_kv_heads; ++row)
      for (i64 s = 0; s < n; ++s) {
        const i64 to = view.physical(row, s) * bytes, from = (row * tokens + s) * bytes;
        std::memcpy(out.k.data() + to, static_cast<const char*>(tensors.k.data) + from,
                    static_cast<std::size_t>(bytes));
        std::memcpy(out.v.data() + to, static_cast<const char*>(tensors.v.data) + from,
                    static_cast<std::size_t>(bytes));
      }
    return out;
  }

  sdk::Queries queries(i64 first, i64 count) const {
    const i64 bytes = layer.head_dim * sdk::size_of(tensors.q.dtype);
    return {static_cast<const char*>(tensors.q.data) + first * bytes,
            tensors.q.dtype,
            1,
            layer.num_qo_heads,
            layer.head_dim,
            count,
            first,
            layer.num_qo_heads * tokens * layer.head_dim,
            tokens * layer.head_dim,
            layer.head_dim};
  }

  sdk::Layer layer;
  LayerTensors tensors;
  i64 tokens;
};

}  // namespace lacuna::test
