// Qwen-VL's resampler: one cross-attention of learned queries to a map, made of differentiable ops.
//
// Letters, as in pyvlm/ops/cross_attention.py: N images, T tokens of a map, Q queries, E embedding, A heads,
// D features of a head.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace pyvlm {

// [N, Q, E] of features [N, T, E], query and its position [Q, E], key_position [T, E], the input projections'
// rows [3E, E] and biases [3E] in the order query, key, value, and the output projection [E, E] and [E].
at::Tensor resample(const at::Tensor& features, const at::Tensor& query, const at::Tensor& query_position,
                    const at::Tensor& key_position, const at::Tensor& in_proj_weight,
                    const at::Tensor& out_proj_weight, int64_t num_heads,
                    const std::optional<at::Tensor>& in_proj_bias,
                    const std::optional<at::Tensor>& out_proj_bias);

}  // namespace pyvlm
