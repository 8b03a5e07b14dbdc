"""Triton kernels, a file a family; installed as `pyvlm.triton_kernels`: the bare name is taken."""
