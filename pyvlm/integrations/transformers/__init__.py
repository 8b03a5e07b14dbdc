"""How pyvlm's kernels serve models of Hugging Face transformers."""
