// The Python side of the extension: facts about the build. The ops themselves are reached through
// torch.ops.pyvlm.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "common/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyvlm's CPU kernels; importing this registers torch.ops.pyvlm";
  m.def(
      "build_facts",
      [] {
        pybind11::dict facts;
        facts["torch"] = TORCH_VERSION;
        facts["compiler"] = PYVLM_COMPILER;
        facts["isa"] = pyvlm::isa_name(pyvlm::active_isa());
        facts["bf16_dot"] = pyvlm::has_bf16_dot();
        facts["amx"] = pyvlm::has_amx();
#ifdef _OPENMP
        facts["openmp"] = _OPENMP;
#else
        facts["openmp"] = pybind11::none();
#endif
        return facts;
      },
      "Versions this extension was compiled with, and the instruction set that it runs with here.");
}
