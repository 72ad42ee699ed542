"""Other libraries' kernels for `python -m seqlib.bench gpu`, each used only where it is installed.

Those that also are vendor rows of an op (mamba-ssm, causal-conv1d, flash-attn) are timed as rows.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from seqlib.bench.gate import Peer

__all__ = ["PEERS", "YARDSTICKS"]


def _call(module: str, name: str) -> Callable[..., Any]:
    """The function when it is first called: importing a peer may compile."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return run


def _conv_first(t: dict[str, Any]) -> dict[str, Any]:
    x = t["x"].transpose(1, 2).contiguous()
    return {"x": x, "weight": t["weight"][:, None].to(x.dtype), "bias": t["bias"].to(x.dtype)}


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv1d(x, weight, bias, padding=weight.shape[-1] - 1, groups=x.shape[1])[..., : x.shape[-1]]
    return F.silu(y).transpose(1, 2)


def _gla(t: dict[str, Any]) -> dict[str, Any]:
    q, k, v, g = t["q"], t["k"], t["v"], t["log_decay"]
    shared = v.shape[2] // k.shape[2]
    made = {"q": q.repeat_interleave(shared, 2), "k": k.repeat_interleave(shared, 2), "v": v}
    return made | ({"g_gamma": g} if g.dim() == 1 else {"g": g})


def _simple_gla(**t: Any) -> Tensor:
    _let_run()
    return _call("fla.ops.simple_gla", "chunk_simple_gla")(**t, scale=1.0)[0]


def _let_run() -> None:
    """fla refuses gated gradients on Hopper under Triton before 3.7.1. Here its kernels take part all the same, since
    what was wrong came from the assembler, which may be another (TRITON_PTXAS_PATH)."""
    importlib.import_module("fla.ops.common.chunk_o").TRITON_ABOVE_3_7_1 = True


def _heads_first(t: dict[str, Any]) -> dict[str, Any]:
    q, k, v = (t[name].transpose(1, 2) for name in "qkv")
    shared = v.shape[1] // k.shape[1]
    return {"query": q.repeat_interleave(shared, 1), "key": k.repeat_interleave(shared, 1), "value": v}


def _softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def _delta(t: dict[str, Any]) -> dict[str, Any]:
    return {"q": t["q"], "k": t["k"], "v": t["v"], "g": t["log_decay"], "beta": t["beta"], "scale": t["scale"]}


def _gated_delta(**t: Any) -> Tensor:
    _let_run()
    return _call("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")(**t)[0]


def _time_last(t: dict[str, Any]) -> dict[str, Any]:
    return {"gates": t["a"].transpose(1, 2).contiguous(), "tokens": t["b"].transpose(1, 2).contiguous()}


def _warp_scan(gates: Tensor, tokens: Tensor) -> Tensor:
    return _call("accelerated_scan.warp", "scan")(gates, tokens).transpose(1, 2)


def _norm(t: dict[str, Any]) -> dict[str, Any]:
    return {"x": t["x"], "weight": t["weight"], "bias": None, "z": t["gate"]}


def _mamba_norm(**t: Any) -> Tensor:
    return _call("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")(**t, eps=1e-5, norm_before_gate=False)


_ALL = {
    "causal_conv1d": {"torch conv1d": ("torch", Peer(_conv_first, _conv))},
    "delta_rule": {"fla gated delta rule": ("fla", Peer(_delta, _gated_delta))},
    "linear_attention": {"fla simple GLA": ("fla", Peer(_gla, _simple_gla))},
    "linear_scan": {"accelerated-scan warp": ("accelerated_scan", Peer(_time_last, _warp_scan))},
    "norm": {"mamba-ssm gated norm": ("mamba_ssm", Peer(_norm, _mamba_norm))},
}
PEERS: dict[str, dict[str, Peer]] = {
    op: {name: peer for name, (package, peer) in peers.items() if importlib.util.find_spec(package)}
    for op, peers in _ALL.items()
}

# Timed beside an op whose place they could take in a model; they compute something else, so nothing is compared.
YARDSTICKS: dict[str, dict[str, Peer]] = {"linear_attention": {"softmax attention": Peer(_heads_first, _softmax)}}

# What to carry to a machine without a network, and how it is built there: package, what, megabytes, how.
CARRY = (
    ("einops", "wheel", 0.07, "pip install --no-deps"),
    ("flash-linear-attention fla-core", "wheels", 1.5, "pip install --no-deps; gated backward needs a ptxas of 13.4"),
    ("accelerated-scan", "wheel", 0.01, "pip install --no-deps; compiles one file when first called"),
    (
        "causal-conv1d",
        "sdist",
        0.03,
        "CAUSAL_CONV1D_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps, "
        "with the gencode lines of setup.py cut to the GPU at hand",
    ),
    (
        "mamba-ssm",
        "sdist",
        0.22,
        "MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps, "
        "gencode lines cut likewise",
    ),
    ("flash-attn", "sdist", 8.5, "more than ten minutes of building; torch's own attention is the usual baseline"),
)


def main() -> None:
    """Print what is installed of the peers and what to bring for the others."""
    for packages, what, megabytes, how in CARRY:
        for package in packages.split():
            kind = "--only-binary :all:" if what.startswith("wheel") else "--no-binary :all:"
            print(f"{package}: {what}, {megabytes} MB\n  pip download --no-deps {kind} {package}\n  {how}")
    print("installed here: " + (", ".join(sorted(n for peers in PEERS.values() for n in peers)) or "none"))


if __name__ == "__main__":
    main()
