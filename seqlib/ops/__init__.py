"""Ops: causal maps that take a state and return a state, each with a reference, fast forms and one table of rows."""

from seqlib.ops.causal_conv1d import causal_conv1d
from seqlib.ops.norm import rms_norm

__all__ = ["causal_conv1d", "rms_norm"]
