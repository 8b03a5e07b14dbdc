"""How pyvlm's kernels run inside models of transformers, through its official extension points."""
