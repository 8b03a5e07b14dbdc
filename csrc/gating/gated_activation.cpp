// Tensors in, tensors out: what the kernels rely on, where rows lie, and the outputs.
#include "gating/gated_activation.h"

#include "common/empty.h"

namespace pyvlm {
namespace {

// [R, I] with neighbouring elements: a view wherever the dimensions before I can be one, as in half of a
// joint projection.
at::Tensor as_rows(const at::Tensor& t) {
  const at::Tensor rows = t.reshape({-1, t.size(-1)});
  return rows.stride(-1) == 1 || rows.size(-1) == 1 ? rows : rows.contiguous();
}

GatedRows rows_of(const at::Tensor& rows) { return {rows.const_data_ptr(), rows.stride(0)}; }

void check(const at::Tensor& gate, const at::Tensor& other) {
  TORCH_CHECK(gate.dim() >= 1 && gate.sizes() == other.sizes() && gate.scalar_type() == other.scalar_type() &&
                  gate.is_floating_point(),
              "gated_activation: gate is ", gate.scalar_type(), " ", gate.sizes(), " and the other ",
              other.scalar_type(), " ", other.sizes(), "; expected floating-point tensors of one shape");
}

// Of an up that is not there, as of no rows: an undefined tensor.
at::Tensor as_rows(const std::optional<at::Tensor>& up) { return up ? as_rows(*up) : at::Tensor(); }

GatedProblem problem_of(const at::Tensor& gate, const at::Tensor& up, std::string_view activation) {
  return {gate.size(0),       gate.size(1),  parse_activation(activation),
          gate.scalar_type(), rows_of(gate), up.defined() ? rows_of(up) : GatedRows{nullptr, 0}};
}

}  // namespace

at::Tensor gated_activation_cpu(const at::Tensor& gate, const std::optional<at::Tensor>& up,
                                std::string_view activation) {
  check(gate, up.value_or(gate));
  const at::Tensor y = make_empty(gate.sizes(), gate.options());
  if (y.numel() > 0) {
    const at::Tensor gate_rows = as_rows(gate), up_rows = as_rows(up);
    const GatedProblem problem = problem_of(gate_rows, up_rows, activation);
    PYVLM_DISPATCH_ISA(gated_activation, problem, y.mutable_data_ptr(), problem.channels);
  }
  return y;
}

void gated_activation_inplace_cpu(at::Tensor& gate, const std::optional<at::Tensor>& up,
                                  std::string_view activation) {
  check(gate, up.value_or(gate));
  if (gate.numel() == 0) {
    return;
  }
  const at::Tensor gate_rows = as_rows(gate), up_rows = as_rows(up);
  const GatedProblem problem = problem_of(gate_rows, up_rows, activation);
  void* y = gate_rows.mutable_data_ptr();
  PYVLM_DISPATCH_ISA(gated_activation, problem, y, problem.gate.ld);
  if (!gate_rows.is_alias_of(gate)) {  // its rows lie in no order that a kernel takes
    gate.copy_(gate_rows.view(gate.sizes()));
  }
}

std::tuple<at::Tensor, at::Tensor> gated_activation_backward_cpu(const at::Tensor& grad_y,
                                                                 const at::Tensor& gate,
                                                                 const std::optional<at::Tensor>& up,
                                                                 std::string_view activation) {
  check(gate, up.value_or(gate));
  check(gate, grad_y);
  const at::Tensor grad_gate = make_empty(gate.sizes(), gate.options());
  const at::Tensor grad_up = make_empty(up ? gate.sizes() : at::IntArrayRef{0}, gate.options());
  if (gate.numel() > 0) {
    const at::Tensor gate_rows = as_rows(gate), up_rows = as_rows(up), grad_rows = as_rows(grad_y);
    const GatedProblem problem = problem_of(gate_rows, up_rows, activation);
    PYVLM_DISPATCH_ISA(gated_activation_backward, problem, rows_of(grad_rows), grad_gate.mutable_data_ptr(),
                       grad_up.mutable_data_ptr());
  }
  return {grad_gate, grad_up};
}

}  // namespace pyvlm
