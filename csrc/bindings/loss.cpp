// The torch side of the language-model head's loss: schemas, CPU kernels and autocast rules.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "loss/linear_cross_entropy.h"

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, Tensor? bias, "
      "float softcap, float label_smoothing, float z_loss, bool mean) -> (Tensor loss, Tensor lse)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor labels, int "
      "ignore_index, Tensor? bias, float softcap, float label_smoothing, float z_loss, bool mean, Tensor "
      "lse, bool[3] needs) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("linear_cross_entropy", &pyvlm::linear_cross_entropy_cpu);
  m.impl("linear_cross_entropy_backward", &pyvlm::linear_cross_entropy_backward_cpu);
}

namespace {

// States and weights in autocast's type, as torch's own linear does.
template <at::DeviceType device, c10::DispatchKey key>
std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_autocast(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, int64_t ignore_index,
    const std::optional<at::Tensor>& bias, double softcap, double label_smoothing, double z_loss, bool mean) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyvlm::linear_cross_entropy", "")
                             .typed<decltype(pyvlm::linear_cross_entropy_cpu)>();
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  return op.call(cast(hidden), cast(weight), labels, ignore_index,
                 bias.has_value() ? std::optional<at::Tensor>(cast(*bias)) : bias, softcap, label_smoothing,
                 z_loss, mean);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyvlm, AutocastCPU, m) {
  m.impl("linear_cross_entropy", &linear_cross_entropy_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(pyvlm, AutocastCUDA, m) {
  m.impl("linear_cross_entropy", &linear_cross_entropy_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}
