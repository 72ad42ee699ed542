"""Long-sequence modeling with state spaces, linear attention and hybrids, on fast kernels, inside Hugging Face."""
