// Tensors in, tensors out: checks what the kernels rely on, finds the rows that have a label, makes the
// outputs.
#include "loss/linear_cross_entropy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "common/empty.h"

namespace pyvlm {
namespace {

// Holds what a LossProblem points into.
struct Problem : LossProblem {
  std::vector<int64_t> rows, words;
  std::vector<at::Tensor> held;
  at::ScalarType acc_dtype;

  const void* hold(const at::Tensor& t) {
    held.push_back(t.contiguous());
    return held.back().const_data_ptr();
  }
  double share(bool mean) const { return mean ? 1.0 / static_cast<double>(std::max<int64_t>(R, 1)) : 1.0; }
};

void find_labels(Problem& p, const at::Tensor& labels, int64_t ignore_index) {
  const at::Tensor contiguous = labels.contiguous();
  const int64_t* label = contiguous.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < labels.numel(); ++t) {
    if (label[t] == ignore_index) {
      continue;
    }
    TORCH_CHECK_VALUE(label[t] >= 0 && label[t] < p.V, "linear_cross_entropy: labels[", t, "] is ", label[t],
                      ", expected ignore_index ", ignore_index, " or a word in [0, ", p.V, ")");
    p.rows.push_back(t);
    p.words.push_back(label[t]);
  }
  p.R = static_cast<int64_t>(p.rows.size());
  p.row = p.rows.data();
  p.label = p.words.data();
}

Problem make_problem(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
                     int64_t ignore_index, const std::optional<at::Tensor>& bias, double softcap,
                     double label_smoothing, double z_loss) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && weight.size(1) == hidden.size(1),
              "linear_cross_entropy: hidden is ", hidden.sizes(), " and weight ", weight.sizes(),
              "; expected [T, H] and [V, H]");
  TORCH_CHECK(labels.scalar_type() == at::kLong && labels.sizes() == at::IntArrayRef({hidden.size(0)}),
              "linear_cross_entropy: labels are ", labels.scalar_type(), " ", labels.sizes(),
              "; expected int64 [", hidden.size(0), "]");
  Problem p;
  p.H = hidden.size(1), p.V = weight.size(0);
  p.dtype = hidden.scalar_type();
  TORCH_CHECK(
      p.dtype == at::kFloat || p.dtype == at::kBFloat16 || p.dtype == at::kHalf || p.dtype == at::kDouble,
      "linear_cross_entropy: hidden is ", p.dtype, "; expected float32, bfloat16, float16 or float64");
  TORCH_CHECK(weight.scalar_type() == p.dtype, "linear_cross_entropy: weight is ", weight.scalar_type(),
              " and hidden is ", p.dtype);
  TORCH_CHECK(
      !bias.has_value() || (bias->scalar_type() == p.dtype && bias->sizes() == at::IntArrayRef({p.V})),
      "linear_cross_entropy: bias is ", bias->scalar_type(), " ", bias->sizes(), "; expected ", p.dtype, " [",
      p.V, "]");
  p.acc_dtype = p.dtype == at::kDouble ? at::kDouble : at::kFloat;
  p.softcap = softcap, p.label_smoothing = label_smoothing, p.z_loss = z_loss;
  find_labels(p, labels, ignore_index);
  p.hidden = p.hold(hidden);
  p.weight = p.hold(weight);
  p.bias = bias.has_value() ? p.hold(*bias) : nullptr;
  return p;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, int64_t ignore_index,
    const std::optional<at::Tensor>& bias, double softcap, double label_smoothing, double z_loss, bool mean) {
  const Problem p =
      make_problem(hidden, weight, labels, ignore_index, bias, softcap, label_smoothing, z_loss);
  const at::TensorOptions options = hidden.options().dtype(p.acc_dtype);
  at::Tensor lse = at::zeros({hidden.size(0)}, options);
  double loss = 0;
  if (p.R > 0) {
    const LossForward args{p, lse.data_ptr(), &loss};
    PYVLM_DISPATCH_ISA(linear_cross_entropy_forward, args);
  }
  return {at::full({}, loss * p.share(mean), options), lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_backward_cpu(
    const at::Tensor& grad_loss, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
    int64_t ignore_index, const std::optional<at::Tensor>& bias, double softcap, double label_smoothing,
    double z_loss, bool mean, const at::Tensor& lse, std::array<bool, 3> needs) {
  Problem p = make_problem(hidden, weight, labels, ignore_index, bias, softcap, label_smoothing, z_loss);
  TORCH_CHECK(grad_loss.numel() == 1 && lse.sizes() == labels.sizes() && lse.scalar_type() == p.acc_dtype,
              "linear_cross_entropy_backward: grad_loss is ", grad_loss.sizes(), " and lse ",
              lse.scalar_type(), " ", lse.sizes(), "; expected a scalar and ", p.acc_dtype, " ",
              labels.sizes());
  at::Tensor grads[] = {at::empty({0}, hidden.options()), at::empty({0}, hidden.options()),
                        at::empty({0}, hidden.options())};
  if (needs[0]) {
    grads[0] = at::zeros(hidden.sizes(), hidden.options());
  }
  const auto grad_of_words = [&](const at::Tensor& like) {
    return p.R == 0 ? at::zeros(like.sizes(), hidden.options()) : make_empty(like.sizes(), hidden.options());
  };
  if (needs[1]) {
    grads[1] = grad_of_words(weight);
  }
  if (needs[2] && bias.has_value()) {
    grads[2] = grad_of_words(*bias);
  }
  if (p.R > 0) {
    const auto data = [](at::Tensor& t) { return t.numel() > 0 ? t.data_ptr() : nullptr; };
    const LossBackward args{p,
                            grad_loss.item<double>() * p.share(mean),
                            p.hold(lse),
                            data(grads[0]),
                            data(grads[1]),
                            data(grads[2])};
    PYVLM_DISPATCH_ISA(linear_cross_entropy_backward, args);
  }
  return {grads[0], grads[1], grads[2]};
}

}  // namespace pyvlm
