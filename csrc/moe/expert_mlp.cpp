// Tensors in, tensors out: checks what the kernels rely on, lays inputs out, makes the outputs.
#include "moe/expert_mlp.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "common/empty.h"

namespace pyvlm {
namespace {

// The kernels index by these without looking again.
void check_offsets(const char* name, const at::Tensor& offsets, int64_t count, int64_t end) {
  TORCH_CHECK(offsets.scalar_type() == at::kInt && offsets.sizes() == at::IntArrayRef({count + 1}),
              "expert_mlp: ", name, " are ", offsets.scalar_type(), " ", offsets.sizes(),
              "; expected int32 [", count + 1, "]");
  const int32_t* value = offsets.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(value[0] == 0 && value[count] == end && std::is_sorted(value, value + count + 1),
                    "Routing.", name, " must rise from 0 to ", end, ", the number of slots, got ",
                    at::IntArrayRef(std::vector<int64_t>(value, value + std::min<int64_t>(count + 1, 8))),
                    count < 8 ? "" : " ...", " ending in ", value[count]);
}

void check_indices(const char* name, const at::Tensor& index, int64_t slots, int64_t end) {
  TORCH_CHECK(index.scalar_type() == at::kInt && index.sizes() == at::IntArrayRef({slots}),
              "expert_mlp: ", name, " is ", index.scalar_type(), " ", index.sizes(), "; expected int32 [",
              slots, "]");
  if (slots == 0) {
    return;
  }
  const int32_t* value = index.const_data_ptr<int32_t>();
  const auto [lowest, highest] = std::minmax_element(value, value + slots);
  TORCH_CHECK_VALUE(*lowest >= 0 && *highest < end, "Routing.", name, " holds indices from ", *lowest, " to ",
                    *highest, ", outside 0 to ", end - 1);
}

// Holds the contiguous tensors that an ExpertProblem points into.
struct Problem : ExpertProblem {
  std::vector<at::Tensor> held;

  const at::Tensor& hold(const at::Tensor& t) {
    held.push_back(t.contiguous());
    return held.back();
  }
};

Problem make_problem(const at::Tensor& x, const at::Tensor& token, const at::Tensor& weight,
                     const at::Tensor& expert_offsets, const at::Tensor& token_offsets,
                     const at::Tensor& slot, const at::Tensor& gate_up, const at::Tensor& down,
                     std::string_view activation, bool gated, const std::optional<at::Tensor>& gate_up_bias,
                     const std::optional<at::Tensor>& down_bias) {
  TORCH_CHECK(x.dim() == 2 && gate_up.dim() == 3 && down.dim() == 3 && gate_up.size(2) == x.size(1),
              "expert_mlp: x is ", x.sizes(), ", gate_up ", gate_up.sizes(), ", down ", down.sizes(),
              "; expected [T, H], [E, U, H], [E, H, I]");
  Problem p;
  p.T = x.size(0), p.H = x.size(1), p.S = token.numel(), p.E = gate_up.size(0), p.U = gate_up.size(1);
  p.I = gated ? p.U / 2 : p.U;
  p.gated = gated;
  p.activation = parse_activation(activation);
  p.dtype = x.scalar_type();
  TORCH_CHECK((!gated || p.U % 2 == 0) && down.sizes() == at::IntArrayRef({p.E, p.H, p.I}),
              "expert_mlp: down is ", down.sizes(), " beside gate_up ", gate_up.sizes(), "; expected [", p.E,
              ", ", p.H, ", ", p.I, "]");
  TORCH_CHECK(
      p.dtype == at::kFloat || p.dtype == at::kBFloat16 || p.dtype == at::kHalf || p.dtype == at::kDouble,
      "expert_mlp: x is ", p.dtype, "; expected float32, bfloat16, float16 or float64");
  for (const at::Tensor* t : {&gate_up, &down}) {
    TORCH_CHECK(t->scalar_type() == p.dtype, "expert_mlp: weights are ", t->scalar_type(), " and x is ",
                p.dtype);
  }
  const auto bias = [&](const std::optional<at::Tensor>& given, int64_t rows) -> const void* {
    if (!given.has_value()) {
      return nullptr;
    }
    TORCH_CHECK(given->sizes() == at::IntArrayRef({p.E, rows}) && given->scalar_type() == p.dtype,
                "expert_mlp: a bias is ", given->scalar_type(), " ", given->sizes(), "; expected ", p.dtype,
                " [", p.E, ", ", rows, "]");
    return p.hold(*given).const_data_ptr();
  };
  p.up_bias = bias(gate_up_bias, p.U);
  p.down_bias = bias(down_bias, p.H);
  const auto checked = [&](auto check, const char* name, const at::Tensor& t, int64_t count, int64_t end) {
    const at::Tensor& held = p.hold(t);
    check(name, held, count, end);
    return held.const_data_ptr<int32_t>();
  };
  p.expert_offsets = checked(check_offsets, "expert_offsets", expert_offsets, p.E, p.S);
  p.token_offsets = checked(check_offsets, "token_offsets", token_offsets, p.T, p.S);
  p.token = checked(check_indices, "token", token, p.S, p.T);
  p.slot = checked(check_indices, "slot", slot, p.S, p.S);
  TORCH_CHECK(weight.sizes() == token.sizes(), "expert_mlp: weight is ", weight.sizes(), "; expected ",
              token.sizes());
  p.weight = p.hold(weight.to(p.dtype == at::kDouble ? at::kDouble : at::kFloat)).const_data_ptr();
  p.x = p.hold(x).const_data_ptr();
  p.gate_up = p.hold(gate_up).const_data_ptr();
  p.down = p.hold(down).const_data_ptr();
  return p;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> expert_mlp_cpu(const at::Tensor& x, const at::Tensor& token,
                                                  const at::Tensor& weight, const at::Tensor& expert_offsets,
                                                  const at::Tensor& token_offsets, const at::Tensor& slot,
                                                  const at::Tensor& gate_up, const at::Tensor& down,
                                                  std::string_view activation, bool gated,
                                                  const std::optional<at::Tensor>& gate_up_bias,
                                                  const std::optional<at::Tensor>& down_bias,
                                                  bool keep_hidden) {
  const Problem p = make_problem(x, token, weight, expert_offsets, token_offsets, slot, gate_up, down,
                                 activation, gated, gate_up_bias, down_bias);
  at::Tensor y = make_empty({p.T, p.H}, x.options());
  at::Tensor hidden = keep_hidden ? make_empty({p.S, p.U}, x.options()) : at::empty({0}, x.options());
  const ExpertForward args{p, y.data_ptr(), keep_hidden ? hidden.data_ptr() : nullptr};
  int64_t most = 0;
  for (int64_t e = 0; e < p.E; ++e) {
    most = std::max<int64_t>(most, p.expert_offsets[e + 1] - p.expert_offsets[e]);
  }
  if (most <= kMaxDecodeTokens) {
    PYVLM_DISPATCH_ISA(expert_mlp_decode, args);
  } else {
    PYVLM_DISPATCH_ISA(expert_mlp_forward, args);
  }
  return {y, hidden};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_backward_cpu(
    const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& hidden, const at::Tensor& token,
    const at::Tensor& weight, const at::Tensor& expert_offsets, const at::Tensor& token_offsets,
    const at::Tensor& slot, const at::Tensor& gate_up, const at::Tensor& down, std::string_view activation,
    bool gated, const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    std::array<bool, 6> needs) {
  Problem p = make_problem(x, token, weight, expert_offsets, token_offsets, slot, gate_up, down, activation,
                           gated, gate_up_bias, down_bias);
  TORCH_CHECK(grad_y.sizes() == x.sizes() && hidden.sizes() == at::IntArrayRef({p.S, p.U}) &&
                  hidden.scalar_type() == p.dtype,
              "expert_mlp_backward: grad_y is ", grad_y.sizes(), " and hidden ", hidden.scalar_type(), " ",
              hidden.sizes(), "; expected ", x.sizes(), " and ", p.dtype, " [", p.S, ", ", p.U, "]");
  const auto grad = [&](int which, const std::optional<at::Tensor>& like) {
    return needs[which] && like.has_value() ? make_empty(like->sizes(), x.options())
                                            : at::empty({0}, x.options());
  };
  const auto acc_dtype = p.dtype == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor grads[] = {grad(0, x),
                        at::empty({needs[1] ? p.S : 0}, x.options().dtype(acc_dtype)),
                        grad(2, gate_up),
                        grad(3, down),
                        grad(4, gate_up_bias),
                        grad(5, down_bias)};
  const auto data = [](at::Tensor& t) { return t.numel() > 0 ? t.data_ptr() : nullptr; };
  const ExpertBackward args{p,
                            p.hold(grad_y.to(p.dtype)).const_data_ptr(),
                            p.hold(hidden).const_data_ptr(),
                            data(grads[0]),
                            data(grads[1]),
                            data(grads[2]),
                            data(grads[3]),
                            data(grads[4]),
                            data(grads[5])};
  PYVLM_DISPATCH_ISA(expert_mlp_backward, args);
  return {grads[0], grads[1].to(needs[1] ? weight.scalar_type() : p.dtype), grads[2], grads[3], grads[4],
          grads[5]};
}

}  // namespace pyvlm
