// The torch side of gated activations: schemas and CPU kernels.
#include <torch/library.h>

#include "gating/gated_activation.h"

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def("gated_activation(Tensor gate, Tensor up, str activation) -> Tensor");
  m.def("gated_activation_(Tensor(a!) gate, Tensor up, str activation) -> ()");
  m.def(
      "gated_activation_backward(Tensor grad_y, Tensor gate, Tensor up, str activation) -> "
      "(Tensor grad_gate, Tensor grad_up)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("gated_activation", &pyvlm::gated_activation_cpu);
  m.impl("gated_activation_", &pyvlm::gated_activation_inplace_cpu);
  m.impl("gated_activation_backward", &pyvlm::gated_activation_backward_cpu);
}
