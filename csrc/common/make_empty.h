// Outputs of ops.
#pragma once

#include <ATen/ops/empty.h>

#include "common/arena.h"

namespace pyvlm {

// A tensor of its own, not yet written.
inline at::Tensor make_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor t = at::empty(sizes, options);
  prefer_huge_pages(t.data_ptr(), static_cast<int64_t>(t.nbytes()));
  return t;
}

}  // namespace pyvlm
