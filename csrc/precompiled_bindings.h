// torch's headers, of which a compiler reads more than of all else: setup.py compiles them once and puts them
// before every source of bindings/ (13 to 23 s an object become 6 to 12). Sources include what they use all
// the same; the developer build takes them as they are.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
