// Attention over spans on CPU: the two functions that are registered as torch ops, and what they hand to the
// kernels.
//
// Letters, as in pyvlm/ops/attention.py: B batch, H query heads, G key/value heads, I queries, J keys, D head
// dimension, R ranges a query (1 or 2), S streams (softmaxes: R where separate, else 1).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "common/isa.h"

namespace pyvlm {

// out, the first stream's share of it (where there are two streams; else empty), lse.
std::tuple<at::Tensor, at::Tensor, at::Tensor> span_attention_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bounds,
    const at::Tensor& key_class, at::IntArrayRef range_classes, bool separate, double scale, double softcap,
    const std::optional<at::Tensor>& sinks);

// Gradients of q, k, v and sinks (empty where there are none).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> span_attention_backward_cpu(
    const std::optional<at::Tensor>& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& bounds, const at::Tensor& key_class,
    at::IntArrayRef range_classes, bool separate, double scale, double softcap,
    const std::optional<at::Tensor>& sinks, const at::Tensor& out, const at::Tensor& stream_out,
    const at::Tensor& lse);

inline constexpr int kMaxRanges = 2;

// A [batch, heads, tokens, D] tensor: strides in elements.
struct Strided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0, dim = 0;

  template <typename T>
  T* at(int64_t b, int64_t h, int64_t t) const {
    return static_cast<T*>(data) + b * batch + h * head + t * token;
  }
};

struct SpanProblem {
  int64_t B, H, G, I, J, D;
  int ranges;
  bool separate;
  const int32_t* bounds;     // [B, I, R, 2], 0 <= lo, hi <= J
  const uint8_t* key_class;  // [B, J]
  uint8_t range_classes[kMaxRanges];
  double scale, softcap;  // no cap where softcap is 0
  const double* sinks;    // [H], or null
  at::ScalarType dtype;

  int streams() const { return separate ? ranges : 1; }
};

struct SpanForward {
  SpanProblem problem;
  Strided q, k, v, out, stream_out;
  void* lse;  // [B, H, S, I]
};

struct SpanBackward {
  SpanProblem problem;
  Strided q, k, v, out, stream_out, grad_out, grad_q, grad_k, grad_v;
  const void* lse;       // [B, H, S, I]
  const void* grad_lse;  // the same, or null
  double* grad_sinks;    // [B, H], or null
};

PYVLM_DECLARE_FOR_EACH_ISA(void span_attention_forward(const SpanForward&);
                           void span_attention_decode(const SpanForward&);
                           void span_attention_backward(const SpanBackward&))

}  // namespace pyvlm
