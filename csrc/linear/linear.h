// Linear layers: y = x Wᵀ + b. The two functions that are registered as torch ops, and the products that
// other ops are made of.
//
// Letters, as in pyvlm/ops/linear.py: M tokens in any number of dimensions, K features of x, N features of y.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "common/isa.h"

namespace pyvlm {

// y [.., N] of x [.., K], weight [N, K] and bias [N].
at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// Gradients of x, weight and bias; empty where `needs` is false.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_cpu(const at::Tensor& grad_y,
                                                                   const at::Tensor& x,
                                                                   const at::Tensor& weight,
                                                                   std::array<bool, 3> needs);

// The same on any device, written to where it is wanted: a slice of tokens or of a weight's columns will do.
// y (+)= x Wᵀ + b
void linear_into(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight,
                 const std::optional<at::Tensor>& bias, bool accumulate = false);
// grad_x = grad_y W
void linear_grad_x_into(const at::Tensor& grad_x, const at::Tensor& grad_y, const at::Tensor& weight);
// grad_weight = grad_yᵀ x
void linear_grad_weight_into(const at::Tensor& grad_weight, const at::Tensor& grad_y, const at::Tensor& x);
// grad_b = the sum of grad_y over tokens
at::Tensor linear_grad_bias(const at::Tensor& grad_y);

// A row-major matrix: blocks of `block` rows, `block_stride` elements apart, rows `ld` apart.
struct Rows {
  void* data;
  int64_t ld, block, block_stride;
};

// out[R, C] (+)= A[R, D] · B[D, C] + bias[C].
struct LinearProduct {
  int64_t R, C, D;
  Rows a, b, out;
  bool a_transposed, b_transposed;  // a holds [D, R], b holds [C, D]
  const void* bias;                 // or null
  bool accumulate;
  at::ScalarType dtype;  // float32 or float16
};

// y[M, N] = x[M, K] · weight[N, K]ᵀ + bias[N] of up to kMostFewTokens tokens; rows of the weight lie `ld`
// apart, all else is contiguous.
inline constexpr int64_t kMostFewTokens = 8;
struct FewTokens {
  int64_t M, N, K;
  const float* x;
  const void* weight;
  int64_t ld;
  const void* bias;  // or null
  void* y;
  at::ScalarType dtype;  // of the weight, the bias and y: float32, bfloat16 or float16
};

PYVLM_DECLARE_FOR_EACH_ISA(void linear_product(const LinearProduct&); void linear_few(const FewTokens&))

}  // namespace pyvlm
