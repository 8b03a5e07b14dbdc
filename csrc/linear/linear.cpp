// Tensors in, tensors out: which products are pyvlm's own and which torch's, and where their operands lie.
#include "linear/linear.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <vector>

#include "common/empty.h"

namespace pyvlm {
namespace {

// Whether a product is pyvlm's own. On AMD's AVX-512 MKL's fp32 reaches 40 % of the rate of oneDNN's
// microkernel, and torch's fp16 1.5 %; bf16 is oneDNN's already, at the peak, and where there is AMX so is
// all. Few rows or a small product leave packing too large a share.
bool is_own(const at::Tensor& x, int64_t R, int64_t C, int64_t D) {
  constexpr int64_t kRows = 32, kWork = 1 << 20;
  const bool fp32 = x.scalar_type() == at::kFloat && active_isa() == Isa::avx512;
  const bool fp16 = x.scalar_type() == at::kHalf;
  return x.is_cpu() && (fp32 || fp16) && !has_amx() && R >= kRows && R * C * D >= kWork;
}

// Whether a product of a few tokens is pyvlm's own: all is in reading the weight, which MKL does at 16 GB/s
// on AMD for one token and at 10 for several, oneDNN at 15 to 27 in bf16, and the kernel at 33 to 45. Beside
// tokens that the first cache does not hold it reads at 17, which in bf16 is less than oneDNN does.
bool is_own_of_few(const at::Tensor& x, const at::Tensor& weight) {
  constexpr int64_t kCached = 10'000;  // numbers of x, which is made float32
  const int64_t tokens = x.numel() / std::max<int64_t>(1, x.size(-1));
  const bool held = tokens == 1 || x.numel() <= kCached || x.scalar_type() != at::kBFloat16;
  return held && x.scalar_type() != at::kDouble && !has_amx() && tokens >= 1 && tokens <= kMostFewTokens &&
         x.size(-1) > 0 && weight.stride(1) == 1;
}

at::Tensor multiply_few(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias) {
  const at::Tensor rows = x.to(at::kFloat).contiguous();
  const at::Tensor held = bias.has_value() ? bias->contiguous() : at::Tensor();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  const at::Tensor y = at::empty(sizes, x.options());
  const FewTokens product{x.numel() / x.size(-1),
                          weight.size(0),
                          weight.size(1),
                          rows.const_data_ptr<float>(),
                          weight.const_data_ptr(),
                          weight.stride(0),
                          held.defined() ? held.const_data_ptr() : nullptr,
                          y.mutable_data_ptr(),
                          y.scalar_type()};
  PYVLM_DISPATCH_ISA(linear_few, product);
  return y;
}

// A tensor's rows where they lie; none where they lie otherwise than in blocks.
std::optional<Rows> find_rows(const at::Tensor& t) {
  struct Level {
    int64_t size, stride;
  };
  std::vector<Level> levels;  // the innermost first
  for (int64_t d = t.dim() - 2; d >= 0; --d) {
    if (t.size(d) == 1) {
      continue;
    }
    if (!levels.empty() && t.stride(d) == levels.back().size * levels.back().stride) {
      levels.back().size *= t.size(d);
    } else {
      levels.push_back({t.size(d), t.stride(d)});
    }
  }
  if ((t.size(-1) > 1 && t.stride(-1) != 1) || levels.size() > 2) {
    return std::nullopt;
  }
  levels.resize(2, {1, 0});
  return Rows{const_cast<void*>(t.const_data_ptr()), levels[0].stride, levels[0].size, levels[1].stride};
}

// Keeps what it copies alive as long as the product takes.
class Operand {
 public:
  explicit Operand(const at::Tensor& t) : tensor_(find_rows(t).has_value() ? t : t.contiguous()) {}
  Rows rows() const { return *find_rows(tensor_); }

 private:
  at::Tensor tensor_;
};

void multiply_into(const at::Tensor& out, const at::Tensor& a, bool a_transposed, const at::Tensor& b,
                   bool b_transposed, int64_t D, const std::optional<at::Tensor>& bias, bool accumulate) {
  std::optional<Rows> to = find_rows(out);
  const at::Tensor buffer = to.has_value() ? out : out.contiguous();
  const Operand left(a), right(b);
  const at::Tensor held = bias.has_value() ? bias->contiguous() : at::Tensor();
  const int64_t C = out.size(-1);
  const LinearProduct product{out.numel() / C,
                              C,
                              D,
                              left.rows(),
                              right.rows(),
                              *find_rows(buffer),
                              a_transposed,
                              b_transposed,
                              held.defined() ? held.const_data_ptr() : nullptr,
                              accumulate,
                              out.scalar_type()};
  PYVLM_DISPATCH_ISA(linear_product, product);
  if (!to.has_value()) {
    out.copy_(buffer);
  }
}

int64_t count_rows(const at::Tensor& t) { return c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)); }

at::Tensor flat(const at::Tensor& t) { return t.reshape({count_rows(t), t.size(-1)}); }

// out = what torch computes into a matrix, where `out` can be looked at as one.
template <typename Compute>
void compute_into(const at::Tensor& out, const Compute& compute) {
  const std::optional<Rows> rows = find_rows(out);
  if (rows.has_value() && rows->block_stride == 0) {
    at::Tensor matrix = out.view({count_rows(out), out.size(-1)});
    compute(matrix);
  } else {
    at::Tensor matrix = at::empty({count_rows(out), out.size(-1)}, out.options());
    compute(matrix);
    out.copy_(matrix.view(out.sizes()));
  }
}

void check(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1), "linear: x is ", x.sizes(),
              " and weight ", weight.sizes(), "; expected [.., K] and [N, K]");
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && at::isFloatingType(x.scalar_type()), "linear: x is ",
              x.scalar_type(), " and weight ", weight.scalar_type(), "; expected one floating-point type");
}

}  // namespace

void linear_into(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight,
                 const std::optional<at::Tensor>& bias, bool accumulate) {
  if (is_own(x, count_rows(x), weight.size(0), weight.size(1))) {
    return multiply_into(y, x, false, weight, true, weight.size(1), bias, accumulate);
  }
  if (accumulate) {
    y.add_(at::linear(x, weight, bias));
    return;
  }
  compute_into(y, [&](at::Tensor& matrix) {
    bias.has_value() ? at::addmm_out(matrix, *bias, flat(x), weight.t())
                     : at::mm_out(matrix, flat(x), weight.t());
  });
}

void linear_grad_x_into(const at::Tensor& grad_x, const at::Tensor& grad_y, const at::Tensor& weight) {
  if (is_own(grad_y, count_rows(grad_y), weight.size(1), weight.size(0))) {
    return multiply_into(grad_x, grad_y, false, weight, false, weight.size(0), std::nullopt, false);
  }
  compute_into(grad_x, [&](at::Tensor& matrix) { at::mm_out(matrix, flat(grad_y), weight); });
}

void linear_grad_weight_into(const at::Tensor& grad_weight, const at::Tensor& grad_y, const at::Tensor& x) {
  if (is_own(grad_y, grad_weight.size(0), grad_weight.size(1), count_rows(x))) {
    return multiply_into(grad_weight, grad_y, true, x, false, count_rows(x), std::nullopt, false);
  }
  compute_into(grad_weight, [&](at::Tensor& matrix) { at::mm_out(matrix, flat(grad_y).t(), flat(x)); });
}

at::Tensor linear_grad_bias(const at::Tensor& grad_y) { return flat(grad_y).sum(0); }

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check(x, weight);
  TORCH_CHECK(!bias.has_value() || (bias->sizes() == at::IntArrayRef({weight.size(0)}) &&
                                    bias->scalar_type() == x.scalar_type()),
              "linear: bias is ", bias->scalar_type(), " ", bias->sizes(), "; expected ", x.scalar_type(),
              " [", weight.size(0), "]");
  if (is_own_of_few(x, weight)) {
    return multiply_few(x, weight, bias);
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  if (!is_own(x, count_rows(x), weight.size(0), weight.size(1))) {
    // Of rows that lie otherwise torch makes a product for each image, and other bits.
    return at::linear(flat(x), weight, bias).view(sizes);
  }
  const at::Tensor y = make_empty(sizes, x.options());
  linear_into(y, x, weight, bias);
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_cpu(const at::Tensor& grad_y,
                                                                   const at::Tensor& x,
                                                                   const at::Tensor& weight,
                                                                   std::array<bool, 3> needs) {
  check(x, weight);
  TORCH_CHECK(grad_y.dim() == x.dim() && count_rows(grad_y) == count_rows(x) &&
                  grad_y.size(-1) == weight.size(0) && grad_y.scalar_type() == x.scalar_type(),
              "linear_backward: grad_y is ", grad_y.scalar_type(), " ", grad_y.sizes(), " beside x ",
              x.sizes(), " and weight ", x.scalar_type(), " ", weight.sizes());
  const auto grad = [&](int which, at::IntArrayRef sizes) {
    return needs[which] ? make_empty(sizes, x.options()) : at::empty({0}, x.options());
  };
  const at::Tensor grad_x = grad(0, x.sizes()), grad_weight = grad(1, weight.sizes());
  if (needs[0]) {
    linear_grad_x_into(grad_x, grad_y, weight);
  }
  if (needs[1]) {
    linear_grad_weight_into(grad_weight, grad_y, x);
  }
  return {grad_x, grad_weight, needs[2] ? linear_grad_bias(grad_y) : grad(2, {})};
}

}  // namespace pyvlm
