#include "lacuna/pipeline/scratch.hpp"

#include <algorithm>

namespace lacuna {
using sdk::i64;

namespace {
constexpr i64 kAlignment = 256, kLeastChunk = i64{1} << 20;
}

void* Scratch::take_bytes(i64 bytes) {
  const i64 size = (std::max<i64>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  const std::size_t first_unused = chunk_ + (used_ > 0);
  while (chunk_ < chunks_.size() && used_ + size > chunks_[chunk_].size()) {
    ++chunk_;
    used_ = 0;
  }
  if (chunk_ == chunks_.size()) {
    // Chunks that are too small now would stay so: a larger one takes their place.
    chunks_.resize(std::min(first_unused, chunks_.size()));
    chunk_ = chunks_.size();
    chunks_.emplace_back(device_, std::max(size, kLeastChunk));
  }
  void* out = chunks_[chunk_].data() + used_;
  used_ += size;
  return out;
}

void* Scratch::ops_workspace(std::size_t bytes) {
  if (static_cast<std::size_t>(ops_.size()) < bytes) {
    ops_ = Buffer<std::byte>();  // first: the old one and the new one may not fit together
    ops_ = Buffer<std::byte>(device_, static_cast<i64>(bytes));
  }
  return ops_.data();
}

}  // namespace lacuna
