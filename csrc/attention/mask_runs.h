// Runs of visible keys in the rows of a dense mask, which pyvlm/integrations/transformers/masks.py makes
// spans of.
//
// Letters: B batch, Q rows (queries), K keys.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace pyvlm {

// Of seen, bool [B, Q, K]: the first run of True of each row and the hull of what it sees beyond that run
// (both int32 [B, Q, 2], half open, [0, 0) where there is none), how many keys it sees beyond (int32 [B, Q]),
// and the keys that any row of a batch element sees beyond its first run (bool [B, K]).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mask_runs_cpu(const at::Tensor& seen);

}  // namespace pyvlm
