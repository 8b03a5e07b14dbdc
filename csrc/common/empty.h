// Tensors that nobody has written yet. Behind functions: ATen/ops/empty.h reads 4.5 s of other headers.
#pragma once

#include <ATen/core/Tensor.h>

namespace pyvlm {

// A result of an op: a tensor of its own, on huge pages where it is large.
at::Tensor make_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// On CPU, and on pages as they come: what a kernel keeps for itself, and small results.
at::Tensor make_plain(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace pyvlm
