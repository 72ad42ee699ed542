"""Vendor rows: our layouts in and out of other libraries' functions.

Where a library is absent, a stub with its signature computes by our reference in its layout, so that a wrong axis, cast
or option shows. Where it is installed and a GPU is at hand, tests/test_gpu.py runs the rows themselves.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import _close
from torch import Tensor

from seqlib.dispatch import resolve
from seqlib.errors import BackendUnavailable, UnsupportedInput
from seqlib.ops import attention, causal_conv1d, linear_attention, selective_scan
from seqlib.sequence import SequenceInfo


def _stub(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Callable[..., Any]) -> None:
    parts = module.split(".")
    for i in range(len(parts)):
        name = ".".join(parts[: i + 1])
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, function in functions.items():
        monkeypatch.setattr(sys.modules[module], name, function, raising=False)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.mark.parametrize("groups", [0, 2])
def test_selective_scan_of_mamba_ssm(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stub(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        assert u.shape == delta.shape == (2, 8, 12) and z.shape == u.shape
        assert B.shape == ((2, groups, 5, 12) if groups else (2, 5, 12)) and B.dtype == u.dtype
        assert all(t.dtype == torch.float32 for t in (A, D, delta_bias))
        first = [t.movedim(-1, 1) for t in (u, delta, B, C, z)]
        y, last = selective_scan(
            *first[:2],
            A,
            *first[2:4],
            D=D,
            z=first[4],
            dt_bias=delta_bias,
            dt_softplus=delta_softplus,
            backend="reference",
        )
        return (y.transpose(1, 2), last.detach()) if return_last_state else y.transpose(1, 2)

    _stub(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=stub)
    run = importlib.import_module("seqlib.ops.selective_scan.vendor_impl").chunked
    shape = (2, 12, groups, 5) if groups else (2, 12, 5)
    x, dt, z = (_draw(2, 12, 8) for _ in range(3))
    given = (x.requires_grad_(), dt, -_draw(8, 5).abs(), _draw(*shape), _draw(*shape))
    options = {"D": _draw(8), "z": z, "dt_bias": _draw(8), "dt_softplus": True}
    y, last = run(*given, **options, initial_state=None, seq=None)
    want_y, want_last = selective_scan(*given, **options, backend="reference")
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(last, want_last)
    with pytest.raises(UnsupportedInput, match="no gradient through its final state"):
        last.sum().backward()


def test_causal_conv1d_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def stub(
        x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
        activation=None,
    ):  # fmt: skip
        assert x.shape == (2, 8, 12) and x.stride(1) == 1 and initial_states.shape == (2, 8, 3)
        state = initial_states.transpose(1, 2)
        y, final = causal_conv1d(
            x.transpose(1, 2), weight, bias, activation=activation, initial_state=state, backend="reference"
        )
        return (y.transpose(1, 2), final.transpose(1, 2)) if return_final_states else y.transpose(1, 2)

    _stub(monkeypatch, "causal_conv1d", causal_conv1d_fn=stub)
    run = importlib.import_module("seqlib.ops.causal_conv1d.vendor_impl").causal_conv1d
    given = (_draw(2, 12, 8), _draw(8, 4), _draw(8))
    options: dict[str, Any] = {"activation": "silu", "initial_state": _draw(2, 3, 8)}
    for got, want in zip(run(*given, **options, seq=None), causal_conv1d(*given, **options, backend="reference")):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_linear_attention_by_ssd(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stub(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
        dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
    ):  # fmt: skip
        assert initial_states.shape == (2, 4, 6, 5) and A.shape == (4,) and dt.shape == (2, 12, 4)
        y, state = linear_attention(
            C, B, x * dt.unsqueeze(-1), A * dt, initial_state=initial_states.transpose(2, 3), backend="reference"
        )
        return y, state.transpose(2, 3)

    _stub(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=stub)
    run = importlib.import_module("seqlib.ops.linear_attention.vendor_impl").chunked
    q, k, v = _draw(2, 12, 1, 5), _draw(2, 12, 2, 5), _draw(2, 12, 4, 6)
    log_decay = {"none": None, "head": -_draw(4).abs(), "token": -_draw(2, 12, 4).abs()}[decay]
    if decay == "token":
        log_decay[0, 3] = 0.0
    options = {"scale": 0.3, "initial_state": _draw(2, 4, 5, 6)}
    got = run(q, k, v, log_decay, **options, causal=True, chunk_size=None, seq=None)
    want = linear_attention(q, k, v, log_decay, **options, backend="reference")
    for a, b in zip(got, want):
        _close(decay, a, b, torch.float32, gradient=False)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["dense", "packed", "padded"])
def test_attention_of_flash_attn(kind: str, window: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
        left, right = window_size
        assert right == (-1 if left < 0 else 0 if causal else left)
        width = None if left < 0 else left + 1
        return attention(q, k, v, causal=causal, window=width, scale=softmax_scale, backend="reference")[0]

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, **options):
        assert cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == int(cu_seqlens_q.diff().max())
        bounds = cu_seqlens_q.tolist()
        parts = [dense(*(t[None, a:b] for t in (q, k, v)), **options) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts, 1)[0]

    _stub(monkeypatch, "flash_attn", flash_attn_func=dense, flash_attn_varlen_func=varlen)
    run = importlib.import_module("seqlib.ops.attention.vendor_impl").attention
    q, k, v = _draw(2, 10, 4, 8), _draw(2, 10, 2, 8), _draw(2, 10, 2, 8)
    starts, mask = torch.zeros(2, 10, dtype=torch.bool), torch.ones(2, 10, dtype=torch.bool)
    starts[0, [0, 4]], starts[1, 7], mask[0, 8:], mask[1, :2] = True, True, False, False
    seq = {"dense": None, "packed": SequenceInfo(starts=starts), "padded": SequenceInfo(starts, mask)}[kind]
    got, state = run(q, k, v, window=window, causal=causal, scale=0.4, state=None, seq=seq)
    want, want_state = attention(q, k, v, window=window, causal=causal, scale=0.4, seq=seq, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(state.tensors(), want_state.tensors()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d", "linear_attention", "attention"])
def test_vendor_rows_run_only_by_name(name: str) -> None:
    """`auto` leaves them out, and a call by name on a CPU says why it cannot."""
    module = importlib.import_module(f"seqlib.ops.{name}")
    case = importlib.import_module(f"seqlib.ops.{name}.cases").CASES[0]
    facts = module.OP.facts(**case.inputs(torch.bfloat16))
    assert all(impl.by_name_only for impl in module.IMPLS if impl.name == "vendor")
    with pytest.raises(BackendUnavailable, match="vendor/.*device is cpu; it runs on cuda"):
        resolve(module.OP, facts, backend="vendor")


def test_a_loop_on_a_gpu_is_announced() -> None:
    """Complex A has no compiled row, so a GPU walks it step by step, and auto says that it does and why."""
    module = importlib.import_module("seqlib.ops.selective_scan")
    case = next(c for c in importlib.import_module("seqlib.ops.selective_scan.cases").CASES if c.name == "complex")
    facts = module.OP.facts(**case.inputs(torch.float32))._replace(device="cuda")
    with pytest.warns(RuntimeWarning, match="walks its 70 positions one by one on cuda.*native: .*complex A"):
        resolve(module.OP, facts)
