#include "common/isa.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>

#include <cstdlib>

namespace pyvlm {

Isa active_isa() {
  static const Isa isa = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      return Isa::avx512;
    }
    return capability == "AVX2" ? Isa::avx2 : Isa::baseline;
  }();
  return isa;
}

std::string isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      return "baseline";
  }
  return "unknown";
}

bool has_bf16_dot() {
#if defined(__x86_64__)
  // Torch's bf16 product, which the tiles go through, raises where oneDNN is switched off; torch does that
  // itself when one of its own products has run out of memory.
  return active_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16") &&
         at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

bool has_amx() {
#if defined(__x86_64__)
  static const bool yes = active_isa() == Isa::avx512 && std::getenv("ATEN_CPU_CAPABILITY") == nullptr &&
                          __builtin_cpu_supports("amx-bf16") && at::cpu::init_amx();
  return yes;
#else
  return false;
#endif
}

}  // namespace pyvlm
