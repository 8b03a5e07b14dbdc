// The torch side of gated activations: schemas, CPU kernels and the gradient, told in C++ as that of norms
// is.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "gating/gated_activation.h"

namespace pyvlm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor without_gradient(const at::Tensor& gate, const std::optional<at::Tensor>& up,
                            std::string_view activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyvlm::gated_activation", "")
                             .typed<decltype(gated_activation_cpu)>();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(gate, up, activation);
}

struct GatedActivation : torch::autograd::Function<GatedActivation> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const std::optional<at::Tensor>& up,
                            std::string_view activation) {
    ctx->save_for_backward({gate, up.value_or(at::Tensor())});
    ctx->saved_data["activation"] = std::string(activation);
    return without_gradient(gate, up, activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("pyvlm::gated_activation_backward", "")
                               .typed<decltype(gated_activation_backward_cpu)>();
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<at::Tensor> up = saved[1].defined() ? std::optional(saved[1]) : std::nullopt;
    auto [grad_gate, grad_up] = op.call(grads[0], saved[0], up, ctx->saved_data["activation"].toStringView());
    return {grad_gate, up ? grad_up : at::Tensor(), {}};
  }
};

at::Tensor with_gradient(const at::Tensor& gate, const std::optional<at::Tensor>& up,
                         std::string_view activation) {
  const bool learns = gate.requires_grad() || (up && up->requires_grad());
  return learns && at::GradMode::is_enabled() ? GatedActivation::apply(gate, up, activation)
                                              : without_gradient(gate, up, activation);
}

}  // namespace
}  // namespace pyvlm

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def("gated_activation(Tensor gate, Tensor? up, str activation) -> Tensor");
  m.def("gated_activation_(Tensor(a!) gate, Tensor? up, str activation) -> ()");
  m.def(
      "gated_activation_backward(Tensor grad_y, Tensor gate, Tensor? up, str activation) -> "
      "(Tensor grad_gate, Tensor grad_up)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("gated_activation", &pyvlm::gated_activation_cpu);
  m.impl("gated_activation_", &pyvlm::gated_activation_inplace_cpu);
  m.impl("gated_activation_backward", &pyvlm::gated_activation_backward_cpu);
}

TORCH_LIBRARY_IMPL(pyvlm, Autograd, m) { m.impl("gated_activation", &pyvlm::with_gradient); }
