// Tasks of unequal length on torch's threads: each thread takes the next one when it is done. Which thread
// runs a task must not matter to its result.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace pyvlm {

class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}

  // The next task, or -1 where none is left.
  int64_t next() {
    const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_ ? task : -1;
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t count_;
};

// Calls worker(queue) on as many threads as `count` tasks of `work` multiply-adds each are worth. Waking the
// other threads costs about as much as a million of them: handing out single small tasks turned a call of 6
// us into 76.
template <typename Worker>
void run_tasks(int64_t count, int64_t work, const Worker& worker) {
  constexpr int64_t kWorthAThread = 1 << 20;
  const int64_t useful = count * std::max<int64_t>(work, 1) / kWorthAThread;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>({count, useful, at::get_num_threads()}));
  TaskQueue queue(count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin < end) {
      worker(queue);
    }
  });
}

// Calls function(task) for each of them.
template <typename Function>
void run_each(int64_t count, int64_t work, const Function& function) {
  run_tasks(count, work, [&](TaskQueue& queue) {
    for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
      function(task);
    }
  });
}

}  // namespace pyvlm
