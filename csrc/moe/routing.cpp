// Tensors in, tensors out: checks what the kernels rely on, and what only a look at the values tells.
#include "moe/routing.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#include "common/parallel.h"

namespace pyvlm {
namespace {

// Logits whose rows are contiguous, and the tensor that holds them.
struct Held : Logits {
  at::Tensor tensor;
};

Held hold(const at::Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 &&
                  (logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16 ||
                   logits.scalar_type() == at::kHalf || logits.scalar_type() == at::kDouble),
              "router: logits are ", logits.scalar_type(), " ", logits.sizes(),
              "; expected [tokens, experts] in one of float32, bfloat16, float16, float64");
  TORCH_CHECK(logits.numel() <= std::numeric_limits<int32_t>::max(), "router: logits are ", logits.sizes(),
              "; expected less than 2^31 of them, so that slots can be numbered in 32 bits");
  Held held;
  held.tensor = logits.stride(1) == 1 ? logits : logits.contiguous();
  held.data = held.tensor.const_data_ptr();
  held.tokens = logits.size(0);
  held.experts = logits.size(1);
  held.stride = held.tensor.stride(0);
  held.dtype = logits.scalar_type();
  return held;
}

// One number an expert, in float64, which holds all other types.
at::Tensor of_experts(const char* name, const at::Tensor& vector, int64_t experts) {
  TORCH_CHECK(vector.sizes() == at::IntArrayRef({experts}) && at::isFloatingType(vector.scalar_type()),
              "router: ", name, " is ", vector.scalar_type(), " ", vector.sizes(), "; expected floating [",
              experts, "]");
  const at::Tensor wide = vector.to(at::kDouble).contiguous();
  const double* values = wide.const_data_ptr<double>();
  const double* nan = std::find_if(values, values + experts, [](double x) { return std::isnan(x); });
  TORCH_CHECK_VALUE(nan == values + experts, name, " holds NaN for expert ", nan - values);
  return wide;
}

void check_group_offsets(const int64_t* offsets, int64_t count, int64_t tokens) {
  if (offsets[0] == 0 && offsets[count - 1] == tokens && std::is_sorted(offsets, offsets + count)) {
    return;
  }
  std::ostringstream shown;
  for (int64_t i = 0; i < std::min<int64_t>(count, 8); ++i) {
    shown << (i > 0 ? ", " : "") << offsets[i];
  }
  TORCH_CHECK_VALUE(false, "group_offsets must rise from 0 to ", tokens,
                    ", the number of rows of the logits, got [", shown.str(), "]", count > 8 ? " …" : "",
                    " ending in ", offsets[count - 1]);
}

[[noreturn]] void refuse(const at::Tensor& logits) {
  // NaN and +inf come through the maximum, and so does a row of nothing but -inf.
  const at::Tensor bad = logits.amax(1).isfinite().logical_not();
  const int64_t row = bad.to(at::kByte).argmax().item<int64_t>();
  const at::Tensor values = logits[row].to(at::kDouble).contiguous();
  std::ostringstream shown;
  for (int64_t e = 0; e < values.size(0); ++e) {
    shown << (e > 0 ? ", " : "") << values.const_data_ptr<double>()[e];
  }
  TORCH_CHECK_VALUE(false, bad.sum().item<int64_t>(), " of ", logits.size(0),
                    " rows of the logits hold NaN, +inf or nothing but -inf, row ", row, " first ([",
                    shown.str(), "]): the training has diverged or the router's input is broken");
}

RoutingTensors finished(const Held& logits, const SlotList& slots) {
  if (!slots.token.defined()) {
    refuse(logits.tensor);
  }
  auto [token_offsets, slot] = sort_by_token(slots.token, slots.expert_offsets, logits.tokens);
  return {slots.weight, slots.token, slots.expert_offsets, token_offsets, slot};
}

// Divides each token's weights by their sum, taken in the order of its experts.
template <typename acc_t>
void normalize_weights(const RoutingTensors& routing, double eps) {
  acc_t* weight = std::get<0>(routing).mutable_data_ptr<acc_t>();
  const int32_t* start = std::get<3>(routing).const_data_ptr<int32_t>();
  const int32_t* slot = std::get<4>(routing).const_data_ptr<int32_t>();
  constexpr int64_t kTokensWorthAThread = 4096;
  at::parallel_for(0, std::get<3>(routing).size(0) - 1, kTokensWorthAThread, [&](int64_t t, int64_t end) {
    for (; t < end; ++t) {
      acc_t sum = 0;
      for (int32_t i = start[t]; i < start[t + 1]; ++i) {
        sum += weight[slot[i]];
      }
      sum = std::max(sum, static_cast<acc_t>(eps));
      for (int32_t i = start[t]; i < start[t + 1]; ++i) {
        weight[slot[i]] /= sum;
      }
    }
  });
}

}  // namespace

RoutingTensors expert_choice_cpu(const at::Tensor& logits, const std::optional<at::Tensor>& given_capacity,
                                 const std::optional<at::Tensor>& given_offsets,
                                 std::optional<int64_t> slots_in_all) {
  const Held held = hold(logits);
  TORCH_CHECK(given_capacity.has_value() == given_offsets.has_value() &&
                  (given_capacity.has_value() || slots_in_all.has_value()),
              "expert_choice: expected capacity and group_offsets, or slots where all tokens are one group");
  const auto ints = logits.options().dtype(at::kLong);
  const int64_t of_one_group = std::max<int64_t>(slots_in_all.value_or(0) / held.experts, 1);
  const at::Tensor capacity =
      given_capacity.has_value() ? *given_capacity : at::full({1}, of_one_group, ints);
  const at::Tensor group_offsets =
      given_offsets.has_value() ? *given_offsets : at::arange(2, ints) * held.tokens;
  const int64_t groups = capacity.numel();
  TORCH_CHECK(capacity.dim() == 1 && group_offsets.sizes() == at::IntArrayRef({groups + 1}) &&
                  at::isIntegralType(capacity.scalar_type(), false) &&
                  at::isIntegralType(group_offsets.scalar_type(), false),
              "expert_choice: capacity is ", capacity.scalar_type(), " ", capacity.sizes(),
              " and group_offsets ", group_offsets.scalar_type(), " ", group_offsets.sizes(),
              "; expected integers [G] and [G + 1]");
  const at::Tensor capacities = capacity.to(at::kLong).contiguous(),
                   offsets = group_offsets.to(at::kLong).contiguous();
  const ExpertChoice args{held, groups, capacities.const_data_ptr<int64_t>(),
                          offsets.const_data_ptr<int64_t>()};
  check_group_offsets(args.offsets, groups + 1, held.tokens);
  if (groups > 0) {
    const int64_t least = *std::min_element(args.capacity, args.capacity + groups);
    TORCH_CHECK_VALUE(least >= 1, "capacity must be at least 1 in every group, got ", least);
  }
  SlotList slots;
  PYVLM_DISPATCH_ISA(expert_choice, args, slots);
  const RoutingTensors routing = finished(held, slots);
  const int64_t found = slots.token.size(0);
  TORCH_CHECK_VALUE(slots_in_all.value_or(found) == found, "num_slots is ", *slots_in_all,
                    ", but the capacities and the groups give ", found, " slots");
  return routing;
}

RoutingTensors token_choice_cpu(const at::Tensor& logits, int64_t top_k, std::optional<int64_t> capacity,
                                bool normalize, std::string_view drop,
                                const std::optional<at::Tensor>& bias) {
  const Held held = hold(logits);
  TORCH_CHECK(top_k >= 1 && top_k <= held.experts && capacity.value_or(1) >= 1 &&
                  (drop == "position" || drop == "priority"),
              "token_choice: top_k is ", top_k, " of ", held.experts, ", capacity ", capacity.value_or(1),
              ", drop ", drop);
  const at::Tensor wide_bias = bias.has_value() ? of_experts("bias", *bias, held.experts) : at::Tensor();
  const TokenChoice args{held, top_k, capacity.value_or(held.tokens), drop == "position",
                         bias.has_value() ? wide_bias.const_data_ptr<double>() : nullptr};
  SlotList slots;
  PYVLM_DISPATCH_ISA(token_choice, args, slots);
  const RoutingTensors routing = finished(held, slots);
  if (normalize && held.dtype == at::kDouble) {
    normalize_weights<double>(routing, std::numeric_limits<double>::epsilon());
  } else if (normalize) {
    normalize_weights<float>(routing, std::numeric_limits<float>::epsilon());
  }
  return routing;
}

RoutingTensors threshold_choice_cpu(const at::Tensor& logits, const at::Tensor& thresholds) {
  const Held held = hold(logits);
  const at::Tensor wide = of_experts("thresholds", thresholds, held.experts);
  SlotList slots;
  const ThresholdChoice args{held, wide.const_data_ptr<double>()};
  PYVLM_DISPATCH_ISA(threshold_choice, args, slots);
  return finished(held, slots);
}

at::Tensor routing_backward_cpu(const at::Tensor& grad_weight, const at::Tensor& logits,
                                const at::Tensor& token, const at::Tensor& weight,
                                const at::Tensor& expert_offsets, bool normalize) {
  const Held held = hold(logits);
  const auto weight_dtype = held.dtype == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(token.dim() == 1 && token.scalar_type() == at::kInt && weight.sizes() == token.sizes() &&
                  weight.scalar_type() == weight_dtype && grad_weight.sizes() == token.sizes() &&
                  expert_offsets.sizes() == at::IntArrayRef({held.experts + 1}) &&
                  expert_offsets.scalar_type() == at::kInt,
              "routing_backward: token is ", token.scalar_type(), " ", token.sizes(), ", weight ",
              weight.scalar_type(), " ", weight.sizes(), ", its gradient ", grad_weight.sizes(),
              " and expert_offsets ", expert_offsets.scalar_type(), " ", expert_offsets.sizes());
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  const at::Tensor tokens = token.contiguous(), offsets = expert_offsets.contiguous(),
                   weights = weight.contiguous(), grads = grad_weight.to(weight_dtype).contiguous();
  const RoutingBackward args{held,
                             tokens.const_data_ptr<int32_t>(),
                             offsets.const_data_ptr<int32_t>(),
                             weights.const_data_ptr(),
                             grads.const_data_ptr(),
                             normalize,
                             grad_logits.mutable_data_ptr()};
  PYVLM_DISPATCH_ISA(routing_backward, args);
  return grad_logits;
}

}  // namespace pyvlm
