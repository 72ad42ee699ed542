"""Data never keeps a model waiting, and the official S4 code can be timed beside ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from seqlib.bench import markdown
from seqlib.errors import ConfigError, SeqlibError
from seqlib.lra.seeds import configure
from seqlib.lra.throughput import measure
from seqlib.lra.train import DataSource

QUIET = Console(quiet=True)
S4D = '{"kind": "s4d", "d_state": 4, "bidirectional": true}'
# A block with the face of the official one.
STAND_IN = """
import torch
from pytorch_lightning.utilities import rank_zero_only
class S4Block(torch.nn.Module):
    def __init__(self, d_model, mode, init, d_state, n_ssm, bidirectional, transposed):
        super().__init__()
        assert (mode, init, d_state, bidirectional, transposed) == ("diag", "diag-legs", 4, True, True)
        self.weight = torch.nn.Parameter(torch.ones(d_model))
    def forward(self, x, lengths):
        assert x.shape[1] == len(self.weight) and lengths.max() <= x.shape[2]
        return x * self.weight[:, None], None
"""


def test_reading_is_at_least_ten_times_as_fast_as_training(tmp_path: Path) -> None:
    recipe = configure("tiny", "listops", ["batch_size=16", "d_model=32", "n_layer=2"], S4D, None)
    (tmp_path / "models" / "s4").mkdir(parents=True)
    for name in ("s4", "s4d"):
        (tmp_path / "models" / "s4" / f"{name}.py").write_text(STAND_IN)
    found = measure(recipe, DataSource(cache=str(tmp_path / "c")), peer_s4=tmp_path, repeats=5, console=QUIET)
    assert found["data_over_model"] > 10 and found["evaluation_examples_per_s"] > 0
    assert found["timings"].keys() == {"read", "step", "peer"} and found["over_peer"] > 0
    (tmp_path / "x.json").write_text(json.dumps(found))
    assert f"{found['over_peer']:.2f} times as fast as the official code" in markdown.page(tmp_path)


def test_peer_that_is_not_there_or_does_not_fit(tmp_path: Path) -> None:
    source = DataSource(cache=str(tmp_path / "c"))
    with pytest.raises(SeqlibError, match="takes a checkout"):
        measure(configure("tiny", "listops", [], S4D, None), source, peer_s4=tmp_path, repeats=1, console=QUIET)
    with pytest.raises(ConfigError, match="s4 or s4d layers"):
        measure(configure("tiny", "listops", [], None, None), source, peer_s4=tmp_path, repeats=1, console=QUIET)
    with pytest.raises(ConfigError, match="made step by step"):
        measure(configure("tiny", "mqar", [], None, None), source, peer_s4=None, repeats=1, console=QUIET)
