"""Long-sequence modeling with state spaces, linear attention and hybrids, on fast kernels, inside Hugging Face."""

from seqlib.dispatch import explain, use_backend

__version__ = "0.1.0"
__all__ = ["__version__", "explain", "use_backend"]
