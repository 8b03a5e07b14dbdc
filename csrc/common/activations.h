// Activations and their slopes, on vectors.
#pragma once

#include "common/activation.h"
#include "common/vec_math.h"

namespace pyvlm::CPU_CAPABILITY {

// 1 / (1 + exp(-x)).
template <Precision precision, typename T>
inline Vec<T> sigmoid(const Vec<T>& x) {
  const Vec<T> one(T(1));
  const Vec<T> denominator = one + exp2<precision>(x * Vec<T>(T(-1.4426950408889634074)));
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (precision == Precision::bf16) {
    return Vec<T>(_mm512_rcp14_ps(denominator));  // a division takes as long as all the rest
  }
#endif
  return one / denominator;
}

// act(x), and with it act'(x) where `slope` is given.
template <Activation activation, Precision precision, typename T>
inline Vec<T> activate(const Vec<T>& x, Vec<T>* slope = nullptr) {
  using V = Vec<T>;
  const V one(T(1)), zero(T(0)), half(T(0.5));
  if constexpr (activation == Activation::silu) {
    const V s = sigmoid<precision>(x), y = x * s;
    if (slope != nullptr) {
      *slope = at::vec::fmadd(y, one - s, s);
    }
    return y;
  } else if constexpr (activation == Activation::gelu) {
    const V cdf = half * (one + (x * V(T(0.70710678118654752440))).erf());
    if (slope != nullptr) {
      const V density = V(T(0.39894228040143267794)) *
                        exp2<precision>(x * x * V(T(-0.72134752044448170368)));  // exp(-x^2 / 2)
      *slope = at::vec::fmadd(x, density, cdf);
    }
    return x * cdf;
  } else if constexpr (activation == Activation::gelu_tanh) {
    // (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const V scale(T(1.5957691216057307117)), cube(T(0.044715)), square = x * x;
    const V s = sigmoid<precision>(scale * x * at::vec::fmadd(cube, square, one)), y = x * s;
    if (slope != nullptr) {
      const V inner = scale * at::vec::fmadd(V(T(3)) * cube, square, one);
      *slope = at::vec::fmadd(y * (one - s), inner, s);
    }
    return y;
  } else if constexpr (activation == Activation::quick_gelu) {
    const V bend(T(1.702));  // OpenAI's CLIP: x sigmoid(1.702 x)
    const V s = sigmoid<precision>(bend * x), y = x * s;
    if (slope != nullptr) {
      *slope = at::vec::fmadd(bend * y, one - s, s);
    }
    return y;
  } else {
    const V positive = at::vec::maximum(x, zero);
    if constexpr (activation == Activation::relu) {
      if (slope != nullptr) {
        *slope = V::blendv(zero, one, x > zero);
      }
      return positive;
    } else {
      if (slope != nullptr) {
        *slope = positive + positive;
      }
      return positive * positive;
    }
  }
}

// Calls f with the activation as a compile-time constant.
template <typename F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>());
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::quick_gelu:
      return f(std::integral_constant<Activation, Activation::quick_gelu>());
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>());
    case Activation::relu2:
      return f(std::integral_constant<Activation, Activation::relu2>());
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
