// The torch side of queries that read maps: schemas, CPU kernels and autocast rules.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "cross_attention/local_cross_attention.h"

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def(
      "local_cross_attention(Tensor query, Tensor[] keys, Tensor[] values, int rows, int columns, Tensor[] "
      "masks, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "local_cross_attention_backward(Tensor grad_out, Tensor query, Tensor[] keys, Tensor[] values, int "
      "rows, "
      "int columns, Tensor[] masks, float scale, Tensor out, Tensor lse) -> (Tensor grad_query, Tensor[] "
      "grad_keys, Tensor[] grad_values)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("local_cross_attention", &pyvlm::local_cross_attention_cpu);
  m.impl("local_cross_attention_backward", &pyvlm::local_cross_attention_backward_cpu);
}

namespace {

// Query, keys and values in autocast's type, as torch's own attention does.
template <at::DeviceType device, c10::DispatchKey key>
std::tuple<at::Tensor, at::Tensor> local_cross_attention_autocast(const at::Tensor& query,
                                                                  at::TensorList keys, at::TensorList values,
                                                                  int64_t rows, int64_t columns,
                                                                  at::TensorList masks, double scale) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyvlm::local_cross_attention", "")
                             .typed<decltype(pyvlm::local_cross_attention_cpu)>();
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return op.call(at::autocast::cached_cast(dtype, query, device),
                 at::autocast::cached_cast(dtype, keys, device),
                 at::autocast::cached_cast(dtype, values, device), rows, columns, masks, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyvlm, AutocastCPU, m) {
  m.impl("local_cross_attention", &local_cross_attention_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(pyvlm, AutocastCUDA, m) {
  m.impl("local_cross_attention", &local_cross_attention_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}
