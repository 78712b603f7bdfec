// What the C++ kernels of compiled programs share.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>

namespace {

constexpr int64_t kLanes = 16;  // float32 numbers of a register

int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// The first numbers of a register.
inline uint32_t first_lanes(int64_t count) {
  return count >= 32 ? ~uint32_t(0) : (uint32_t(1) << count) - 1;
}

// Memory of one thread, in parts that begin at a cache line.
class Arena {
 public:
  explicit Arena(int64_t bytes) : memory_(std::aligned_alloc(64, round_up(bytes, 64))) {
    TORCH_CHECK(memory_ != nullptr, "no memory for a kernel");
    next_ = static_cast<char*>(memory_.get());
  }

  template <typename Number>
  Number* take(int64_t count) {
    auto* const part = reinterpret_cast<Number*>(next_);
    next_ += round_up(count * sizeof(Number), 64);
    return part;
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  char* next_;
};

// Call f(begin, end) for parts of 0 to count, by as many threads as the caller has.
//
// at::parallel_for does this as well, but gives each thread that calls it first torch's default
// number of threads: its state is in a header, so that this library has one of its own.
template <typename F>
void split_among_threads(int64_t count, const F& f) {
  if (count > 1 && !at::in_parallel_region() && at::get_num_threads() > 1) {
    at::internal::invoke_parallel(0, count, 1, f);
  } else if (count > 0) {
    f(0, count);
  }
}

}  // namespace
