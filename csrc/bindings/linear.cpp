// The torch side of linear layers: schemas, CPU kernels, the gradient and autocast rules.
//
// The gradient is told in C++, as that of norms: a decoded token meets seven linear layers a layer of its
// model, and the way through torch.library's Python takes 25 us each while the caches are full of weights.
#include "linear/linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace pyvlm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor call_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("pyvlm::linear", "").typed<decltype(linear_cpu)>();
  return op.call(x, weight, bias);
}

at::Tensor without_gradient(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_linear(x, weight, bias);
}

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
    ctx->save_for_backward({x, weight});  // each for the other's gradient alone
    ctx->saved_data["biased"] = bias.has_value();
    return without_gradient(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("pyvlm::linear_backward", "")
                               .typed<decltype(linear_backward_cpu)>();
    const variable_list saved = ctx->get_saved_variables();
    const bool biased = ctx->saved_data["biased"].toBool();
    const std::array<bool, 3> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                    biased && ctx->needs_input_grad(2)};
    auto [grad_x, grad_weight, grad_bias] = op.call(grads[0], saved[0], saved[1], needs);
    return {needs[0] ? grad_x : at::Tensor(), needs[1] ? grad_weight : at::Tensor(),
            needs[2] ? grad_bias : at::Tensor()};
  }
};

at::Tensor with_gradient(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  const bool learns = x.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad());
  return learns && at::GradMode::is_enabled() ? Linear::apply(x, weight, bias)
                                              : without_gradient(x, weight, bias);
}

// All in autocast's type, as torch's own linear does.
at::Tensor linear_autocast(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const auto dtype = at::autocast::get_autocast_dtype(at::kCPU);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(dtype, t, at::kCPU); };
  return call_linear(cast(x), cast(weight), bias.has_value() ? std::optional<at::Tensor>(cast(*bias)) : bias);
}

}  // namespace
}  // namespace pyvlm

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_backward(Tensor grad_y, Tensor x, Tensor weight, bool[3] needs) -> (Tensor grad_x, Tensor "
      "grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("linear", &pyvlm::linear_cpu);
  m.impl("linear_backward", &pyvlm::linear_backward_cpu);
}

TORCH_LIBRARY_IMPL(pyvlm, Autograd, m) { m.impl("linear", &pyvlm::with_gradient); }

TORCH_LIBRARY_IMPL(pyvlm, AutocastCPU, m) { m.impl("linear", &pyvlm::linear_autocast); }
