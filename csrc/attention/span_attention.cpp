// Tensors in, tensors out: checks what the kernels rely on, lays inputs out, makes the outputs.
#include "attention/span_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

namespace pyvlm {
namespace {

at::Tensor with_contiguous_rows(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

Strided strided(const at::Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Holds the contiguous spans that a SpanProblem points into.
struct Problem : SpanProblem {
  at::Tensor bounds_tensor, key_class_tensor, sinks_tensor;
};

Problem make_problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bounds,
                     const at::Tensor& key_class, at::IntArrayRef range_classes, bool separate, double scale,
                     double softcap, const std::optional<at::Tensor>& sinks) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && q.size(0) == k.size(0) &&
                  q.size(3) == k.size(3) && q.size(3) > 0,
              "span_attention: q, k, v are ", q.sizes(), ", ", k.sizes(), ", ", v.sizes(),
              "; expected [B, H, I, D] and twice [B, G, J, D]");
  TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "span_attention: q has ", q.size(1),
              " heads and k ", k.size(1), "; expected a multiple");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                  (q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16 ||
                   q.scalar_type() == at::kHalf || q.scalar_type() == at::kDouble),
              "span_attention: q, k, v are ", q.scalar_type(), ", ", k.scalar_type(), ", ", v.scalar_type(),
              "; expected one of float32, bfloat16, float16, float64");
  const int64_t ranges = static_cast<int64_t>(range_classes.size());
  TORCH_CHECK(ranges >= 1 && ranges <= kMaxRanges && bounds.scalar_type() == at::kInt &&
                  bounds.sizes() == at::IntArrayRef({q.size(0), q.size(2), ranges, 2}),
              "span_attention: bounds are ", bounds.scalar_type(), " ", bounds.sizes(), " for ", ranges,
              " range classes; expected int32 [", q.size(0), ", ", q.size(2), ", ", ranges, ", 2]");
  TORCH_CHECK(
      key_class.scalar_type() == at::kByte && key_class.sizes() == at::IntArrayRef({k.size(0), k.size(2)}),
      "span_attention: key_class is ", key_class.scalar_type(), " ", key_class.sizes(), "; expected uint8 [",
      k.size(0), ", ", k.size(2), "]");
  Problem p;
  p.bounds_tensor = bounds.contiguous();
  p.key_class_tensor = key_class.contiguous();
  p.B = q.size(0), p.H = q.size(1), p.G = k.size(1), p.I = q.size(2), p.J = k.size(2), p.D = q.size(3);
  p.ranges = static_cast<int>(ranges);
  p.separate = separate;
  p.bounds = p.bounds_tensor.const_data_ptr<int32_t>();
  p.key_class = p.key_class_tensor.const_data_ptr<uint8_t>();
  for (int64_t r = 0; r < ranges; ++r) {
    TORCH_CHECK(range_classes[r] >= 0 && range_classes[r] < 256, "span_attention: range_classes are ",
                range_classes, "; expected bitmasks of classes 0 to 7");
    p.range_classes[r] = static_cast<uint8_t>(range_classes[r]);
  }
  // The kernels index by these without looking again.
  for (int64_t i = 0; i < p.B * p.I * ranges; ++i) {
    TORCH_CHECK(p.bounds[2 * i] >= 0 && p.bounds[2 * i + 1] <= p.J, "span_attention: range [",
                p.bounds[2 * i], ", ", p.bounds[2 * i + 1], ") of sample ", i / (p.I * ranges), ", query ",
                i / ranges % p.I, " reaches outside the ", p.J, " keys");
  }
  for (int64_t j = 0; j < p.B * p.J; ++j) {
    TORCH_CHECK(p.key_class[j] < 8, "span_attention: key ", j % p.J, " of sample ", j / p.J, " has class ",
                static_cast<int>(p.key_class[j]), "; expected 0 (padding) to 7");
  }
  p.sinks = nullptr;
  if (sinks.has_value()) {
    TORCH_CHECK(sinks->sizes() == at::IntArrayRef({p.H}) && at::isFloatingType(sinks->scalar_type()),
                "span_attention: sinks are ", sinks->scalar_type(), " ", sinks->sizes(),
                "; expected floating [", p.H, "]");
    p.sinks_tensor = sinks->to(at::kDouble).contiguous();
    p.sinks = p.sinks_tensor.const_data_ptr<double>();
  }
  p.scale = scale;
  p.softcap = softcap;
  p.dtype = q.scalar_type();
  return p;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> span_attention_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bounds,
    const at::Tensor& key_class, at::IntArrayRef range_classes, bool separate, double scale, double softcap,
    const std::optional<at::Tensor>& sinks) {
  const Problem problem =
      make_problem(q, k, v, bounds, key_class, range_classes, separate, scale, softcap, sinks);
  const int streams = problem.streams();
  at::Tensor out = at::empty_like(q),
             stream_out = streams == 2 ? at::empty_like(q) : at::empty({0}, q.options());
  at::Tensor lse = at::empty({problem.B, problem.H, streams, problem.I},
                             q.options().dtype(problem.dtype == at::kDouble ? at::kDouble : at::kFloat));
  const at::Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
                   v_rows = with_contiguous_rows(v);
  SpanForward args{problem, strided(q_rows), strided(k_rows), strided(v_rows), strided(out),
                   {},      lse.data_ptr()};
  if (streams == 2) {
    args.stream_out = strided(stream_out);
  }
  // Rows that share their keys; for more of them packing keys and values for matrix products pays.
  constexpr int64_t kMaxDecodeRows = 16;
  if (problem.H / problem.G * problem.I <= kMaxDecodeRows) {
    PYVLM_DISPATCH_ISA(span_attention_decode, args);
  } else {
    PYVLM_DISPATCH_ISA(span_attention_forward, args);
  }
  return {out, stream_out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> span_attention_backward_cpu(
    const std::optional<at::Tensor>& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& bounds, const at::Tensor& key_class,
    at::IntArrayRef range_classes, bool separate, double scale, double softcap,
    const std::optional<at::Tensor>& sinks, const at::Tensor& out, const at::Tensor& stream_out,
    const at::Tensor& lse) {
  const Problem problem =
      make_problem(q, k, v, bounds, key_class, range_classes, separate, scale, softcap, sinks);
  at::Tensor grad_q = at::empty_like(q), grad_k = at::empty_like(k), grad_v = at::empty_like(v);
  const at::Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
                   v_rows = with_contiguous_rows(v);
  const at::Tensor out_rows = with_contiguous_rows(out);
  const at::Tensor grad_rows =
      grad_out.has_value() ? with_contiguous_rows(grad_out->to(q.scalar_type())) : at::zeros_like(out_rows);
  const at::Tensor lse_rows = lse.contiguous();
  const at::Tensor head_grad_sinks =
      sinks.has_value() ? at::empty({problem.B, problem.H}, q.options().dtype(at::kDouble)) : at::Tensor();
  const at::Tensor grad_lse_rows = grad_lse.has_value() ? grad_lse->contiguous() : at::Tensor();
  SpanBackward args{problem,
                    strided(q_rows),
                    strided(k_rows),
                    strided(v_rows),
                    strided(out_rows),
                    {},
                    strided(grad_rows),
                    strided(grad_q),
                    strided(grad_k),
                    strided(grad_v),
                    lse_rows.const_data_ptr(),
                    grad_lse.has_value() ? grad_lse_rows.const_data_ptr() : nullptr,
                    sinks.has_value() ? head_grad_sinks.mutable_data_ptr<double>() : nullptr};
  const at::Tensor stream_rows = problem.streams() == 2 ? with_contiguous_rows(stream_out) : at::Tensor();
  if (problem.streams() == 2) {
    args.stream_out = strided(stream_rows);
  }
  PYVLM_DISPATCH_ISA(span_attention_backward, args);
  const at::Tensor grad_sinks =
      sinks.has_value() ? head_grad_sinks.sum(0).to(sinks->scalar_type()) : at::empty({0}, q.options());
  return {grad_q, grad_k, grad_v, grad_sinks};
}

}  // namespace pyvlm
