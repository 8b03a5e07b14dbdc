"""Training data: where conversations come from."""
