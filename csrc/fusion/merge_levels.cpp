// Tensors in, tensors out: checks what the kernels rely on, lays inputs out, makes the outputs.
#include "fusion/merge_levels.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "common/empty.h"

namespace pyvlm {
namespace {

// Holds the tensors that a MergeProblem points into.
struct Problem : MergeProblem {
  std::vector<at::Tensor> held;
  std::vector<LevelView> views;
  at::ScalarType acc_dtype;

  const at::Tensor& hold(const at::Tensor& t) {
    held.push_back(t);
    return held.back();
  }

  // A tensor of numbers for each of `width` columns, that levels share or not, and the step between levels.
  std::pair<const void*, int64_t> hold_rows(const char* name, const at::Tensor& t, int64_t width) {
    const bool shared = t.dim() == 1;
    TORCH_CHECK_VALUE(t.sizes() == (shared ? at::IntArrayRef({width}) : at::IntArrayRef({L, width})),
                      "merge_levels: ", name, " has shape ", t.sizes(), ", expected [", width, "] or [", L,
                      ", ", width, "]");
    TORCH_CHECK(t.is_floating_point(), "merge_levels: ", name, " is ", t.scalar_type(),
                ", expected a floating-point tensor");
    return {hold(t.to(acc_dtype).contiguous()).const_data_ptr(), shared ? 0 : width};
  }
};

Problem make_problem(at::TensorList levels, const at::Tensor& alpha, const at::Tensor& weight,
                     const std::optional<at::Tensor>& ln_weight, const std::optional<at::Tensor>& ln_bias,
                     double eps) {
  TORCH_CHECK_VALUE(!levels.empty(), "merge_levels: levels is empty; give at least one map");
  const at::Tensor& first = levels[0];
  TORCH_CHECK_VALUE(first.dim() == 3, "merge_levels: levels[0] has shape ", first.sizes(),
                    ", expected [N, T, C]");
  Problem p;
  p.L = static_cast<int64_t>(levels.size());
  p.N = first.size(0), p.T = first.size(1), p.C = first.size(2);
  p.dtype = first.scalar_type();
  p.acc_dtype = p.dtype == at::kDouble ? at::kDouble : at::kFloat;
  p.eps = eps;
  TORCH_CHECK(
      p.dtype == at::kFloat || p.dtype == at::kBFloat16 || p.dtype == at::kHalf || p.dtype == at::kDouble,
      "merge_levels: levels are ", p.dtype, "; expected float32, bfloat16, float16 or float64");
  for (size_t l = 0; l < levels.size(); ++l) {
    TORCH_CHECK_VALUE(levels[l].sizes() == first.sizes(), "merge_levels: levels[", l, "] has shape ",
                      levels[l].sizes(), ", expected ", first.sizes(), " like levels[0]");
    TORCH_CHECK(levels[l].scalar_type() == p.dtype, "merge_levels: levels[", l, "] is ",
                levels[l].scalar_type(), " and levels[0] is ", p.dtype);
    const bool as_it_lies = levels[l].stride(2) == 1 || p.C == 1;
    const at::Tensor& level = p.hold(as_it_lies ? levels[l] : levels[l].contiguous());
    p.views.push_back({level.const_data_ptr(), level.stride(0), level.stride(1)});
  }
  const bool shared = weight.dim() == 2;
  TORCH_CHECK_VALUE(
      weight.dim() >= 2 && weight.size(-1) == p.C && (shared || (weight.dim() == 3 && weight.size(0) == p.L)),
      "merge_levels: weight has shape ", weight.sizes(), ", expected [H, ", p.C, "] or [", p.L, ", H, ", p.C,
      "]");
  TORCH_CHECK(weight.scalar_type() == p.dtype, "merge_levels: weight is ", weight.scalar_type(),
              " and the levels are ", p.dtype);
  p.sections = shared ? 1 : p.L;
  p.H = weight.size(-2);
  p.weight = p.hold(weight.contiguous()).const_data_ptr();
  TORCH_CHECK_VALUE(alpha.sizes() == at::IntArrayRef({p.L}), "merge_levels: alpha has shape ", alpha.sizes(),
                    ", expected [", p.L, "]");
  p.alpha = p.hold(alpha.to(p.acc_dtype).contiguous()).const_data_ptr();
  const at::TensorOptions acc = first.options().dtype(p.acc_dtype);
  std::tie(p.gamma, p.gamma_stride) =
      p.hold_rows("ln_weight", ln_weight.has_value() ? *ln_weight : at::ones({p.C}, acc), p.C);
  std::tie(p.beta, p.beta_stride) =
      p.hold_rows("ln_bias", ln_bias.has_value() ? *ln_bias : at::zeros({p.C}, acc), p.C);
  p.levels = p.views.data();
  return p;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_levels_cpu(
    at::TensorList levels, const at::Tensor& alpha, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ln_weight,
    const std::optional<at::Tensor>& ln_bias, double eps, bool keep_statistics) {
  Problem p = make_problem(levels, alpha, weight, ln_weight, ln_bias, eps);
  const at::TensorOptions acc = levels[0].options().dtype(p.acc_dtype);
  at::Tensor merged_bias = at::zeros({p.H}, acc);
  if (bias.has_value()) {
    p.hold_rows("bias", *bias, p.H);
    merged_bias = (alpha.to(p.acc_dtype).unsqueeze(1) * bias->to(p.acc_dtype)).sum(0);
  }
  at::Tensor out = make_empty({p.N, p.T, p.H}, levels[0].options());
  const auto statistic = [&] {
    return at::empty(keep_statistics ? at::IntArrayRef({p.L, p.tokens()}) : at::IntArrayRef({0}), acc);
  };
  at::Tensor mean = statistic(), rstd = statistic();
  const auto data = [&](at::Tensor& t) { return keep_statistics ? t.data_ptr() : nullptr; };
  const MergeForward args{p, merged_bias.const_data_ptr(), out.data_ptr(), data(mean), data(rstd)};
  PYVLM_DISPATCH_ISA(merge_levels_forward, args);
  return {out, mean, rstd};
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
merge_levels_backward_cpu(const at::Tensor& grad_out, at::TensorList levels, const at::Tensor& alpha,
                          const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& ln_weight,
                          const std::optional<at::Tensor>& ln_bias, const at::Tensor& mean,
                          const at::Tensor& rstd, std::array<bool, 6> needs) {
  Problem p = make_problem(levels, alpha, weight, ln_weight, ln_bias, /*eps=*/0);
  TORCH_CHECK_VALUE(grad_out.sizes() == at::IntArrayRef({p.N, p.T, p.H}),
                    "merge_levels_backward: grad_out has shape ", grad_out.sizes(), ", expected [", p.N, ", ",
                    p.T, ", ", p.H, "]");
  for (const at::Tensor* t : {&mean, &rstd}) {
    TORCH_CHECK(t->sizes() == at::IntArrayRef({p.L, p.tokens()}) && t->scalar_type() == p.acc_dtype,
                "merge_levels_backward: a statistic is ", t->scalar_type(), " ", t->sizes(), "; expected ",
                p.acc_dtype, " [", p.L, ", ", p.tokens(), "] as the forward keeps it");
  }
  MergeBackward args{};
  args.grad_out = p.hold(grad_out.to(p.dtype).contiguous()).const_data_ptr();
  args.mean = p.hold(mean.contiguous()).const_data_ptr();
  args.rstd = p.hold(rstd.contiguous()).const_data_ptr();
  if (bias.has_value()) {
    std::tie(args.bias, args.bias_stride) = p.hold_rows("bias", *bias, p.H);
  }
  const auto pointer = [](at::Tensor& t) { return t.numel() > 0 ? t.data_ptr() : nullptr; };
  std::vector<at::Tensor> grad_levels;
  std::vector<void*> level_pointers;
  for (int64_t l = 0; l < p.L && needs[0]; ++l) {
    grad_levels.push_back(make_empty({p.N, p.T, p.C}, levels[l].options()));
    level_pointers.push_back(pointer(grad_levels.back()));
  }
  at::Tensor grad_weight = make_empty(needs[2] ? weight.sizes() : at::IntArrayRef({0}), weight.options());
  const at::TensorOptions acc = levels[0].options().dtype(p.acc_dtype);
  const auto sums = [&](int which, const std::optional<at::Tensor>& like) {
    return at::zeros(needs[which] && like.has_value() ? like->sizes() : at::IntArrayRef({0}), acc);
  };
  at::Tensor grad_alpha = sums(1, alpha), grad_bias = sums(3, bias), grad_gamma = sums(4, ln_weight),
             grad_beta = sums(5, ln_bias);
  args.grad_levels = needs[0] ? level_pointers.data() : nullptr;
  args.grad_weight = pointer(grad_weight);
  args.grad_alpha = pointer(grad_alpha), args.grad_bias = pointer(grad_bias);
  args.grad_gamma = pointer(grad_gamma), args.grad_beta = pointer(grad_beta);
  args.problem = p;
  PYVLM_DISPATCH_ISA(merge_levels_backward, args);
  const auto as = [&](const at::Tensor& grad, const std::optional<at::Tensor>& like) {
    return grad.to(like.has_value() ? like->scalar_type() : p.dtype);
  };
  return {grad_levels,         as(grad_alpha, alpha),     grad_weight,
          as(grad_bias, bias), as(grad_gamma, ln_weight), as(grad_beta, ln_bias)};
}

}  // namespace pyvlm
