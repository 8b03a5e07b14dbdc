// The torch side of placement: schemas and CPU kernels. Under autocast the tensor that rows go into decides
// their type, which pyvlm/ops/placement.py sees to.
#include "placement/placement.h"

#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def("pack_image_tokens(Tensor features, Tensor index, Tensor? newline) -> Tensor");
  m.def(
      "pack_image_tokens_backward(Tensor grad, Tensor index, SymInt num_features, SymInt feature_width, "
      "bool[2] needs) -> (Tensor grad_features, Tensor grad_newline)");
  m.def(
      "place_image_tokens(Tensor text, Tensor features, Tensor image_mask, Tensor? index, Tensor? newline) "
      "-> Tensor");
  m.def(
      "place_image_tokens_backward(Tensor grad, Tensor image_mask, Tensor? index, SymInt num_features, "
      "SymInt feature_width, bool[3] needs) -> (Tensor grad_text, Tensor grad_features, Tensor "
      "grad_newline)");
  m.def("add_at_image_tokens(Tensor hidden, Tensor updates, Tensor image_mask) -> Tensor");
  m.def("add_at_image_tokens_backward(Tensor grad, Tensor image_mask, SymInt num_updates) -> Tensor");
}

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) {
  m.impl("pack_image_tokens", &pyvlm::pack_image_tokens_cpu);
  m.impl("pack_image_tokens_backward", &pyvlm::pack_image_tokens_backward_cpu);
  m.impl("place_image_tokens", &pyvlm::place_image_tokens_cpu);
  m.impl("place_image_tokens_backward", &pyvlm::place_image_tokens_backward_cpu);
  m.impl("add_at_image_tokens", &pyvlm::add_at_image_tokens_cpu);
  m.impl("add_at_image_tokens_backward", &pyvlm::add_at_image_tokens_backward_cpu);
}
