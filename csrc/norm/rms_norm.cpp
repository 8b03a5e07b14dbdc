// Tensors in, tensors out: where rows lie, the scale in the dtype that is computed in, and the outputs.
#include "norm/rms_norm.h"

#include <ATen/DimVector.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "common/arena.h"

namespace pyvlm {
namespace {

at::ScalarType computed_in(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check(const at::Tensor& x, const std::optional<at::Tensor>& weight) {
  TORCH_CHECK(x.dim() >= 1 && x.is_floating_point(), "rms_norm: x is ", x.scalar_type(), " ", x.sizes(),
              "; expected a floating-point tensor [.., C]");
  TORCH_CHECK(!weight || (weight->dim() == 1 && weight->size(0) == x.size(-1) && weight->is_floating_point()),
              "rms_norm: the weight is ", weight->scalar_type(), " ", weight->sizes(),
              "; expected a floating-point tensor [", x.size(-1), "]");
}

// An empty tensor like x, dense and in the order of its dimensions, in which channels are neighbours.
at::Tensor empty_rows_like(const at::Tensor& x) {
  at::Tensor y = at::empty_like(x);
  if (y.stride(-1) != 1 && y.size(-1) != 1) {
    y = at::empty_like(x, at::MemoryFormat::Contiguous);
  }
  prefer_huge_pages(y.data_ptr(), static_cast<int64_t>(y.nbytes()));
  return y;
}

// One element for each row of y, in their order.
at::Tensor empty_for_rows(const at::Tensor& y, at::ScalarType dtype) {
  at::DimVector strides(y.strides().begin(), y.strides().end() - 1);
  for (int64_t& stride : strides) {
    stride /= std::max<int64_t>(y.size(-1), 1);
  }
  return at::empty_strided(y.sizes().slice(0, strides.size()), strides, y.options().dtype(dtype));
}

// t, or a copy of it with the strides of `order`.
at::Tensor lying_like(const at::Tensor& t, const at::Tensor& order) {
  return t.strides() == order.strides() ? t : at::empty_like(order).copy_(t);
}

template <typename acc_t>
void write_scale(acc_t* scale, const std::optional<at::Tensor>& weight, bool unit_offset, int64_t channels,
                 int64_t padded) {
  std::fill_n(scale, padded, acc_t(1));
  if (weight) {
    const at::Tensor flat = weight->contiguous();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, flat.scalar_type(), "rms_norm", [&] {
      const auto* from = flat.const_data_ptr<scalar_t>();
      const auto offset = static_cast<acc_t>(unit_offset);
      std::transform(from, from + channels, scale,
                     [&](scalar_t w) { return static_cast<acc_t>(w) + offset; });
    });
  }
}

// Scratch memory for the scale and `rows_of_sums` more rows as long, of which the problem has the first.
struct NormScratch {
  NormScratch(NormProblem& problem, const std::optional<at::Tensor>& weight, bool unit_offset,
              int64_t rows_of_sums)
      : padded(problem.padded_channels()),
        width(problem.dtype == at::kDouble ? 8 : 4),
        scratch((1 + rows_of_sums) * padded * width) {
    char* base = scratch.arena().take<char>((1 + rows_of_sums) * padded * width);
    problem.scale = base;
    sums = base + padded * width;
    std::fill_n(sums, rows_of_sums * padded * width, char(0));
    if (problem.dtype == at::kDouble) {
      write_scale(reinterpret_cast<double*>(base), weight, unit_offset, problem.channels, padded);
    } else {
      write_scale(reinterpret_cast<float*>(base), weight, unit_offset, problem.channels, padded);
    }
  }

  int64_t padded, width;
  CallScratch scratch;
  char* sums;
};

NormProblem problem_of(const at::Tensor& x) {
  return {x.numel() / x.size(-1), x.size(-1), x.scalar_type(), x.const_data_ptr(), nullptr};
}

// The rows of sums, added in their order.
template <typename acc_t>
void add_up(const acc_t* sums, int64_t count, int64_t padded, at::Tensor& total) {
  auto* out = total.mutable_data_ptr<acc_t>();
  std::fill_n(out, total.numel(), acc_t(0));
  for (int64_t i = 0; i < count; ++i) {
    std::transform(out, out + total.numel(), sums + i * padded, out, std::plus<acc_t>());
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                double eps, bool unit_offset) {
  check(x, weight);
  const at::Tensor y = empty_rows_like(x);
  const at::Tensor rows = lying_like(x, y);
  const at::Tensor rstd = empty_for_rows(y, computed_in(x));
  if (x.numel() > 0) {
    NormProblem problem = problem_of(rows);
    const NormScratch scratch(problem, weight, unit_offset, 0);
    PYVLM_DISPATCH_ISA(rms_norm, problem, eps, y.mutable_data_ptr(), rstd.mutable_data_ptr());
  }
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x,
                                                         const std::optional<at::Tensor>& weight,
                                                         const at::Tensor& rstd, bool unit_offset,
                                                         bool want_x, bool want_weight) {
  check(x, weight);
  TORCH_CHECK(grad_y.sizes() == x.sizes() && grad_y.scalar_type() == x.scalar_type(),
              "rms_norm: the gradient is ", grad_y.scalar_type(), " ", grad_y.sizes(), "; expected ",
              x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(rstd.sizes() == x.sizes().slice(0, x.dim() - 1) && rstd.scalar_type() == computed_in(x),
              "rms_norm: rstd is ", rstd.scalar_type(), " ", rstd.sizes(),
              "; expected what the forward gave");
  const at::Tensor like = empty_rows_like(x);
  at::Tensor grad_x = want_x ? like : at::empty({0}, x.options());
  at::Tensor grad_weight = want_weight ? at::zeros_like(*weight, weight->options().dtype(computed_in(x)))
                                       : at::empty({0}, x.options());
  if (x.numel() > 0 && (want_x || want_weight)) {
    // Hooks on saved tensors may have laid x and rstd otherwise than the forward did.
    const at::Tensor rows = lying_like(x, like), grad_rows = lying_like(grad_y, like);
    const at::Tensor row_rstd = lying_like(rstd, empty_for_rows(like, rstd.scalar_type()));
    NormProblem problem = problem_of(rows);
    constexpr int64_t kMostChunks = 64, kFewestRows = 16;
    const int64_t rows_each = std::max((problem.rows + kMostChunks - 1) / kMostChunks, kFewestRows);
    const NormChunks chunks{(problem.rows + rows_each - 1) / rows_each, rows_each};
    const NormScratch scratch(problem, weight, unit_offset, want_weight ? chunks.count : 0);
    PYVLM_DISPATCH_ISA(rms_norm_backward, problem, grad_rows.const_data_ptr(), row_rstd.const_data_ptr(),
                       chunks, want_x ? grad_x.mutable_data_ptr() : nullptr,
                       want_weight ? scratch.sums : nullptr);
    if (want_weight && problem.dtype == at::kDouble) {
      add_up(reinterpret_cast<const double*>(scratch.sums), chunks.count, scratch.padded, grad_weight);
    } else if (want_weight) {
      add_up(reinterpret_cast<const float*>(scratch.sums), chunks.count, scratch.padded, grad_weight);
    }
  }
  return {grad_x, want_weight ? grad_weight.to(weight->scalar_type()) : grad_weight};
}

}  // namespace pyvlm
