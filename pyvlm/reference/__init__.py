"""Plain PyTorch versions of every op: the definition that the native kernels are tested against."""
