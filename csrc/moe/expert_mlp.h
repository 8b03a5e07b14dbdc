// Experts on CPU: the two functions that are registered as torch ops, and what they hand to the kernels.
//
// Letters, as in pyvlm/ops/moe_experts.py: T tokens, S slots (token, expert), E experts, H hidden, I
// intermediate, U rows of gate_up an expert (2I where gated, else I).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "common/activation.h"
#include "common/isa.h"

namespace pyvlm {

// y [T, H], and the pre-activation [S, U], empty unless it is kept.
std::tuple<at::Tensor, at::Tensor> expert_mlp_cpu(const at::Tensor& x, const at::Tensor& token,
                                                  const at::Tensor& weight, const at::Tensor& expert_offsets,
                                                  const at::Tensor& token_offsets, const at::Tensor& slot,
                                                  const at::Tensor& gate_up, const at::Tensor& down,
                                                  std::string_view activation, bool gated,
                                                  const std::optional<at::Tensor>& gate_up_bias,
                                                  const std::optional<at::Tensor>& down_bias,
                                                  bool keep_hidden);

// Gradients of x, weight, gate_up, down and the biases; empty where `needs` is false.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_backward_cpu(
    const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& hidden, const at::Tensor& token,
    const at::Tensor& weight, const at::Tensor& expert_offsets, const at::Tensor& token_offsets,
    const at::Tensor& slot, const at::Tensor& gate_up, const at::Tensor& down, std::string_view activation,
    bool gated, const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    std::array<bool, 6> needs);

// Tokens of an expert up to which reading its weights takes longer than multiplying, row by row.
inline constexpr int kMaxDecodeTokens = 8;

// All tensors are contiguous. Sums, and what is marked so, are in acc_t: double for doubles, else float.
struct ExpertProblem {
  int64_t T, S, E, H, I, U;
  bool gated;
  Activation activation;
  at::ScalarType dtype;
  const int32_t *token, *expert_offsets, *token_offsets, *slot;
  const void* weight;               // [S], acc_t
  const void *x, *gate_up, *down;   // [T, H], [E, U, H], [E, H, I]
  const void *up_bias, *down_bias;  // [E, U], [E, H], or null
};

struct ExpertForward {
  ExpertProblem problem;
  void* y;       // [T, H]
  void* hidden;  // [S, U], or null
};

struct ExpertBackward {
  ExpertProblem problem;
  const void *grad_y, *hidden;          // [T, H], [S, U]
  void* grad_x;                         // [T, H]; this and the others may be null
  void* grad_weight;                    // [S], acc_t
  void *grad_gate_up, *grad_down;       // as the weights
  void *grad_up_bias, *grad_down_bias;  // as the biases
};

PYVLM_DECLARE_FOR_EACH_ISA(void expert_mlp_forward(const ExpertForward&);
                           void expert_mlp_decode(const ExpertForward&);
                           void expert_mlp_backward(const ExpertBackward&))

}  // namespace pyvlm
