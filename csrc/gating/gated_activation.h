// Gated activations: y = act(gate) · up, or act(gate) where there is no up. The three functions that are
// registered as torch ops, and the kernels' view of their tensors.
//
// Letters, as in pyvlm/ops/gating.py: any dimensions before I, the channels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "common/activation.h"
#include "common/isa.h"

namespace pyvlm {

// y [.., I] of gate and up [.., I].
at::Tensor gated_activation_cpu(const at::Tensor& gate, const std::optional<at::Tensor>& up,
                                std::string_view activation);

// The same, written over gate.
void gated_activation_inplace_cpu(at::Tensor& gate, const std::optional<at::Tensor>& up,
                                  std::string_view activation);

// Gradients of gate and up; that of an up that is not there has no elements.
std::tuple<at::Tensor, at::Tensor> gated_activation_backward_cpu(const at::Tensor& grad_y,
                                                                 const at::Tensor& gate,
                                                                 const std::optional<at::Tensor>& up,
                                                                 std::string_view activation);

// Rows of I elements, `ld` apart.
struct GatedRows {
  const void* data;
  int64_t ld;
};

// Outputs may be the inputs themselves: every element is read before it is written. No up: `up.data` is null.
struct GatedProblem {
  int64_t rows, channels;
  Activation activation;
  at::ScalarType dtype;
  GatedRows gate, up;
};

PYVLM_DECLARE_FOR_EACH_ISA(void gated_activation(const GatedProblem&, void* y, int64_t y_ld);
                           void gated_activation_backward(const GatedProblem&, const GatedRows& grad_y,
                                                          void* grad_gate, void* grad_up))

}  // namespace pyvlm
