// The torch side of fusion: schemas, CPU kernels and autocast rules.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "fusion/merge_levels.h"

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def(
      "merge_levels(Tensor[] levels, Tensor alpha, Tensor weight, Tensor? bias, Tensor? ln_weight, Tensor? "
      "ln_bias, float eps, bool keep_statistics) -> (Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "merge_levels_backward(Tensor grad_out, Tensor[] levels, Tensor alpha, Tensor weight, Tensor? bias, "
      "Tensor? ln_weight, Tensor? ln_bias, Tensor mean, Tensor rstd, bool[6] needs) -> (Tensor[] "
      "grad_levels, Tensor grad_alpha, Tensor grad_weight, Tensor grad_bias, Tensor grad_ln_weight, Tensor "
      "grad_ln_bias)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("merge_levels", &pyvlm::merge_levels_cpu);
  m.impl("merge_levels_backward", &pyvlm::merge_levels_backward_cpu);
}

namespace {

// Levels and projections in autocast's type, as torch's own linear does; the norms' parameters and alpha,
// which are used in float32, as they are; but the Triton kernels take alpha in the levels' type.
template <at::DeviceType device, c10::DispatchKey key>
std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_levels_autocast(
    at::TensorList levels, const at::Tensor& alpha, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ln_weight,
    const std::optional<at::Tensor>& ln_bias, double eps, bool keep_statistics) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyvlm::merge_levels", "")
                             .typed<decltype(pyvlm::merge_levels_cpu)>();
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  std::vector<at::Tensor> cast_levels;
  for (const at::Tensor& level : levels) {
    cast_levels.push_back(cast(level));
  }
  return op.call(cast_levels, device == at::kCUDA ? cast(alpha) : alpha, cast(weight),
                 bias.has_value() ? std::optional<at::Tensor>(cast(*bias)) : bias, ln_weight, ln_bias, eps,
                 keep_statistics);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyvlm, AutocastCPU, m) {
  m.impl("merge_levels", &merge_levels_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(pyvlm, AutocastCUDA, m) {
  m.impl("merge_levels", &merge_levels_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}
