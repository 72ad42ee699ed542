"""Products of 16-bit matrices on CPUs that multiply none: by way of float32, panel by panel of the weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqlib import cpu
from seqlib.layers.linear import Linear
from seqlib.ops.linear import torch_impl
from seqlib.ops.linear.torch_impl import product


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A CPU without 16-bit products; the rows of every product that was widened."""
    rows: list[int] = []
    widened = torch_impl._widened

    def counted(x, weight, bias):
        rows.append(x.shape[0] if x.dim() > 1 else 1)
        return widened(x, weight, bias)

    monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)
    monkeypatch.setattr(torch_impl, "_widened", counted)
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "d_out", "panel"),
    [
        ((5, 7), 3, 2**20),
        ((2, 9, 24), 50, 24 * 16),
        ((24,), 33, 100),
        ((0, 8), 4, 2**20),
        ((3, 8), 0, 8),
        ((3, 0), 4, 8),
    ],
)
def test_widened_products_round_once(shape, d_out, panel, bias, dtype, without, monkeypatch) -> None:
    monkeypatch.setattr(torch_impl, "PANEL", panel)
    x = torch.randn(shape).to(dtype)
    weight, added = torch.randn(d_out, shape[-1]).to(dtype), torch.randn(d_out).to(dtype) if bias else None
    got = product(x, weight, added)
    want = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert len(without) == 1 and got.dtype == dtype and got.shape == want.shape
    # Half a unit in the last place for rounding, and as much for the order of the sums in float32.
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_who_sees_gradients_or_transforms_gets_torchs_product(without) -> None:
    layer = Linear(8, 4).bfloat16()
    x = torch.randn(20, 8).bfloat16()
    layer(x).sum().backward()
    assert layer.weight.grad is not None and not without
    with torch.no_grad():
        got = layer(x)
        assert without == [20]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        torch.func.vmap(layer)(x[:, None].expand(20, 9, 8))
        torch.compile(lambda t: F.relu(layer(t)), backend="eager", fullgraph=True)(x)
        layer(x[:8])  # few rows: read as they are stored
    assert without == [20]
    torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias), rtol=2e-2, atol=2e-2)


def test_float32_and_cpus_that_multiply_are_left_alone(without, monkeypatch) -> None:
    with torch.no_grad():
        Linear(8, 4)(torch.randn(20, 8))
        monkeypatch.setattr(cpu, "multiplies", lambda dtype: True)
        Linear(8, 4).bfloat16()(torch.randn(20, 8).bfloat16())
    assert not without


@pytest.mark.parametrize(
    ("features", "most", "bfloat16", "float16"),
    [
        ({"avx2", "fma", "f16c"}, None, False, False),
        ({"avx512f", "avx512bw"}, None, False, False),
        ({"avx512f", "avx512_bf16"}, None, True, False),
        ({"avx512_bf16", "avx512_fp16", "amx_bf16"}, None, True, True),
        ({"avx512_bf16", "avx512_fp16"}, "AVX2", False, False),
        ({"avx512_bf16", "avx512_fp16"}, "avx512_core_bf16", True, False),
        ({"avx512_bf16", "avx512_fp16"}, "DEFAULT", True, True),
        ({"asimd", "bf16", "asimdhp"}, None, True, True),
        (None, None, True, True),
    ],
)
def test_what_a_cpu_multiplies(features, most, bfloat16, float16, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "features", lambda: None if features is None else frozenset(features))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if most:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    asked = cpu.multiplies.__wrapped__
    assert (asked(torch.bfloat16), asked(torch.float16)) == (bfloat16, float16)
