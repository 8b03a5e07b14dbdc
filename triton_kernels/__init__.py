"""Triton kernels, one file a family. Installed as `pyvlm.triton_kernels`: the bare name belongs to another project."""
