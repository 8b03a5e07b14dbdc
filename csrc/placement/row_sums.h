// Sums of rows that lie anywhere.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "common/isa.h"

namespace pyvlm {

// Columns [begin, end) of `count` rows, at least one, are added up in their order, in fp32 (fp64 for fp64).
struct RowSum {
  const char* const* rows;
  int64_t count, begin, end;
  void* out;
  at::ScalarType dtype;
};

PYVLM_DECLARE_FOR_EACH_ISA(void sum_rows(const RowSum&))

}  // namespace pyvlm
