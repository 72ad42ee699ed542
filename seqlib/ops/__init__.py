"""Ops: causal maps that take a state and return a state, each with a reference, fast forms and one table of rows."""

from seqlib.ops.attention import attention
from seqlib.ops.causal_conv1d import causal_conv1d
from seqlib.ops.delta_rule import delta_rule
from seqlib.ops.diagonal_step import diagonal_step
from seqlib.ops.gelu_glu import gelu_glu
from seqlib.ops.linear import linear
from seqlib.ops.linear_attention import linear_attention
from seqlib.ops.linear_cross_entropy import linear_cross_entropy
from seqlib.ops.linear_scan import linear_scan
from seqlib.ops.linears import linears
from seqlib.ops.long_conv import long_conv
from seqlib.ops.mamba2_step import mamba2_step
from seqlib.ops.mamba_step import mamba_step
from seqlib.ops.matrix_step import matrix_step
from seqlib.ops.norm import rms_norm
from seqlib.ops.path_attention import path_attention
from seqlib.ops.rotate import rotate
from seqlib.ops.rpe_attention import rpe_attention
from seqlib.ops.selective_scan import selective_scan
from seqlib.ops.ssm_kernel import ssm_kernel_diag, ssm_kernel_dplr

__all__ = [
    "attention",
    "causal_conv1d",
    "delta_rule",
    "diagonal_step",
    "gelu_glu",
    "linear",
    "linear_attention",
    "linear_cross_entropy",
    "linear_scan",
    "linears",
    "long_conv",
    "mamba2_step",
    "mamba_step",
    "matrix_step",
    "path_attention",
    "rms_norm",
    "rotate",
    "rpe_attention",
    "selective_scan",
    "ssm_kernel_diag",
    "ssm_kernel_dplr",
]
