// The merge of an encoder's levels on CPU: the two functions that are registered as torch ops, and what they
// hand to the kernels.
//
//   out = Σ_l α_l (W_l (γ_l ⊙ v̂_l + β_l) + b_l),  v̂_l = (v_l − mean) rstd
//
// Letters, as in pyvlm/ops/fusion.py: L levels, N images, T tokens of a map, C channels, H output features.
// Levels that share a weight are summed before it multiplies them: they are one section. With a weight of its
// own each level is a section.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/isa.h"

namespace pyvlm {

// out [N, T, H], and of each token of each level the mean and 1 / sqrt(variance + eps), [L, N * T], which are
// empty unless they are kept.
std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_levels_cpu(
    at::TensorList levels, const at::Tensor& alpha, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ln_weight,
    const std::optional<at::Tensor>& ln_bias, double eps, bool keep_statistics);

// Gradients of the levels, alpha, weight, bias, ln_weight and ln_bias; empty where `needs` is false.
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
merge_levels_backward_cpu(const at::Tensor& grad_out, at::TensorList levels, const at::Tensor& alpha,
                          const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& ln_weight,
                          const std::optional<at::Tensor>& ln_bias, const at::Tensor& mean,
                          const at::Tensor& rstd, std::array<bool, 6> needs);

// A map [N, T, C] whose channels are contiguous.
struct LevelView {
  const void* data;
  int64_t image_stride, token_stride;
};

// What is marked acc_t is double for doubles, else float; so are sums. `*_stride`: elements from one level's
// to the next one's, 0 where they share it.
struct MergeProblem {
  int64_t L, N, T, C, H, sections;
  double eps;
  at::ScalarType dtype;
  const LevelView* levels;
  const void* weight;        // [sections, H, C], contiguous
  const void* alpha;         // [L], acc_t
  const void *gamma, *beta;  // [C] or [L, C], acc_t
  int64_t gamma_stride, beta_stride;

  int64_t tokens() const { return N * T; }
  int64_t levels_of_section() const { return L / sections; }
};

struct MergeForward {
  MergeProblem problem;
  const void* bias;   // [H]: that of the levels, times alpha, acc_t
  void* out;          // [N * T, H]
  void *mean, *rstd;  // [L, N * T], acc_t, or null
};

// Gradients may be null.
struct MergeBackward {
  MergeProblem problem;
  const void* grad_out;     // [N * T, H]
  const void *mean, *rstd;  // [L, N * T], acc_t
  const void* bias;         // [H] or [L, H], acc_t, or null
  int64_t bias_stride;
  void* const* grad_levels;  // L of [N * T, C]
  void* grad_weight;         // as the weight
  // acc_t, as alpha, bias, ln_weight and ln_bias, and zero before
  void *grad_alpha, *grad_bias, *grad_gamma, *grad_beta;
};

PYVLM_DECLARE_FOR_EACH_ISA(void merge_levels_forward(const MergeForward&);
                           void merge_levels_backward(const MergeBackward&))

}  // namespace pyvlm
