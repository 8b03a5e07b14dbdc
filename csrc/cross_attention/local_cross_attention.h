// Attention of a grid's queries to their windows of several maps, on CPU: the two functions that are
// registered as torch ops, and what they hand to the kernels.
//
// Letters, as in pyvlm/ops/cross_attention.py: N images, A attention heads, Q queries, T tokens of a map, D
// head features.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/isa.h"

namespace pyvlm {

// out [N, A, Q, D], which lies as [N, Q, A, D], and lse [N, A, Q]. `masks` is empty where all keys are
// visible.
std::tuple<at::Tensor, at::Tensor> local_cross_attention_cpu(const at::Tensor& query, at::TensorList keys,
                                                             at::TensorList values, int64_t rows,
                                                             int64_t columns, at::TensorList masks,
                                                             double scale);

// Gradients of the query, the keys and the values; they lie as [N, Q, A, D] and [N, T, A, D].
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> local_cross_attention_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& query, at::TensorList keys, at::TensorList values,
    int64_t rows, int64_t columns, at::TensorList masks, double scale, const at::Tensor& out,
    const at::Tensor& lse);

// A [N, A, tokens, D] tensor: strides in elements; D is contiguous.
struct HeadRows {
  void* data = nullptr;
  int64_t image = 0, head = 0, token = 0;

  template <typename T>
  T* at(int64_t n, int64_t t) const {
    return static_cast<T*>(data) + n * image + t * token;
  }
};

struct LocalMap {
  int64_t T, side;   // a window is side × side
  const bool* mask;  // [N, T], or null where all is visible
  HeadRows key, value, grad_key, grad_value;
};

struct LocalAttention {
  int64_t N, A, Q, D, rows, columns;
  int64_t window;  // keys of a query, over all maps
  double scale;
  at::ScalarType dtype;
  std::vector<LocalMap> maps;
  HeadRows query, out;
  void* lse;  // [N, A, Q]
};

struct LocalAttentionBackward {
  LocalAttention problem;
  HeadRows grad_out, grad_query;
};

PYVLM_DECLARE_FOR_EACH_ISA(void local_cross_attention_forward(const LocalAttention&);
                           void local_cross_attention_backward(const LocalAttentionBackward&))

}  // namespace pyvlm
