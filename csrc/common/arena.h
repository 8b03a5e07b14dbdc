// Scratch memory of one thread: laid out by taking pieces in order. Laying out on nullptr first gives the
// size.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace pyvlm {

class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return piece;
  }

  int64_t used() const { return static_cast<int64_t>(used_); }

 private:
  static constexpr size_t kAlign = 64;  // a cache line, and an AVX-512 register
  uintptr_t base_;
  size_t used_ = 0;
};

// The calling thread's row of memory [threads, bytes + 64], from its first aligned byte on.
inline Arena thread_arena(const at::Tensor& memory) {
  const auto row = reinterpret_cast<uintptr_t>(memory.data_ptr()) + at::get_thread_num() * memory.size(1);
  return Arena(reinterpret_cast<void*>((row + 63) / 64 * 64));
}

// How many tasks of that many multiply-adds a thread should get at least. Waking the other threads costs
// about as much as a million of them: handing out single small tasks turned a call of 6 us into 76.
inline int64_t task_grain(int64_t work) {
  return std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(work, 1));
}

}  // namespace pyvlm
