// Results of ops, not yet written.
#pragma once

#include <ATen/ops/empty.h>

#include <cstdint>

#include "common/arena.h"

namespace pyvlm {

// A tensor of its own, not yet written, on huge pages where it is large.
inline at::Tensor make_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor t = at::empty(sizes, options);
  prefer_huge_pages(t.data_ptr(), static_cast<int64_t>(t.nbytes()));
  return t;
}

}  // namespace pyvlm
