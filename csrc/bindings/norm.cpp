// The torch side of norms: schemas and CPU kernels.
#include <torch/library.h>

#include "norm/rms_norm.h"

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, bool unit_offset) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor rstd, bool unit_offset, bool "
      "want_x, "
      "bool want_weight) -> (Tensor grad_x, Tensor grad_weight)");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("rms_norm", &pyvlm::rms_norm_cpu);
  m.impl("rms_norm_backward", &pyvlm::rms_norm_backward_cpu);
}
