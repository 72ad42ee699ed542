"""torch.export with open batch and length, and ONNX of plain torch operations: the mixers that can are held to it."""

from __future__ import annotations

import pytest
import torch
from test_mixers import VARIANTS
from torch import Tensor, nn
from torch.export import Dim

from seqlib import use_backend
from seqlib.hf import SeqlibConfig, SeqlibModel

BOTH = ("attention", "sliding_attention", "conv_attention", "channel", "mamba", "mamba2", "s4d", "gla", "deltanet")
"""With and without a mask. Other mixers export some of their forms; their loops over blocks fix the length."""
PLAIN = ("lru", "s5", "dss", "sgconv")
"""Without a mask."""


class Hidden(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        mixers = {"m": {"kind": kind, **VARIANTS[kind][0]}}
        self.model = SeqlibModel(SeqlibConfig(d_model=32, n_layer=1, vocab_size=50, layer_pattern="m", mixers=mixers))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False).last_hidden_state


def rows(batch: int, seqlen: int, masked: bool) -> tuple[Tensor, ...]:
    ids = torch.randint(0, 50, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))
    if not masked:
        return (ids,)
    mask = torch.ones_like(ids)
    mask[0, :2], mask[-1, -1:] = 0, 0
    return ids, mask


def exported(model: nn.Module, masked: bool) -> torch.export.ExportedProgram:
    given = rows(3, 11, masked)
    open_sizes = {0: Dim("batch", min=1, max=64), 1: Dim("seqlen", min=3, max=16)}
    return torch.export.export(model, given, dynamic_shapes=tuple([open_sizes] * len(given)), strict=False)


@pytest.mark.parametrize(
    ("kind", "masked"), [*((k, m) for k in BOTH for m in (False, True)), *((k, False) for k in PLAIN)]
)
@torch.no_grad()
def test_one_program_serves_every_batch_and_length(kind: str, masked: bool) -> None:
    model = Hidden(kind).eval()
    program = exported(model, masked).module()
    for shape in ((1, 5), (2, 7), (4, 16)):
        given = rows(*shape, masked)
        torch.testing.assert_close(program(*given), model(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BOTH)
@torch.no_grad()
def test_a_masked_program_of_one_size(kind: str) -> None:
    model, given = Hidden(kind).eval(), rows(2, 9, True)
    program = torch.export.export(model, given, strict=False).module()
    torch.testing.assert_close(program(*given), model(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_onnx_of_torch_rows(masked: bool, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnx, onnxscript and onnxruntime are optional")
    pytest.importorskip("onnxscript", reason="onnx, onnxscript and onnxruntime are optional")
    model, path = Hidden("attention").eval(), str(tmp_path / "model.onnx")
    with use_backend("torch"):
        torch.onnx.export(exported(model, masked), rows(3, 11, masked), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    for shape in ((1, 4), (2, 7)):
        given = rows(*shape, masked)
        (got,) = session.run(None, {name: t.numpy() for name, t in zip(names, given)})
        torch.testing.assert_close(torch.from_numpy(got), model(*given), rtol=1e-4, atol=1e-4)
