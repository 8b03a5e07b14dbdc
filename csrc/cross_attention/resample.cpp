#include "cross_attention/resample.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "attention/span_attention.h"
#include "linear/linear.h"

namespace pyvlm {
namespace {

// Torch's own on CUDA; on CPU ours, through the dispatcher and so with its gradient.
at::Tensor project(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  if (!x.is_cpu()) {
    return at::linear(x, weight, bias);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyvlm::linear", "")
                             .typed<decltype(pyvlm::linear_cpu)>();
  return op.call(x, weight, bias);
}

// Every query sees every key. On CPU 256 queries of 1024 keys in 32 heads took torch's attention 2.4 times as
// long in fp32 and 4.9 times in bf16; on CUDA the gradient of torch's adds by atomics, in another order each
// time. For what ours does not take there, torch's is made of products.
constexpr int64_t kMaxHeadDim = 256;  // of the Triton kernels, which have no float64 either
at::Tensor attend(const at::Tensor& q_NAQD, const at::Tensor& k_NATD, const at::Tensor& v_NATD, int64_t D) {
  const c10::SymInt tokens = k_NATD.sym_size(2);
  if (!q_NAQD.is_cpu() && (q_NAQD.scalar_type() == at::kDouble || D > kMaxHeadDim)) {
    return at::scaled_dot_product_attention(q_NAQD, k_NATD, v_NATD);
  }
  const auto int32 = q_NAQD.options().dtype(at::kInt);
  const c10::SymInt queries[] = {q_NAQD.sym_size(0), q_NAQD.sym_size(2), 1, 1};
  const at::Tensor bounds =
      at::cat({at::zeros_symint(queries, int32), at::full_symint(queries, tokens, int32)}, 3);
  const at::Tensor key_class =
      at::ones_symint({k_NATD.sym_size(0), tokens}, q_NAQD.options().dtype(at::kByte));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyvlm::span_attention", "")
                             .typed<decltype(pyvlm::span_attention_cpu)>();
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  constexpr int64_t kClassOne = 1 << 1;
  return std::get<0>(
      op.call(q_NAQD, k_NATD, v_NATD, bounds, key_class, {kClassOne}, false, scale, 0.0, std::nullopt));
}

}  // namespace

at::Tensor resample(const at::Tensor& features, const at::Tensor& query, const at::Tensor& query_position,
                    const at::Tensor& key_position, const at::Tensor& in_proj_weight,
                    const at::Tensor& out_proj_weight, int64_t num_heads,
                    const std::optional<at::Tensor>& in_proj_bias,
                    const std::optional<at::Tensor>& out_proj_bias) {
  TORCH_CHECK(features.dim() == 3 && query.dim() == 2 && in_proj_weight.dim() == 2,
              "resample: features, query and in_proj_weight have ", features.dim(), ", ", query.dim(),
              " and ", in_proj_weight.dim(), " dimensions; expected [N, T, E], [Q, E] and [3E, E]");
  const int64_t E = in_proj_weight.sym_size(1).guard_int(__FILE__, __LINE__);
  TORCH_CHECK(in_proj_weight.sym_size(0) == 3 * E && num_heads > 0 && E % num_heads == 0,
              "resample: in_proj_weight is ", in_proj_weight.sym_sizes(), " for ", num_heads,
              " heads; expected [3E, E] with E a multiple of the heads");
  // Cut in one go: the gradient of three slices is three tensors of the whole size, mostly zeros, and took a
  // sixth of a bf16 training step.
  const std::vector<at::Tensor> weights = in_proj_weight.chunk(3);
  const std::vector<at::Tensor> biases =
      in_proj_bias.has_value() ? in_proj_bias->chunk(3) : std::vector<at::Tensor>();
  // The projection number `part` (query, key, value), in heads [.., A, L, D].
  const auto heads = [&](const at::Tensor& x, int64_t part) {
    return project(x, weights[part], biases.empty() ? std::nullopt : std::optional(biases[part]))
        .unflatten(-1, {num_heads, E / num_heads})
        .transpose(-3, -2);
  };
  // The queries are the same for all images: projected once. W_k p could be a row that is added to each key;
  // but to project the positions costs as much as to project the keys of an image, so they are added before.
  const at::Tensor q_AQD = heads(query + query_position, 0);
  const at::Tensor k_NATD = heads(features + key_position, 1), v_NATD = heads(features, 2);
  const at::Tensor q_NAQD =
      q_AQD.expand_symint({features.sym_size(0), num_heads, query.sym_size(0), E / num_heads});
  const at::Tensor out_NAQD = attend(q_NAQD, k_NATD, v_NATD, E / num_heads);
  return project(out_NAQD.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias);
}

}  // namespace pyvlm
