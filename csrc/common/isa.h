// Kernels that use vector registers are compiled once for each instruction set (see csrc/sources.txt), each
// time with another CPU_CAPABILITY, the macro that at::vec keys on too. The code lies in `namespace
// pyvlm::CPU_CAPABILITY`, and PYVLM_DISPATCH_ISA calls the copy for the machine at hand: the one that torch
// itself chose, so that torch's own ATEN_CPU_CAPABILITY forces it.
#pragma once

#include <string>

#if defined(__x86_64__)
#define PYVLM_DECLARE_FOR_EACH_ISA(...) \
  namespace DEFAULT {                   \
  __VA_ARGS__;                          \
  }                                     \
  namespace AVX2 {                      \
  __VA_ARGS__;                          \
  }                                     \
  namespace AVX512 {                    \
  __VA_ARGS__;                          \
  }
#define PYVLM_DISPATCH_ISA(function, ...) \
  do {                                    \
    switch (::pyvlm::active_isa()) {      \
      case ::pyvlm::Isa::avx512:          \
        AVX512::function(__VA_ARGS__);    \
        break;                            \
      case ::pyvlm::Isa::avx2:            \
        AVX2::function(__VA_ARGS__);      \
        break;                            \
      case ::pyvlm::Isa::baseline:        \
        DEFAULT::function(__VA_ARGS__);   \
        break;                            \
    }                                     \
  } while (false)
#else
#define PYVLM_DECLARE_FOR_EACH_ISA(...) \
  namespace DEFAULT {                   \
  __VA_ARGS__;                          \
  }
#define PYVLM_DISPATCH_ISA(function, ...) DEFAULT::function(__VA_ARGS__)
#endif

namespace pyvlm {

enum class Isa { baseline, avx2, avx512 };

// The instruction set that kernels run with.
Isa active_isa();
std::string isa_name(Isa isa);

// True where bf16 tiles can be multiplied as they are (AVX-512 BF16 or AMX); elsewhere they are widened to
// fp32.
bool has_bf16_dot();

// True where Intel's matrix unit is there and the system lets this process use it. Forcing a capability, be
// it avx512 itself, leaves it aside.
bool has_amx();

}  // namespace pyvlm
