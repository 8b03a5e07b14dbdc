// The torch side of the CUDA extension: CUDA kernels for schemas that the CPU extension defines.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include "moe/routing_cuda.h"

STABLE_TORCH_LIBRARY_IMPL(pyvlm, CUDA, m) {
  m.impl("expert_choice", TORCH_BOX(&pyvlm::expert_choice_cuda));
  m.impl("token_choice", TORCH_BOX(&pyvlm::token_choice_cuda));
  m.impl("routing_backward", TORCH_BOX(&pyvlm::routing_backward_cuda));
  m.impl("merge_routings", TORCH_BOX(&pyvlm::merge_routings_cuda));
  m.impl("routing_from_choices", TORCH_BOX(&pyvlm::routing_from_choices_cuda));
}

// Importing the module registers the kernels; what it holds is for pyvlm.build_info().
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition{
      .m_base = PyModuleDef_HEAD_INIT,
      .m_name = "_C_cuda",
      .m_doc = "pyvlm's CUDA kernels; importing this registers them as torch.ops.pyvlm",
      .m_size = -1};
  PyObject* extension = PyModule_Create(&definition);
  if (extension != nullptr && PyModule_AddIntMacro(extension, CUDART_VERSION) != 0) {
    Py_CLEAR(extension);
  }
  return extension;
}
