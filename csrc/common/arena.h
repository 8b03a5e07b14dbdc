// Scratch memory of one thread: laid out by taking pieces in order. Laying out on nullptr first gives the
// size.
#pragma once

#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyvlm {

// Asks for pages of 2 MB behind memory that was not written yet: the first touch of 4 KB took 0.9 us, that of
// 2 MB some 150 us. An allocation that is too small, or not fresh, stays as it is.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

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

// Scratch memory of the calling thread, for the length of a task or a call. A thread keeps up to `kKeptBytes`
// for its next one: mapping and clearing fresh pages took longer than attention itself over a batch of 130
// tokens, and a seventh of the time of an expert layer's backward.
template <int64_t kKeptBytes>
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    static thread_local Buffer kept;
    Buffer* buffer = bytes <= kKeptBytes ? &kept : &own_;
    if (buffer->bytes < bytes) {
      *buffer = Buffer{};
      buffer->data.reset(
          std::aligned_alloc(kAlign, static_cast<size_t>((bytes + kAlign - 1) / kAlign * kAlign)));
      TORCH_CHECK_WITH(OutOfMemoryError, buffer->data != nullptr, "pyvlm: no memory for ", bytes,
                       " bytes of scratch in one thread");
      prefer_huge_pages(buffer->data.get(), bytes);
      buffer->bytes = bytes;
    }
    data_ = buffer->data.get();
  }

  Arena arena() const { return Arena(data_); }

 private:
  static constexpr int64_t kAlign = 64;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> data;
    int64_t bytes = 0;
  };
  Buffer own_;
  void* data_;
};

using ThreadScratch = Scratch<8 << 20>;  // of one thread among those that work on a call
using CallScratch = Scratch<256 << 20>;  // of the thread that calls, for all of them

}  // namespace pyvlm
