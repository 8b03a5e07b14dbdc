// RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x²) + eps) · scale, where the scale is the weight, or 1 + the
// weight (Gemma). The functions that are registered as torch ops, and the kernels' view of their tensors.
//
// Letters, as in pyvlm/ops/norm.py: any dimensions before C, the channels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "common/isa.h"

namespace pyvlm {

// y like x [.., C], and what each of its rows was multiplied by, rstd [..].
std::tuple<at::Tensor, at::Tensor> rms_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                double eps, bool unit_offset);

// Gradients of x and of the weight; one that is not wanted is empty.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x,
                                                         const std::optional<at::Tensor>& weight,
                                                         const at::Tensor& rstd, bool unit_offset,
                                                         bool want_x, bool want_weight);

// The scale and the sums of its gradient have rows of a multiple of this, so that vectors never end beyond
// them.
inline constexpr int64_t kScaleStep = 32;

// Rows one behind the other. Scale, rstd and the sums of the weight's gradient are of the dtype that is
// computed in: float64 for float64, else float32.
struct NormProblem {
  int64_t rows, channels;
  at::ScalarType dtype;
  const void* x;
  const void* scale;

  int64_t padded_channels() const { return (channels + kScaleStep - 1) / kScaleStep * kScaleStep; }
};

// The gradient of the weight is summed over chunks of rows, whatever the threads, and those in their order:
// so it has the same bits for any number of threads.
struct NormChunks {
  int64_t count, rows;
};

PYVLM_DECLARE_FOR_EACH_ISA(void rms_norm(const NormProblem&, double eps, void* y, void* rstd);
                           void rms_norm_backward(const NormProblem&, const void* grad_y, const void* rstd,
                                                  const NormChunks&, void* grad_x, void* weight_sums))

}  // namespace pyvlm
