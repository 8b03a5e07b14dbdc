// What CUDA adds to C++, on the host: every thread of a block is a fiber, and fibers change only where
// threads wait for each other. So a run is repeatable, and what depends on the order of threads between two
// barriers shows where they run in the opposite order. Barriers and warp functions that not all threads
// reach, which hang or corrupt on a GPU, are errors.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__  // static variables, of which one block at a time makes use
#define __launch_bounds__(...)

using std::exp;
using std::fabs;
using std::min;
using std::signbit;

struct Dimension {
  unsigned x;
};
inline Dimension threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr int kWarp = 32;
enum class State { kRuns, kAtWarp, kAtBlock, kTrapped, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  bool started;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  State state;
  int function;    // of the warp, that it waits in
  uint64_t value;  // that it shows to its warp
};

inline std::vector<Fiber> fibers(1024);
inline std::vector<uint64_t> shown(1024);  // values of the warps' last exchange
inline jmp_buf scheduler;
inline std::function<void()> body;
inline bool reversed;  // the order in which threads, and blocks, run

// setjmp changes fibers without a system call, which swapcontext makes: 3 times as fast on the whole.
inline void wait(State state) {
  Fiber& self = fibers[threadIdx.x];
  self.state = state;
  if (_setjmp(self.here) == 0) {
    _longjmp(scheduler, 1);
  }
}

inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) {
      _longjmp(fiber.here, 1);
    }
    fiber.started = true;
    setcontext(&fiber.start);
  }
}

inline void enter() {
  body();
  wait(State::kDone);
}

enum Function { kBallot, kShuffle, kMatch, kBarrier };

// Shows a value to the warp, and returns what its lanes show.
inline const uint64_t* exchange(Function function, uint64_t value) {
  fibers[threadIdx.x].function = function;
  fibers[threadIdx.x].value = value;
  wait(State::kAtWarp);
  return &shown[threadIdx.x / kWarp * kWarp];
}

// Whether a range of fibers all wait for this; they run again then.
inline bool release(int first, int count, State state) {
  const auto begin = fibers.begin() + first, end = begin + count;
  if (!std::all_of(begin, end, [state](const Fiber& f) { return f.state == state; })) {
    return false;
  }
  std::for_each(begin, end, [](Fiber& f) { f.state = State::kRuns; });
  return true;
}

inline bool exchange_values(int first) {
  if (!release(first, kWarp, State::kAtWarp)) {
    return false;
  }
  for (int i = first; i < first + kWarp; ++i) {
    if (fibers[i].function != fibers[first].function) {
      throw std::runtime_error("the lanes of a warp wait in different functions");
    }
    shown[i] = fibers[i].value;
  }
  return true;
}

// A warp runs as far as it can before another one does: one that is ahead by a barrier too few is so at once.
inline void run_warp(int first) {
  do {
    for (int i = 0; i < kWarp; ++i) {
      threadIdx.x = first + (reversed ? kWarp - 1 - i : i);
      if (fibers[threadIdx.x].state == State::kRuns) {
        resume(fibers[threadIdx.x]);
      }
      if (fibers[threadIdx.x].state == State::kTrapped) {
        throw std::runtime_error("trap");
      }
    }
  } while (exchange_values(first));
}

inline void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::kRuns;
    fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.start, enter, 0);
  }
  do {
    for (int first = 0; first < threads; first += kWarp) {
      run_warp(reversed ? threads - kWarp - first : first);
    }
  } while (release(0, threads, State::kAtBlock));
  if (!release(0, threads, State::kDone)) {
    throw std::runtime_error("a barrier or warp function that not all threads reach");
  }
}

// Launches kernels one after the other, on memory that holds garbage at first.
struct Launch {
  unsigned char* dynamic_memory;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int blocks, int threads, size_t bytes,
                  const Arguments&... arguments) const {
    if (blocks < 1 || threads < kWarp || threads > 1024 || threads % kWarp != 0) {
      throw std::runtime_error("a launch without whole warps or blocks");
    }
    body = [&] { kernel(arguments...); };
    blockDim.x = threads;
    gridDim.x = blocks;
    for (int i = 0; i < blocks; ++i) {
      std::memset(dynamic_memory, 0x7f, bytes);
      blockIdx.x = reversed ? blocks - 1 - i : i;
      run_block(threads);
    }
  }
};

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::State::kAtBlock); }

[[noreturn]] inline void __trap() {
  emulated::wait(emulated::State::kTrapped);
  __builtin_unreachable();
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* votes = emulated::exchange(emulated::kBallot, vote);
  unsigned word = 0;
  for (int lane = 0; lane < emulated::kWarp; ++lane) {
    word |= static_cast<unsigned>(votes[lane]) << lane;
  }
  return word;
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return static_cast<T>(emulated::exchange(emulated::kShuffle, static_cast<uint64_t>(value))[source]);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = threadIdx.x % emulated::kWarp;
  return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}

template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  const uint64_t own = static_cast<uint64_t>(value), *values = emulated::exchange(emulated::kMatch, own);
  unsigned word = 0;
  for (int lane = 0; lane < emulated::kWarp; ++lane) {
    word |= static_cast<unsigned>(values[lane] == own) << lane;
  }
  return word;
}

inline void __syncwarp() { emulated::exchange(emulated::kBarrier, 0); }

inline int __popc(unsigned word) { return __builtin_popcount(word); }

template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}

template <typename T>
T atomicOr(T* at, T value) {
  const T old = *at;
  *at |= value;
  return old;
}
