// Tensors in, tensors out: checks what the kernels rely on, makes the outputs.
#include "cross_attention/local_cross_attention.h"

#include <ATen/ops/empty.h>

#include <cmath>

#include "common/empty.h"

namespace pyvlm {
namespace {

// What an LocalAttention points into.
struct Problem : LocalAttention {
  std::vector<at::Tensor> held;

  HeadRows hold(const at::Tensor& t) {
    held.push_back(t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous());
    const at::Tensor& rows = held.back();
    return {rows.data_ptr(), rows.stride(0), rows.stride(1), rows.stride(2)};
  }
};

// A result [N, A, tokens, D] that lies as [N, tokens, A, D]: joining its heads copies nothing.
at::Tensor make_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return make_empty({sizes[0], sizes[2], sizes[1], sizes[3]}, options).transpose(1, 2);
}

Problem make_problem(const at::Tensor& query, at::TensorList keys, at::TensorList values, int64_t rows,
                     int64_t columns, at::TensorList masks, double scale) {
  TORCH_CHECK_VALUE(
      query.dim() == 4 && query.size(3) > 0 && rows > 0 && columns > 0 && query.size(2) == rows * columns,
      "local_cross_attention: query is ", query.sizes(), " on a grid of ", rows, " x ", columns,
      "; expected [N, A, rows * columns, D]");
  TORCH_CHECK_VALUE(
      !keys.empty() && values.size() == keys.size() && (masks.empty() || masks.size() == keys.size()),
      "local_cross_attention: ", keys.size(), " keys, ", values.size(), " values, ", masks.size(),
      " masks; expected as many, one a map, or no masks");
  Problem p;
  p.N = query.size(0), p.A = query.size(1), p.Q = query.size(2), p.D = query.size(3);
  p.rows = rows, p.columns = columns;
  p.scale = scale;
  p.dtype = query.scalar_type();
  TORCH_CHECK_TYPE(
      p.dtype == at::kFloat || p.dtype == at::kBFloat16 || p.dtype == at::kHalf || p.dtype == at::kDouble,
      "local_cross_attention: query is ", p.dtype, "; expected float32, bfloat16, float16 or float64");
  p.query = p.hold(query);
  p.window = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    const at::Tensor &key = keys[i], &value = values[i];
    TORCH_CHECK_TYPE(key.scalar_type() == p.dtype && value.scalar_type() == p.dtype,
                     "local_cross_attention: keys[", i, "] is ", key.scalar_type(), ", values[", i, "] ",
                     value.scalar_type(), " and query ", p.dtype, "; expected one dtype");
    LocalMap map{};
    map.T = key.dim() == 4 ? key.size(2) : 0;
    map.side = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(map.T / p.Q))));
    TORCH_CHECK_VALUE(
        map.side > 0 && map.T == p.Q * map.side * map.side &&
            key.sizes() == at::IntArrayRef({p.N, p.A, map.T, p.D}) && value.sizes() == key.sizes(),
        "local_cross_attention: keys[", i, "] is ", key.sizes(), ", values[", i, "] ", value.sizes(),
        " beside query ", query.sizes(), "; expected [N, A, T, D], T the queries times a square");
    map.key = p.hold(key), map.value = p.hold(value);
    if (!masks.empty()) {
      TORCH_CHECK_VALUE(
          masks[i].scalar_type() == at::kBool && masks[i].sizes() == at::IntArrayRef({p.N, map.T}),
          "local_cross_attention: masks[", i, "] is ", masks[i].scalar_type(), " ", masks[i].sizes(),
          "; expected bool [", p.N, ", ", map.T, "]");
      p.held.push_back(masks[i].contiguous());
      map.mask = p.held.back().const_data_ptr<bool>();
    }
    p.window += map.side * map.side;
    p.maps.push_back(map);
  }
  return p;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> local_cross_attention_cpu(const at::Tensor& query, at::TensorList keys,
                                                             at::TensorList values, int64_t rows,
                                                             int64_t columns, at::TensorList masks,
                                                             double scale) {
  Problem p = make_problem(query, keys, values, rows, columns, masks, scale);
  const at::Tensor out = make_result(query.sizes(), query.options());
  const at::Tensor lse =
      at::empty({p.N, p.A, p.Q}, query.options().dtype(p.dtype == at::kDouble ? at::kDouble : at::kFloat));
  p.out = p.hold(out);
  p.lse = lse.data_ptr();
  PYVLM_DISPATCH_ISA(local_cross_attention_forward, p);
  return {out, lse};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> local_cross_attention_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& query, at::TensorList keys, at::TensorList values,
    int64_t rows, int64_t columns, at::TensorList masks, double scale, const at::Tensor& out,
    const at::Tensor& lse) {
  Problem p = make_problem(query, keys, values, rows, columns, masks, scale);
  const auto acc_dtype = p.dtype == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(grad_out.sizes() == query.sizes() && out.sizes() == query.sizes() &&
                        out.scalar_type() == p.dtype && lse.scalar_type() == acc_dtype &&
                        lse.sizes() == at::IntArrayRef({p.N, p.A, p.Q}),
                    "local_cross_attention_backward: grad_out is ", grad_out.sizes(), ", out ",
                    out.scalar_type(), " ", out.sizes(), ", lse ", lse.scalar_type(), " ", lse.sizes(),
                    "; expected twice ", query.sizes(), " in ", p.dtype, ", and [N, A, Q] in ", acc_dtype);
  const at::Tensor lse_rows = lse.contiguous(), grad_query = make_result(query.sizes(), query.options());
  std::vector<at::Tensor> grad_keys, grad_values;
  for (size_t i = 0; i < keys.size(); ++i) {
    grad_keys.push_back(make_result(keys[i].sizes(), query.options()));
    grad_values.push_back(make_result(keys[i].sizes(), query.options()));
    p.maps[i].grad_key = p.hold(grad_keys[i]);
    p.maps[i].grad_value = p.hold(grad_values[i]);
  }
  p.out = p.hold(out);
  p.lse = lse_rows.data_ptr();
  const HeadRows grad_out_rows = p.hold(grad_out.to(p.dtype)), grad_query_rows = p.hold(grad_query);
  const LocalAttentionBackward args{p, grad_out_rows, grad_query_rows};
  PYVLM_DISPATCH_ISA(local_cross_attention_backward, args);
  return {grad_query, grad_keys, grad_values};
}

}  // namespace pyvlm
