// Masks of models have few runs a row: memchr finds their ends at the speed of memory, on any processor.
#include "attention/mask_runs.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/empty.h"

namespace pyvlm {
namespace {

// From `start` on the first key that is seen, or not seen; K where there is none.
int64_t find(const bool* row, bool seen, int64_t start, int64_t K) {
  if (start == K) {
    return K;
  }
  const void* place = std::memchr(row + start, seen, K - start);
  return place == nullptr ? K : static_cast<const bool*>(place) - row;
}

struct RowResult {
  int32_t* first;  // [2]
  int32_t* rest;   // [2]
  int32_t* count;
  bool* beyond;  // [K], of all rows of a batch element
};

void look_through(const bool* row, int64_t K, const RowResult& result) {
  const int64_t lo = find(row, true, 0, K), hi = find(row, false, lo, K);
  const auto run = lo < hi ? std::pair(lo, hi) : std::pair<int64_t, int64_t>(0, 0);
  int64_t count = 0, rest_lo = 0, rest_hi = 0;
  for (int64_t start = find(row, true, hi, K); start < K; start = find(row, true, rest_hi, K)) {
    rest_lo = count == 0 ? start : rest_lo;
    rest_hi = find(row, false, start, K);
    count += rest_hi - start;
    std::memset(result.beyond + start, true, rest_hi - start);
  }
  result.first[0] = static_cast<int32_t>(run.first);
  result.first[1] = static_cast<int32_t>(run.second);
  result.rest[0] = static_cast<int32_t>(rest_lo);
  result.rest[1] = static_cast<int32_t>(rest_hi);
  *result.count = static_cast<int32_t>(count);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mask_runs_cpu(const at::Tensor& seen) {
  TORCH_CHECK(seen.dim() == 3 && seen.scalar_type() == at::kBool, "mask_runs: seen is ", seen.scalar_type(),
              " ", seen.sizes(), "; expected bool [batch, queries, keys]");
  const at::Tensor held = seen.stride(2) == 1 || seen.size(2) <= 1 ? seen : seen.contiguous();
  const int64_t B = held.size(0), Q = held.size(1), K = held.size(2);
  const at::TensorOptions ints = held.options().dtype(at::kInt);
  const at::Tensor first = make_empty({B, Q, 2}, ints), rest = make_empty({B, Q, 2}, ints);
  const at::Tensor count = make_empty({B, Q}, ints);

  // Each part has keys of its own to mark, so that no two threads write to one place. A second thread is
  // worth it from 2 MB on: 30 us in place of 44.
  constexpr int64_t kWorthAThread = 1 << 20;
  const int64_t rows = B * Q;
  const int64_t parts = std::clamp<int64_t>(rows * K / kWorthAThread, 1, at::get_num_threads());
  const at::Tensor beyond = at::zeros({parts, B, K}, held.options());

  const bool* data = held.const_data_ptr<bool>();
  auto* firsts = first.mutable_data_ptr<int32_t>();
  auto* rests = rest.mutable_data_ptr<int32_t>();
  auto* counts = count.mutable_data_ptr<int32_t>();
  auto* marks = beyond.mutable_data_ptr<bool>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
        const int64_t b = row / Q, q = row % Q;
        look_through(data + b * held.stride(0) + q * held.stride(1), K,
                     {firsts + 2 * row, rests + 2 * row, counts + row, marks + (part * B + b) * K});
      }
    }
  });
  return {first, rest, count, parts == 1 ? beyond.squeeze(0) : beyond.any(0)};
}

}  // namespace pyvlm
