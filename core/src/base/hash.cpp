#include "lacuna/base/hash.hpp"

#include <fmt/format.h>

#include <bit>
#include <cstring>

namespace lacuna {
namespace {

using u64 = std::uint64_t;
using u32 = std::uint32_t;

constexpr u64 kPrime1 = 0x9E3779B185EBCA87ull, kPrime2 = 0xC2B2AE3D27D4EB4Full, kPrime3 = 0x165667B19E3779F9ull,
              kPrime4 = 0x85EBCA77C2B2AE63ull, kPrime5 = 0x27D4EB2F165667C5ull;

static_assert(std::endian::native == std::endian::little, "XXH64 reads little-endian words");

template <class T>
T word_at(const unsigned char* p) {
  T word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

u64 absorb(u64 lane, u64 word) { return std::rotl(lane + word * kPrime2, 31) * kPrime1; }
u64 merge(u64 hash, u64 lane) { return (hash ^ absorb(0, lane)) * kPrime1 + kPrime4; }

u64 xxh64(const unsigned char* p, std::size_t bytes, u64 seed) {
  std::size_t left = bytes;
  u64 h = seed + kPrime5;
  if (bytes >= 32) {
    u64 a = seed + kPrime1 + kPrime2, b = seed + kPrime2, c = seed, d = seed - kPrime1;
    for (; left >= 32; left -= 32, p += 32) {
      a = absorb(a, word_at<u64>(p));
      b = absorb(b, word_at<u64>(p + 8));
      c = absorb(c, word_at<u64>(p + 16));
      d = absorb(d, word_at<u64>(p + 24));
    }
    h = std::rotl(a, 1) + std::rotl(b, 7) + std::rotl(c, 12) + std::rotl(d, 18);
    for (const u64 lane : {a, b, c, d}) h = merge(h, lane);
  }
  h += bytes;
  for (; left >= 8; left -= 8, p += 8) h = std::rotl(h ^ absorb(0, word_at<u64>(p)), 27) * kPrime1 + kPrime4;
  if (left >= 4) {
    h = std::rotl(h ^ (word_at<u32>(p) * kPrime1), 23) * kPrime2 + kPrime3;
    left -= 4;
    p += 4;
  }
  for (; left > 0; --left, ++p) h = std::rotl(h ^ (*p * kPrime5), 11) * kPrime1;
  h = (h ^ (h >> 33)) * kPrime2;
  h = (h ^ (h >> 29)) * kPrime3;
  return h ^ (h >> 32);
}

}  // namespace

Hasher& Hasher::add(const void* data, std::size_t bytes) {
  state_ = xxh64(static_cast<const unsigned char*>(data), bytes, state_);
  return *this;
}

Hasher& Hasher::add(const std::string& text) { return add(text.data(), text.size()); }

std::string Hasher::hex() const { return fmt::format("{:016x}", state_); }

}  // namespace lacuna
