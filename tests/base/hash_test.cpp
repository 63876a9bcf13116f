#include "lacuna/base/hash.hpp"

#include <doctest/doctest.h>

#include <set>
#include <vector>

using lacuna::Hasher;

namespace {
std::uint64_t hash(const std::vector<unsigned char>& bytes) { return Hasher().add(bytes.data(), bytes.size()).value(); }
}  // namespace

TEST_CASE("every flipped bit changes the hash, at any place and length") {
  std::set<std::uint64_t> seen;
  std::size_t hashed = 0;
  for (const std::size_t size : {1, 7, 8, 31, 32, 33, 100}) {
    std::vector<unsigned char> bytes(size);
    for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<unsigned char>(37 * i + size);
    seen.insert(hash(bytes));
    ++hashed;
    for (std::size_t bit = 0; bit < 8 * size; ++bit) {
      bytes[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
      seen.insert(hash(bytes));
      bytes[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
      ++hashed;
    }
  }
  CHECK(seen.size() == hashed);
}

TEST_CASE("flipped signs of two numbers do not cancel") {
  std::vector<double> numbers(64, 1.5);
  auto of = [&] { return Hasher().add(numbers.data(), numbers.size() * sizeof(double)).value(); };
  const std::uint64_t before = of();
  for (std::size_t other = 1; other < numbers.size(); ++other) {
    numbers[0] = numbers[other] = -1.5;
    CHECK(of() != before);
    numbers[0] = numbers[other] = 1.5;
  }
}

// Expected values from the reference library; rows of different builds and machines are compared by them.
TEST_CASE("the hash is XXH64, each add seeded with the value before") {
  CHECK(Hasher().add(nullptr, 0).hex() == "ef46db3751d8e999");
  CHECK(Hasher().add("abc", 3).hex() == "44bc2cf5ad770999");
  CHECK(Hasher().add(std::string("ab")).add(std::string("c")).hex() == "7807df9d3024b0f2");
  std::vector<unsigned char> bytes(77);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<unsigned char>(i);
  CHECK(Hasher().add(bytes.data(), 32).hex() == "cbf59c5116ff32b4");
  CHECK(Hasher().add(bytes.data(), 77).hex() == "93f85c1b6280ead3");
}
