"""Seeds, threads and poisoned memory for every test."""

from __future__ import annotations

import os

import pytest
import torch

from seqlib import native

os.environ.setdefault("SEQLIB_ISA", "all")  # one library for the tests that switch between instruction sets

with torch.device("meta"):  # remembers which functions make tensors, which must be those from before the poison
    torch.empty(0)


def pytest_report_header() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device: tests marked gpu are left out"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are no news: left out, and counted as deselected."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh float memory holds NaN, so an output that is not written cannot pass."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(make):
        def fill(*args, **kwargs):
            made = make(*args, **kwargs)
            floating = made.is_floating_point() or made.is_complex()
            if floating and made.device.type != "meta":
                made.detach().fill_(float("nan"))
            return made

        return fill

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))


@pytest.fixture
def isa(request):
    """Run the native kernels in one instruction set."""
    wanted = request.param
    if wanted is None:
        yield
        return
    reason = native.why_unavailable("cpu")
    if reason:
        pytest.skip(f"no native library: {reason}")
    before = torch.ops.seqlib.isa(None)
    try:
        torch.ops.seqlib.isa(wanted)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield
    torch.ops.seqlib.isa(before)
