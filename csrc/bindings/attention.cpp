// The torch side of span attention and of finding spans: schemas, CPU kernels and autocast rules.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "attention/mask_runs.h"
#include "attention/span_attention.h"

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def(
      "span_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor key_class, int[] range_classes, "
      "bool separate, "
      "float scale, float softcap, Tensor? sinks) -> (Tensor out, Tensor stream_out, Tensor lse)");
  m.def(
      "span_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor "
      "bounds, "
      "Tensor key_class, int[] range_classes, bool separate, float scale, float softcap, Tensor? sinks, "
      "Tensor out, Tensor stream_out, Tensor lse) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor "
      "grad_sinks)");
  m.def("mask_runs(Tensor seen) -> (Tensor first, Tensor rest, Tensor count, Tensor beyond)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("span_attention", &pyvlm::span_attention_cpu);
  m.impl("span_attention_backward", &pyvlm::span_attention_backward_cpu);
  m.impl("mask_runs", &pyvlm::mask_runs_cpu);
}

namespace {

// q, k and v in autocast's type, as torch's own attention does.
template <at::DeviceType device, c10::DispatchKey key>
std::tuple<at::Tensor, at::Tensor, at::Tensor> span_attention_autocast(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bounds,
    const at::Tensor& key_class, at::IntArrayRef range_classes, bool separate, double scale, double softcap,
    const std::optional<at::Tensor>& sinks) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyvlm::span_attention", "")
                             .typed<decltype(pyvlm::span_attention_cpu)>();
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  return op.call(cast(q), cast(k), cast(v), bounds, key_class, range_classes, separate, scale, softcap,
                 sinks);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyvlm, AutocastCPU, m) {
  m.impl("span_attention", &span_attention_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(pyvlm, AutocastCUDA, m) {
  m.impl("span_attention", &span_attention_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}
