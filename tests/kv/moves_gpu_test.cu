// What only a GPU can get wrong: moving in place in parallel, words of every width, and waiting for the stream.
#include <cuda_runtime.h>

#include "support.hpp"

namespace kv_test {
namespace {

struct Shape {
  i32 heads, head_dim, page_size;
  Dtype source, stored;
  i64 tokens;
  i64 v_offset;  // elements by which V's memory lies after K's; odd: no wide loads
};

std::vector<std::vector<i32>> some_slots(const KvCache& cache, i32 heads, std::mt19937& rng) {
  std::vector<std::vector<i32>> slots(static_cast<std::size_t>(heads));
  for (i32 h = 0; h < heads; ++h) {
    const unsigned percent = 30 + rng() % 70;
    for (i32 i = 0; i < cache.length(h); ++i) {
      if (i < 20 || rng() % 100 < percent) slots[static_cast<std::size_t>(h)].push_back(i);
    }
  }
  return slots;
}

/// One history on any device: append, evict in place, evict from shared pages, append, rotate; with sides of 4, 6 and 3
/// bytes a token and 32 bytes, which take words of 4, 2, 1 and 16.
class Run {
 public:
  Run(const std::shared_ptr<Device>& device, const Shape& shape)
      : device_(device), shape_(shape), pool_(make_pool()), cache(pool_, shape.heads, 2 * shape.tokens + 8) {
    std::mt19937 rng(5);
    cache.add_side({"sum", sdk::SidePer::token, 0, Dtype::f32, 1, 1});
    cache.add_side({"codes", sdk::SidePer::token, 0, Dtype::u16, 3, 1});
    cache.add_side({"bits", sdk::SidePer::token, 0, Dtype::u8, 3, 1});
    cache.add_side({"bounds", sdk::SidePer::token, 0, Dtype::f32, 8, 1});
    append(shape.tokens, 0, rng);
    for (const char* name : kSides) fill(cache.side(name), rng);
    cache.retain(some_slots(cache, shape.heads, rng));
    parent = std::make_unique<KvCache>(cache.fork());
    cache.retain(some_slots(cache, shape.heads, rng));
    append(shape.tokens / 2 + 1, shape.tokens, rng);
    cache.compact_positions(Rope(RopeConfig{}, shape.head_dim));
    cache.retain(some_slots(cache, shape.heads, rng));
    overwrite(rng);
  }

  std::vector<std::byte> side(const char* name) {
    const sdk::Array a = cache.side(name);
    return download(static_cast<const std::byte*>(a.data), a.extent[0] * a.stride[0] * sdk::size_of(a.dtype), *device_);
  }

  static constexpr const char* kSides[] = {"sum", "codes", "bits", "bounds"};

 private:
  std::shared_ptr<PagePool> make_pool() const {
    const i64 pages = 5 * shape_.heads * (shape_.tokens / shape_.page_size + 2);
    return std::make_shared<PagePool>(device_, shape_.page_size, shape_.head_dim, shape_.stored, pages, true);
  }
  /// Everything anew, rows in reversed order.
  void overwrite(std::mt19937& rng) {
    const i64 slots = cache.view().max_length, rows = shape_.heads * slots;
    std::normal_distribution<float> normal;
    std::vector<float> k(static_cast<std::size_t>(rows * shape_.head_dim)), v(k.size());
    for (float& x : k) x = normal(rng);
    for (float& x : v) x = normal(rng);
    std::vector<i32> from;
    for (i64 i = 0; i < rows; ++i) from.push_back(static_cast<i32>(slots - 1 - i % slots));
    const Buffer<float> new_k = upload(k, device_), new_v = upload(v, device_);
    const Buffer<i32> order = upload(from, device_);
    cache.overwrite(new_k.data(), new_v.data(), order.data(), slots);
  }
  void append(i64 n, i64 first, std::mt19937& rng) {
    const i64 stride = (n + 1) * shape_.head_dim;
    std::vector<float> x(static_cast<std::size_t>(shape_.heads * stride));
    for (float& value : x) value = static_cast<float>(rng() % 20001) * 1e-4f - 1;
    std::vector<u16> half;
    for (const float value : x) half.push_back(shape_.source == Dtype::bf16 ? sdk::to_bf16(value) : sdk::to_f16(value));
    const Buffer<float> full = upload(x, device_);
    const Buffer<u16> narrow = upload(half, device_);
    const void* data = shape_.source == Dtype::f32 ? static_cast<const void*>(full.data()) : narrow.data();
    const void* v = static_cast<const std::byte*>(data) + shape_.v_offset * sdk::size_of(shape_.source);
    cache.append(data, v, shape_.source, stride, n, first);
  }
  void fill(const sdk::Array& a, std::mt19937& rng) {
    std::vector<u8> bytes(static_cast<std::size_t>(a.extent[0] * a.stride[0] * sdk::size_of(a.dtype)));
    for (u8& b : bytes) b = static_cast<u8>(rng());
    device_->copy_in(a.data, bytes.data(), bytes.size());
  }

  std::shared_ptr<Device> device_;
  Shape shape_;
  std::shared_ptr<PagePool> pool_;

 public:
  KvCache cache;
  std::unique_ptr<KvCache> parent;
};

void check_equal(const KvCache& gpu, const KvCache& cpu) {
  const HostView a(gpu), b(cpu, -1, *cpu_device());
  CHECK(a.table == b.table);
  CHECK(a.length == b.length);
  CHECK(a.position == b.position);
  CHECK((a.k == b.k));
  CHECK((a.v == b.v));
  for (i32 h = 0; h < a.kv.rows; ++h) CHECK(gpu.positions(h) == cpu.positions(h));
}

__global__ void wait_kernel(unsigned long long nanoseconds) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    __nanosleep(1000);
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}

}  // namespace

TEST_CASE("GPU: histories over awkward shapes leave the CPU's bytes") {
  const Shape shapes[] = {
      {8, 128, 16, Dtype::bf16, Dtype::bf16, 9000, 128}, {3, 64, 16, Dtype::f32, Dtype::bf16, 2500, 1},
      {2, 80, 5, Dtype::f16, Dtype::f16, 777, 80},       {1, 256, 64, Dtype::f32, Dtype::f32, 1500, 256},
      {3, 6, 1, Dtype::bf16, Dtype::f32, 300, 6},        {5, 2, 16, Dtype::f16, Dtype::bf16, 1, 2},
      {7, 24, 16, Dtype::f32, Dtype::f16, 6000, 24}};
  for (const Shape& shape : shapes) {
    CAPTURE(shape.head_dim);
    Run gpu(test_device(), shape), again(test_device(), shape), cpu(cpu_device(), shape);
    check_equal(gpu.cache, cpu.cache);
    check_equal(*gpu.parent, *cpu.parent);
    check_equal(again.cache, cpu.cache);
    for (const char* name : Run::kSides) CHECK((gpu.side(name) == cpu.side(name)));
  }
}

TEST_CASE("GPU: appending, evicting again and asking what is dirty do not wait for the stream") {
  constexpr i32 kHeads = 4, kHeadDim = 64;
  const auto pool = std::make_shared<PagePool>(test_device(), 16, kHeadDim, Dtype::bf16, 400, true);
  KvCache cache(pool, kHeads, 1000);
  Model model(kHeads);
  cache.add_side({"sum", sdk::SidePer::token, 0, Dtype::f32, 1, 1});
  const Batch first(kHeads, kHeadDim, 500, 0, 1), second(kHeads, kHeadDim, 1, 500, 2);
  first.append_to(cache, kHeadDim);
  cache.take_dirty(1);
  std::vector<i32> kept = iota(0, 500);
  kept.erase(kept.begin() + 100, kept.begin() + 103);
  cache.retain(std::vector<std::vector<i32>>(kHeads, kept));  // takes the scratch memory that later ones use
  const Buffer<float> k = upload(second.k), v = upload(second.v);
  const auto stream = static_cast<cudaStream_t>(test_device()->stream());
  test_device()->synchronize();

  cudaEvent_t waited;
  REQUIRE(cudaEventCreate(&waited) == cudaSuccess);
  wait_kernel<<<1, 1, 0, stream>>>(300'000'000);
  REQUIRE(cudaEventRecord(waited, stream) == cudaSuccess);
  cache.append(k.data(), v.data(), Dtype::f32, kHeadDim, 1, 500);
  const sdk::Dirty dirty = cache.take_dirty(1);
  std::vector<i32> again = iota(0, 498);
  again.erase(again.begin() + 7);
  cache.retain(std::vector<std::vector<i32>>(kHeads, again));
  const std::vector<i32> positions = cache.positions(3);
  CHECK(cudaEventQuery(waited) == cudaErrorNotReady);

  CHECK(dirty.max_units == 1);
  CHECK(positions.size() == again.size());
  first.append_to(model, kHeadDim, Dtype::bf16);
  retain(model, std::vector<std::vector<i32>>(kHeads, kept));
  second.append_to(model, kHeadDim, Dtype::bf16);
  retain(model, std::vector<std::vector<i32>>(kHeads, again));
  CHECK(differences(cache, model, true) == 0);
  CHECK(cudaEventDestroy(waited) == cudaSuccess);
}

}  // namespace kv_test
