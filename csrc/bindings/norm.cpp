// The torch side of norms: schemas, CPU kernels and the gradient.
//
// The gradient is told in C++, not by torch.library in Python as those of the other ops: a model calls a norm
// two to six times a layer, and with the caches full of weights the way through Python took 25 us of the 31
// of a decoded token's norm.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "norm/rms_norm.h"

namespace pyvlm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<at::Tensor, at::Tensor> without_gradient(const at::Tensor& x,
                                                    const std::optional<at::Tensor>& weight, double eps,
                                                    bool unit_offset) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("pyvlm::rms_norm", "").typed<decltype(rms_norm_cpu)>();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, weight, eps, unit_offset);
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x,
                               const std::optional<at::Tensor>& weight, double eps, bool unit_offset) {
    auto [y, rstd] = without_gradient(x, weight, eps, unit_offset);
    ctx->save_for_backward({x, weight.value_or(at::Tensor()), rstd});
    ctx->saved_data["unit_offset"] = unit_offset;
    ctx->mark_non_differentiable({rstd});
    ctx->set_materialize_grads(false);
    return {y, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("pyvlm::rms_norm_backward", "")
                               .typed<decltype(rms_norm_backward_cpu)>();
    if (!grads[0].defined()) {
      return variable_list(4);
    }
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<at::Tensor> weight = saved[1].defined() ? std::optional(saved[1]) : std::nullopt;
    const bool want_x = ctx->needs_input_grad(0), want_weight = weight && ctx->needs_input_grad(1);
    auto [grad_x, grad_weight] = op.call(grads[0], saved[0], weight, saved[2],
                                         ctx->saved_data["unit_offset"].toBool(), want_x, want_weight);
    return {want_x ? grad_x : at::Tensor(), want_weight ? grad_weight : at::Tensor(), {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> with_gradient(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                 double eps, bool unit_offset) {
  const bool learns = x.requires_grad() || (weight && weight->requires_grad());
  if (!learns || !at::GradMode::is_enabled()) {
    return without_gradient(x, weight, eps, unit_offset);
  }
  const variable_list results = RmsNorm::apply(x, weight, eps, unit_offset);
  return {results[0], results[1]};
}

}  // namespace
}  // namespace pyvlm

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, bool unit_offset) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor rstd, bool unit_offset, "
      "bool want_x, bool want_weight) -> (Tensor grad_x, Tensor grad_weight)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("rms_norm", &pyvlm::rms_norm_cpu);
  m.impl("rms_norm_backward", &pyvlm::rms_norm_backward_cpu);
}

TORCH_LIBRARY_IMPL(pyvlm, Autograd, m) { m.impl("rms_norm", &pyvlm::with_gradient); }
