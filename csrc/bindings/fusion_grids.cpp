// The torch side of maps brought into one sequence: schemas and autocast rules. CPU and CUDA share the code.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "fusion/fuse_grids.h"

TORCH_LIBRARY_FRAGMENT(pyvlm, m) {
  m.def(
      "fuse_grids(Tensor[] features, int[] grids, int[] target, Tensor? weight, Tensor? bias, str mode, bool "
      "align_corners) -> Tensor");
  m.def(
      "fuse_grids_backward(Tensor grad_y, Tensor[] features, int[] grids, int[] target, Tensor? weight, str "
      "mode, bool align_corners, bool[] needs) -> (Tensor[] grad_features, Tensor grad_weight, Tensor "
      "grad_bias)");
  m.def("patches_to_token(Tensor[] features, Tensor[] weights, Tensor[] biases, int[] patches) -> Tensor");
  m.def(
      "patches_to_token_backward(Tensor grad_y, Tensor[] features, Tensor[] weights, int[] patches, bool[] "
      "needs) -> (Tensor[] grad_features, Tensor[] grad_weights, Tensor[] grad_biases)");
}

namespace {

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> fuse_grids_backward(
    const at::Tensor& grad_y, at::TensorList features, at::IntArrayRef grids, at::IntArrayRef target,
    const std::optional<at::Tensor>& weight, std::string_view mode, bool align_corners,
    const c10::List<bool>& needs) {
  return pyvlm::fuse_grids_backward(grad_y, features, grids, target, weight, mode, align_corners,
                                    {needs.begin(), needs.end()});
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>
patches_to_token_backward(const at::Tensor& grad_y, at::TensorList features, at::TensorList weights,
                          at::IntArrayRef patches, const c10::List<bool>& needs) {
  return pyvlm::patches_to_token_backward(grad_y, features, weights, patches, {needs.begin(), needs.end()});
}

template <typename Library>
void implement(Library& m) {
  m.impl("fuse_grids", &pyvlm::fuse_grids);
  m.impl("fuse_grids_backward", &fuse_grids_backward);
  m.impl("patches_to_token", &pyvlm::patches_to_token);
  m.impl("patches_to_token_backward", &patches_to_token_backward);
}

// All in autocast's type where there is a product, as torch's own linear does.
template <at::DeviceType device, c10::DispatchKey key>
struct Autocast {
  static at::Tensor cast(const at::Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  }
  static std::vector<at::Tensor> cast_all(at::TensorList tensors) {
    std::vector<at::Tensor> out;
    for (const at::Tensor& t : tensors) {
      out.push_back(cast(t));
    }
    return out;
  }

  static at::Tensor fuse_grids(at::TensorList features, at::IntArrayRef grids, at::IntArrayRef target,
                               const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                               std::string_view mode, bool align_corners) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("pyvlm::fuse_grids", "")
                               .typed<decltype(pyvlm::fuse_grids)>();
    const auto cast_one = [&](const std::optional<at::Tensor>& t) {
      return t.has_value() ? std::optional(cast(*t)) : t;
    };
    return op.call(cast_all(features), grids, target, cast_one(weight), cast_one(bias), mode, align_corners);
  }

  static at::Tensor patches_to_token(at::TensorList features, at::TensorList weights, at::TensorList biases,
                                     at::IntArrayRef patches) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("pyvlm::patches_to_token", "")
                               .typed<decltype(pyvlm::patches_to_token)>();
    return op.call(cast_all(features), cast_all(weights), cast_all(biases), patches);
  }
};

using AutocastCpu = Autocast<at::kCPU, c10::DispatchKey::AutocastCPU>;
using AutocastCuda = Autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>;

}  // namespace

TORCH_LIBRARY_IMPL(pyvlm, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(pyvlm, CUDA, m) { implement(m); }

TORCH_LIBRARY_IMPL(pyvlm, AutocastCPU, m) {
  m.impl("fuse_grids", &AutocastCpu::fuse_grids);
  m.impl("patches_to_token", &AutocastCpu::patches_to_token);
}

TORCH_LIBRARY_IMPL(pyvlm, AutocastCUDA, m) {
  m.impl("fuse_grids", &AutocastCuda::fuse_grids);
  m.impl("patches_to_token", &AutocastCuda::patches_to_token);
}
