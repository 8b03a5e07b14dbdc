// The torch side of the resampler: made of differentiable ops, so it needs no kernels of its own.
#include "cross_attention/resample.h"

#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def(
      "resample(Tensor features, Tensor query, Tensor query_position, Tensor key_position, Tensor "
      "in_proj_weight, Tensor out_proj_weight, int num_heads, Tensor? in_proj_bias, Tensor? out_proj_bias) "
      "-> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(pyvlm, CompositeImplicitAutograd, m) { m.impl("resample", &pyvlm::resample); }
