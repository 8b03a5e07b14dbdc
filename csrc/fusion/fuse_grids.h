// Maps of several encoders brought into one sequence, on any device: made of torch's ops and of linear
// layers that write where they are wanted.
//
// Letters, as in pyvlm/ops/fusion.py: N images, T tokens of a map, C channels of a map, H output features.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace pyvlm {

// [N, T, H] of maps [N, T_i, C_i] on `grids` (rows and columns of one map after another), brought to the
// target grid; [N, T, ΣC_i] without a weight [H, ΣC_i].
at::Tensor fuse_grids(at::TensorList features, at::IntArrayRef grids, at::IntArrayRef target,
                      const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                      std::string_view mode, bool align_corners);

// Gradients of features, weight and bias, which `needs` names in this order; empty where it is false.
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> fuse_grids_backward(
    const at::Tensor& grad_y, at::TensorList features, at::IntArrayRef grids, at::IntArrayRef target,
    const std::optional<at::Tensor>& weight, std::string_view mode, bool align_corners,
    const std::vector<bool>& needs);

// [N, ΣT_i / m_i, H] of maps [N, T_i, C_i] and weights [H, m_i C_i]. A bias is [H], or [0] where there is
// none.
at::Tensor patches_to_token(at::TensorList features, at::TensorList weights, at::TensorList biases,
                            at::IntArrayRef patches);

// Gradients of features, weights and biases, which `needs` names in this order; empty where it is false.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>
patches_to_token_backward(const at::Tensor& grad_y, at::TensorList features, at::TensorList weights,
                          at::IntArrayRef patches, const std::vector<bool>& needs);

}  // namespace pyvlm
