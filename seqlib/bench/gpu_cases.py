"""What `python -m seqlib.bench gpu` runs: the ops at the widths of published models, in bfloat16."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqlib.dispatch import Op

__all__ = ["CASES", "GpuCase"]


@dataclass(frozen=True)
class GpuCase:
    """An op at one width.

    Args:
        build: (batch, seqlen) to the arguments of the public function, on the default device.
        nbytes: (batch, seqlen) to the bytes that a forward call must read and write at least.
        flops: (batch, seqlen) to the operations of a forward call by the textbook count.
        longest: sequences that are longer are left alone, where time grows with their square; None for no limit.
    """

    name: str
    op: Op
    build: Callable[[int, int], dict[str, Any]]
    nbytes: Callable[[int, int], float]
    flops: Callable[[int, int], float]
    longest: int | None = None


def _op(name: str) -> Op:
    return importlib.import_module(f"seqlib.ops.{name}").OP


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def _scan(d: int, n: int) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        made: dict[str, Any] = {name: _draw(batch, seqlen, d) for name in ("x", "dt", "z")}
        made["dt"] = made["dt"] - 4
        made |= {"A": -torch.arange(1.0, n + 1).repeat(d, 1)}
        made |= {name: _draw(batch, seqlen, n) for name in "BC"}
        made |= {name: torch.randn(d) for name in ("D", "dt_bias")}
        return made | {"dt_softplus": True}

    return GpuCase(
        f"mamba_d{d}_n{n}",
        _op("selective_scan"),
        build,
        lambda b, s: 2.0 * b * s * (4 * d + 2 * n),
        lambda b, s: 8.0 * b * s * d * n,
    )


def _linear_scan(d: int) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        decay = torch.rand(batch, seqlen, d) ** 0.25
        return {"a": decay, "b": torch.randn(batch, seqlen, d)}

    return GpuCase(
        f"linear_scan_d{d}", _op("linear_scan"), build, lambda b, s: 12.0 * b * s * d, lambda b, s: 2.0 * b * s * d
    )


def _conv(d: int, width: int) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        weight, bias = (torch.randn(*shape) for shape in ((d, width), (d,)))
        return {"x": _draw(batch, seqlen, d), "weight": weight, "bias": bias, "activation": "silu"}

    return GpuCase(
        f"conv_d{d}",
        _op("causal_conv1d"),
        build,
        lambda b, s: 4.0 * b * s * d,
        lambda b, s: (2.0 * width + 5) * b * s * d,
    )


def _attention(name: str, heads: int, keys: int, n: int, p: int, decay: str) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        made = {k: _draw(batch, seqlen, keys, n, scale=n**-0.5) for k in "qk"} | {"v": _draw(batch, seqlen, heads, p)}
        if decay == "head":
            return made | {"log_decay": -(2.0 ** -torch.linspace(1, 8, heads))}
        if decay == "token":
            return made | {"log_decay": -torch.rand(batch, seqlen, heads) * 0.1}
        return made

    return GpuCase(
        name,
        _op("linear_attention"),
        build,
        lambda b, s: 2.0 * b * s * (2 * keys * n + 2 * heads * p),
        lambda b, s: 4.0 * b * s * heads * (32 * (n + p) + n * p),
    )


def _delta(heads: int, n: int) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        q, k, v = (_draw(batch, seqlen, heads, n) for _ in range(3))
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(k.dtype)
        made = {"q": q, "k": k, "v": v, "beta": torch.rand(batch, seqlen, heads)}
        return made | {"log_decay": -torch.rand(batch, seqlen, heads) * 0.1, "scale": n**-0.5}

    return GpuCase(
        f"gated_delta_h{heads}_n{n}",
        _op("delta_rule"),
        build,
        lambda b, s: 8.0 * b * s * heads * n,
        lambda b, s: 8.0 * b * s * heads * n * n,
    )


def _norm(d: int) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        x, gate = (_draw(batch, seqlen, d) for _ in range(2))
        return {"x": x, "weight": torch.ones(d), "gate": gate}

    return GpuCase(f"gated_norm_d{d}", _op("norm"), build, lambda b, s: 6.0 * b * s * d, lambda b, s: 10.0 * b * s * d)


def _rotary(heads: int, n: int) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        theta = 1e4 ** -torch.linspace(0, 1, n // 2)
        q, k = (_draw(batch, seqlen, heads, n) for _ in range(2))
        return {"q": q, "k": k, "theta": theta, "positions": torch.arange(seqlen).expand(batch, -1)}

    size = 2 * heads * n
    name = f"rotary_h{heads}_n{n}"
    return GpuCase(name, _op("rotate"), build, lambda b, s: 4.0 * b * s * size, lambda b, s: 3.0 * b * s * size)


def _path(heads: int, n: int) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        made = {name: _draw(batch, seqlen, heads, n) for name in "qkv"}
        w = torch.nn.functional.normalize(torch.randn(batch, seqlen, heads, n), dim=-1)
        return made | {"w": w, "beta": torch.rand(batch, seqlen, heads)}

    return GpuCase(
        f"path_h{heads}_n{n}",
        _op("path_attention"),
        build,
        lambda b, s: 12.0 * b * s * heads * n,
        lambda b, s: 4.0 * b * heads * n * s * s / 2,
        longest=8192,
    )


def _window(heads: int, n: int, window: int) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        return {name: _draw(batch, seqlen, heads, n) for name in "qkv"} | {"window": window}

    return GpuCase(
        f"window{window}_h{heads}_n{n}",
        _op("attention"),
        build,
        lambda b, s: 8.0 * b * s * heads * n,
        lambda b, s: 4.0 * b * s * heads * n * min(window, s),
    )


def _head(d: int, vocab: int) -> GpuCase:
    def build(batch: int, seqlen: int) -> dict[str, Any]:
        targets = torch.randint(0, vocab, (batch * seqlen,))
        return {"x": _draw(batch * seqlen, d), "weight": _draw(vocab, d, scale=d**-0.5), "targets": targets}

    return GpuCase(
        f"head_d{d}_v{vocab}",
        _op("linear_cross_entropy"),
        build,
        lambda b, s: 2.0 * (b * s * d + vocab * d),
        lambda b, s: 2.0 * b * s * d * vocab,
        longest=16384,
    )


CASES = (
    _scan(1536, 16),
    _linear_scan(1536),
    _conv(5376, 4),
    _attention("lightning_h16_n128", 16, 16, 128, 128, "head"),
    _attention("simple_gla_h16_n128", 16, 16, 128, 128, "token"),
    _attention("mamba2_h80_p64_n128", 80, 1, 128, 64, "token"),
    _delta(16, 128),
    _norm(5120),
    _rotary(16, 128),
    _path(16, 64),
    _window(16, 128, 2048),
    _head(1024, 32768),
)
