// The language-model head and its loss on CPU: the two functions that are registered as torch ops, and what
// they hand to the kernels.
//
// Letters: T tokens, R of them that have a label, H features, V words.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "common/isa.h"

namespace pyvlm {

// The loss, a scalar, and log Z of every row's softmax [T], 0 where it has no label; both fp32 (fp64).
std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, int64_t ignore_index,
    const std::optional<at::Tensor>& bias, double softcap, double label_smoothing, double z_loss, bool mean);

// Gradients of hidden, weight and bias; empty where `needs` is false.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_backward_cpu(
    const at::Tensor& grad_loss, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
    int64_t ignore_index, const std::optional<at::Tensor>& bias, double softcap, double label_smoothing,
    double z_loss, bool mean, const at::Tensor& lse, std::array<bool, 3> needs);

// All tensors are contiguous. Sums, and what is marked so, are in acc_t: double for doubles, else float.
struct LossProblem {
  int64_t R, H, V;
  at::ScalarType dtype;
  const int64_t *row, *label;          // [R]: which rows have a label, and theirs
  const void *hidden, *weight, *bias;  // [T, H], [V, H], and [V] or null
  double softcap;                      // 0: none
  double label_smoothing, z_loss;
};

struct LossForward {
  LossProblem problem;
  void* lse;     // [T], acc_t; other rows are left alone
  double* loss;  // the sum over rows
};

struct LossBackward {
  LossProblem problem;
  double scale;       // the gradient of each row's loss
  const void* lse;    // [T], acc_t
  void* grad_hidden;  // [T, H]; other rows are left alone. This and the others may be null
  void *grad_weight, *grad_bias;
};

PYVLM_DECLARE_FOR_EACH_ISA(void linear_cross_entropy_forward(const LossForward&);
                           void linear_cross_entropy_backward(const LossBackward&))

}  // namespace pyvlm
