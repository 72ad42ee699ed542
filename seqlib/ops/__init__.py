"""Ops: causal maps that take a state and return a state, each with a reference, fast forms and one table of rows."""

from seqlib.ops.attention import attention
from seqlib.ops.norm import rms_norm

__all__ = ["attention", "rms_norm"]
