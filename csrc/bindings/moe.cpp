// The torch side of mixture of experts: schemas, CPU kernels and autocast rules.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "moe/expert_mlp.h"
#include "moe/routing.h"

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def(
      "expert_choice(Tensor logits, Tensor? capacity, Tensor? group_offsets, SymInt? slots=None) -> (Tensor "
      "weight, Tensor token, Tensor expert_offsets, Tensor token_offsets, Tensor slot)");
  m.def(
      "token_choice(Tensor logits, int top_k, int? capacity, bool normalize, str drop, Tensor? bias) -> "
      "(Tensor weight, Tensor token, Tensor expert_offsets, Tensor token_offsets, Tensor slot)");
  m.def(
      "threshold_choice(Tensor logits, Tensor thresholds) -> (Tensor weight, Tensor token, "
      "Tensor expert_offsets, Tensor token_offsets, Tensor slot)");
  m.def(
      "routing_backward(Tensor grad_weight, Tensor logits, Tensor token, Tensor weight, "
      "Tensor expert_offsets, bool normalize) -> Tensor");
  m.def(
      "merge_routings(Tensor[] token, Tensor[] expert_offsets, Tensor[] rows, int num_tokens) -> "
      "(Tensor order, Tensor token, Tensor expert_offsets, Tensor token_offsets, Tensor slot)");
  m.def(
      "routing_from_choices(Tensor index, int num_experts, bool drop_out_of_range) -> "
      "(Tensor order, Tensor token, Tensor expert_offsets, Tensor token_offsets, Tensor slot)");
  m.def(
      "expert_mlp(Tensor x, Tensor token, Tensor weight, Tensor expert_offsets, Tensor token_offsets, Tensor "
      "slot, Tensor gate_up, Tensor down, str activation, bool gated, Tensor? gate_up_bias, Tensor? "
      "down_bias, bool keep_hidden) -> (Tensor y, Tensor hidden)");
  m.def(
      "expert_mlp_backward(Tensor grad_y, Tensor x, Tensor hidden, Tensor token, Tensor weight, Tensor "
      "expert_offsets, Tensor token_offsets, Tensor slot, Tensor gate_up, Tensor down, str activation, bool "
      "gated, Tensor? gate_up_bias, Tensor? down_bias, bool[6] needs) -> (Tensor grad_x, Tensor grad_weight, "
      "Tensor grad_gate_up, Tensor grad_down, Tensor grad_gate_up_bias, Tensor grad_down_bias)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("expert_choice", &pyvlm::expert_choice_cpu);
  m.impl("token_choice", &pyvlm::token_choice_cpu);
  m.impl("threshold_choice", &pyvlm::threshold_choice_cpu);
  m.impl("routing_backward", &pyvlm::routing_backward_cpu);
  m.impl("merge_routings", &pyvlm::merge_routings_cpu);
  m.impl("routing_from_choices", &pyvlm::routing_from_choices_cpu);
  m.impl("expert_mlp", &pyvlm::expert_mlp_cpu);
  m.impl("expert_mlp_backward", &pyvlm::expert_mlp_backward_cpu);
}

namespace {

// Tokens and experts in autocast's type, as torch's own linear does; the slots' weights as they are.
template <at::DeviceType device, c10::DispatchKey key>
std::tuple<at::Tensor, at::Tensor> expert_mlp_autocast(
    const at::Tensor& x, const at::Tensor& token, const at::Tensor& weight, const at::Tensor& expert_offsets,
    const at::Tensor& token_offsets, const at::Tensor& slot, const at::Tensor& gate_up,
    const at::Tensor& down, std::string_view activation, bool gated,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    bool keep_hidden) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyvlm::expert_mlp", "")
                             .typed<decltype(pyvlm::expert_mlp_cpu)>();
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  const auto cast_bias = [&](const std::optional<at::Tensor>& t) {
    return t.has_value() ? std::optional<at::Tensor>(cast(*t)) : t;
  };
  return op.call(cast(x), token, weight, expert_offsets, token_offsets, slot, cast(gate_up), cast(down),
                 activation, gated, cast_bias(gate_up_bias), cast_bias(down_bias), keep_hidden);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyvlm, AutocastCPU, m) {
  m.impl("expert_mlp", &expert_mlp_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(pyvlm, AutocastCUDA, m) {
  m.impl("expert_mlp", &expert_mlp_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}
