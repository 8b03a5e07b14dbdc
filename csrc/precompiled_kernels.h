// What precompiled_bindings.h is for bindings, for sources of kernels: setup.py compiles it once for each
// instruction set, with its flags (2.5 to 4 s an object less; it takes 12 s itself).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
