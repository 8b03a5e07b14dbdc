#include "common/empty.h"

#include <ATen/ops/empty.h>

#include <cstdint>

#include "common/arena.h"

namespace pyvlm {

at::Tensor make_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor t = at::empty(sizes, options);
  prefer_huge_pages(t.data_ptr(), static_cast<int64_t>(t.nbytes()));
  return t;
}

at::Tensor make_plain(at::IntArrayRef sizes, at::ScalarType dtype) { return at::empty(sizes, dtype); }

}  // namespace pyvlm
