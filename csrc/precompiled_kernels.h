// What precompiled.h is for the other sources, for those of kernels: setup.py compiles it once for each
// instruction set, with its flags (3 s an object less; 9 s it takes itself).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
