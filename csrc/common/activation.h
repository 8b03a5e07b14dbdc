// The activations that kernels know, by name.
#pragma once

#include <c10/util/Exception.h>

#include <string_view>
#include <utility>

namespace pyvlm {

enum class Activation { silu, gelu, gelu_tanh, quick_gelu, relu, relu2 };

inline Activation parse_activation(std::string_view name) {
  constexpr std::pair<std::string_view, Activation> kNames[] = {
      {"silu", Activation::silu},           {"gelu", Activation::gelu},
      {"gelu_tanh", Activation::gelu_tanh}, {"quick_gelu", Activation::quick_gelu},
      {"relu", Activation::relu},           {"relu2", Activation::relu2}};
  for (const auto& [known, activation] : kNames) {
    if (name == known) {
      return activation;
    }
  }
  TORCH_CHECK(false, "activation '", name, "'; expected silu, gelu, gelu_tanh, quick_gelu, relu or relu2");
}

}  // namespace pyvlm
