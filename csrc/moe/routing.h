// Routers on CPU: the functions that are registered as torch ops, and what they hand to the kernels.
//
// Letters, as in pyvlm/ops/moe.py: T tokens, E experts, S slots (token, expert), G groups of consecutive
// tokens. A slot list is sorted by expert and, within an expert, by token.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "common/isa.h"

namespace pyvlm {

// weight [S], token [S], expert_offsets [E + 1], token_offsets [T + 1], slot [S]. The one that is
// differentiable comes first, without which torch's opcheck fails.
using RoutingTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Where all tokens are one group, `slots` alone tells how many each expert takes.
RoutingTensors expert_choice_cpu(const at::Tensor& logits, const std::optional<at::Tensor>& given_capacity,
                                 const std::optional<at::Tensor>& given_offsets,
                                 std::optional<int64_t> slots_in_all);
RoutingTensors token_choice_cpu(const at::Tensor& logits, int64_t top_k, std::optional<int64_t> capacity,
                                bool normalize, std::string_view drop, const std::optional<at::Tensor>& bias);
RoutingTensors threshold_choice_cpu(const at::Tensor& logits, const at::Tensor& thresholds);

// The gradient of the logits, whichever router made the slots.
at::Tensor routing_backward_cpu(const at::Tensor& grad_weight, const at::Tensor& logits,
                                const at::Tensor& token, const at::Tensor& weight,
                                const at::Tensor& expert_offsets, bool normalize);

// One routing out of several, rows[i] being where the tokens of the i-th lie in the whole. In place of the
// weights the order that brings the parts' weights, one behind the other, into that of the slots.
RoutingTensors merge_routings_cpu(at::TensorList token, at::TensorList expert_offsets, at::TensorList rows,
                                  int64_t num_tokens);

// One slot a choice: expert index[t, k] works on token t. In place of the weights the choice, t K + k, that
// each slot is. A choice of `num_experts` or above is no slot where such are dropped, and else an error.
RoutingTensors routing_from_choices_cpu(const at::Tensor& index, int64_t num_experts, bool drop_out_of_range);

// token_offsets and slot: the slot list sorted by token.
std::tuple<at::Tensor, at::Tensor> sort_by_token(const at::Tensor& token, const at::Tensor& expert_offsets,
                                                 int64_t num_tokens);

// [T, E], rows `stride` elements apart.
struct Logits {
  const void* data;
  int64_t tokens, experts, stride;
  at::ScalarType dtype;
};

// Made by a kernel, which knows the number of slots. Undefined where a row of the logits has no softmax.
struct SlotList {
  at::Tensor token, weight, expert_offsets;
};

struct ExpertChoice {
  Logits logits;
  int64_t groups;
  const int64_t* capacity;  // [G]
  const int64_t* offsets;   // [G + 1]
};

struct TokenChoice {
  Logits logits;
  int64_t top_k;
  int64_t capacity;    // at least T where there is none
  bool by_position;    // what is dropped beyond the capacity: later choices, or smaller probabilities
  const double* bias;  // [E], or null
};

struct ThresholdChoice {
  Logits logits;
  const double* thresholds;  // [E]
};

struct RoutingBackward {
  Logits logits;
  const int32_t* token;
  const int32_t* expert_offsets;
  const void* weight;
  const void* grad_weight;
  bool normalize;
  void* grad_logits;  // [T, E], contiguous, of the logits' dtype
};

PYVLM_DECLARE_FOR_EACH_ISA(void expert_choice(const ExpertChoice&, SlotList&);
                           void token_choice(const TokenChoice&, SlotList&);
                           void threshold_choice(const ThresholdChoice&, SlotList&);
                           void routing_backward(const RoutingBackward&))

}  // namespace pyvlm
