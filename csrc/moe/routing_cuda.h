// Routers on CUDA: the functions that are registered as torch ops. Only headers of torch's stable ABI stand
// here, so that nvcc compiles what includes it against a torch without CUDA too.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace pyvlm {

using StableTensor = torch::stable::Tensor;
// weight [S], token [S], expert_offsets [E + 1], token_offsets [T + 1], slot [S], as the schemas have them.
using StableRouting = std::tuple<StableTensor, StableTensor, StableTensor, StableTensor, StableTensor>;

// Nothing here waits for the device, so the caller says how many slots the groups give: E times the sum of
// min(capacity, size) over the groups. Without capacity and group_offsets, which are int64 [G] and [G + 1],
// all tokens are one group, of which each expert takes slots / E.
StableRouting expert_choice_cuda(const StableTensor& logits, const std::optional<StableTensor>& capacity,
                                 const std::optional<StableTensor>& group_offsets,
                                 std::optional<int64_t> slots);

// Only without a capacity: with one the number of slots depends on the data. `drop` has no meaning then.
StableRouting token_choice_cuda(const StableTensor& logits, int64_t top_k, std::optional<int64_t> capacity,
                                bool normalize, const std::string& drop,
                                const std::optional<StableTensor>& bias);

StableTensor routing_backward_cuda(const StableTensor& grad_weight, const StableTensor& logits,
                                   const StableTensor& token, const StableTensor& weight,
                                   const StableTensor& expert_offsets, bool normalize);

// The first tensor is the choice of each slot, in place of its weight. Only where nothing is dropped: else
// the number of slots depends on the data.
StableRouting routing_from_choices_cuda(const StableTensor& index, int64_t num_experts,
                                        bool drop_out_of_range);

// The first tensor is each slot's place in the parts' lists, one behind the other.
StableRouting merge_routings_cuda(const std::vector<StableTensor>& token,
                                  const std::vector<StableTensor>& expert_offsets,
                                  const std::vector<StableTensor>& rows, int64_t num_tokens);

}  // namespace pyvlm
