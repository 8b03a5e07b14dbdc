"""`python -m benchmarks.gpu`: builds, tests and measures pyvlm on a GPU, in parts, and writes one JSON."""
