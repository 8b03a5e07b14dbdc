// Image rows into the token sequence on CPU: the functions that are registered as torch ops.
//
// Letters, as in pyvlm/ops/placement.py: B samples, L tokens, H features of a token, R image feature rows, C
// features of such a row, S placeholders, P feature rows side by side in a placeholder (H = P C).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace pyvlm {

// [S, P C]: row s is made of the feature rows index[s], or the newline where that is -1. index [S] or [S, P].
at::Tensor pack_image_tokens_cpu(const at::Tensor& features, const at::Tensor& index,
                                 const std::optional<at::Tensor>& newline);

// Gradients of features and newline; empty where `needs` is false.
std::tuple<at::Tensor, at::Tensor> pack_image_tokens_backward_cpu(const at::Tensor& grad,
                                                                  const at::Tensor& index,
                                                                  int64_t num_features, int64_t feature_width,
                                                                  std::array<bool, 2> needs);

// [B, L, H]: text, with the packed row s at placeholder s; without an index that is feature row s.
at::Tensor place_image_tokens_cpu(const at::Tensor& text, const at::Tensor& features,
                                  const at::Tensor& image_mask, const std::optional<at::Tensor>& index,
                                  const std::optional<at::Tensor>& newline);

// Gradients of text, features and newline; empty where `needs` is false.
std::tuple<at::Tensor, at::Tensor, at::Tensor> place_image_tokens_backward_cpu(
    const at::Tensor& grad, const at::Tensor& image_mask, const std::optional<at::Tensor>& index,
    int64_t num_features, int64_t feature_width, std::array<bool, 3> needs);

// [B, L, H]: hidden, with updates [S, H] added at the placeholders.
at::Tensor add_at_image_tokens_cpu(const at::Tensor& hidden, const at::Tensor& updates,
                                   const at::Tensor& image_mask);

// The gradient of the updates: the rows of grad at the placeholders.
at::Tensor add_at_image_tokens_backward_cpu(const at::Tensor& grad, const at::Tensor& image_mask,
                                            int64_t num_updates);

}  // namespace pyvlm
