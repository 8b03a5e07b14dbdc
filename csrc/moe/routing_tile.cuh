// What the kernels of routers share: sums over a block, and a tile of logits in shared memory of which each
// thread works on one row. As moe/routing_cuda.cuh it needs no header of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyvlm::routing {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kRows = 128;  // threads that share a tile of logits, of one row each at most

alignas(16) extern __shared__ unsigned char dynamic_memory[];

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ inline unsigned lanes_below() { return (1u << lane_of_thread()) - 1; }

// The sum over the threads before this one, and over all of the block, which is whole warps.
__device__ inline int exclusive_sum(int value, int& total) {
  static __shared__ int sum_of_warp[kWarp];
  const int lane = lane_of_thread(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto scan = [lane](int x) {
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, x, distance);
      x += lane >= distance ? other : 0;
    }
    return x;
  };
  const int inclusive = scan(value);
  if (lane == kWarp - 1) {
    sum_of_warp[warp] = inclusive;
  }
  __syncthreads();
  const bool exists = lane < static_cast<int>(blockDim.x) / kWarp;
  const int warps = scan(exists ? sum_of_warp[lane] : 0);
  __syncthreads();
  total = __shfl_sync(kAllLanes, warps, kWarp - 1);
  const int warps_before = __shfl_sync(kAllLanes, warps, warp == 0 ? 0 : warp - 1);
  return inclusive - value + (warp == 0 ? 0 : warps_before);
}

__device__ inline int block_sum(int value) {
  int total;
  exclusive_sum(value, total);
  return total;
}

// Neighbouring rows of a tile start in different banks.
__host__ __device__ inline int row_stride(int experts) { return experts | 1; }

// Visits a tile of consecutive rows in the order of global memory: visit(place in memory, place in the tile).
template <typename Visit>
__device__ void visit_tile(int rows, int experts, const Visit& visit) {
  const int threads = blockDim.x, stride = row_stride(experts);
  int row = threadIdx.x / experts, column = threadIdx.x % experts;
  const int rows_on = threads / experts, columns_on = threads % experts;
  for (int i = threadIdx.x; i < rows * experts; i += threads) {
    visit(i, row * stride + column);
    row += rows_on;
    column += columns_on;
    if (column >= experts) {
      column -= experts;
      ++row;
    }
  }
}

// One thread, one row, always in the same order: equal rows have equal probabilities.
template <typename Prob>
__device__ void softmax(Prob* row, int experts) {
  Prob largest = row[0], sum = 0;
  for (int e = 1; e < experts; ++e) {
    largest = row[e] > largest ? row[e] : largest;
  }
  for (int e = 0; e < experts; ++e) {
    sum += row[e] = exp(row[e] - largest);
  }
  const Prob scale = 1 / sum;
  for (int e = 0; e < experts; ++e) {
    row[e] = fabs(row[e] * scale);  // NaN may have a sign, which would be taken for a mark
  }
}

// Rows of a tile, whole warps: as many as keep below the 48 KiB that a block gets without asking for more.
inline int tile_rows(int experts, size_t bytes) {
  int rows = kRows;
  while (rows > kWarp && rows * row_stride(experts) * bytes > 48 * 1024) {
    rows /= 2;
  }
  return rows;
}

}  // namespace pyvlm::routing
