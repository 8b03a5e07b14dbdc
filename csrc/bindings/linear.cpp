// The torch side of linear layers: schemas, CPU kernels and autocast rules.
#include "linear/linear.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

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

namespace {

// All in autocast's type, as torch's own linear does.
at::Tensor linear_autocast(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyvlm::linear", "")
                             .typed<decltype(pyvlm::linear_cpu)>();
  const auto dtype = at::autocast::get_autocast_dtype(at::kCPU);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(dtype, t, at::kCPU); };
  return op.call(cast(x), cast(weight), bias.has_value() ? std::optional<at::Tensor>(cast(*bias)) : bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyvlm, AutocastCPU, m) { m.impl("linear", &linear_autocast); }
