"""Folders that nobody should trust: each opens, or is refused in one sentence before much is built."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from families import PORTS, port, save
from rederived import REDERIVED
from test_families_loading import rewrite
from transformers import AutoModelForCausalLM

import seqlib
from seqlib.errors import CheckpointMismatch, SeqlibError
from seqlib.hf import SeqlibConfig, SeqlibForCausalLM

BAD_VALUES = [None, -1, 0, 10**7, 10**12, "x", "", [], {}, 1.5, True, float("nan"), [0] * 3]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The folder of a tiny Mamba."""
    folder = tmp_path / "mamba"
    save(port("mamba", hidden_size=32, state_size=6, num_hidden_layers=2), folder)
    return folder


def of_case(case: str, folder: Path) -> dict[str, Any]:
    """The config of a tiny checkpoint, written with its weights."""
    if case in PORTS:
        save(PORTS[case][1](), folder)
    else:
        REDERIVED[case]().save(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in ("nemotron_h", "gated_deltanet") else pytest.mark.slow)
        for case in (*PORTS, *REDERIVED)
    ],
)
def test_no_value_of_a_config_ends_in_an_error_of_others(case: str, tmp_path: Path) -> None:
    """Whatever stands in a field: the model opens, or one of our errors says why not, before much is built."""
    config = of_case(case, tmp_path)
    for name in config:
        for value in BAD_VALUES:
            rewrite(tmp_path, **config | {name: value})
            started = time.process_time()
            with contextlib.suppress(SeqlibError):
                seqlib.from_pretrained(tmp_path)
            assert time.process_time() - started < 5, (name, value)


OURS = {"d_model": 32, "n_layer": 2, "vocab_size": 97, "mixer": "mamba", "mlp": {"d_mlp": 48}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 10**7}, "n_layer"),
        ({"n_layer": 16000, "layer_pattern": ["mamba"]}, "n_layer=16,000, the weights are"),
        ({"d_model": 10**9}, "d_model=1,000,000,000"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"mlp": {"d_mlp": 10**10}}, r"mlp\.d_mlp"),
        ({"mlp": [3]}, "mlp must be an object or null"),
        ({"mixers": {"mamba": {"kind": "mamba", "expand": 10**9}}}, r"mixers\.mamba\.expand"),
        ({"mixers": {"mamba": {"kind": "mamba", "d_state": None}}}, "d_state must be an integer, got None"),
        ({"mixers": {"mamba": {"kind": "mamba", "d_stat": 4}}}, "did you mean d_state"),
        ({"mixers": {"mamba": None}}, "a mixer is a dict"),
        ({"layer_pattern": ["mamba*1000000000000"]}, "do not tile"),
    ],
)
def test_a_config_of_ours_is_held_against_the_weights_before_anything_is_built(
    tmp_path: Path, changes: dict, message: str
) -> None:
    SeqlibForCausalLM(SeqlibConfig(**OURS)).save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    for load in (seqlib.from_pretrained, SeqlibForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        started = time.process_time()
        with pytest.raises(SeqlibError, match=message):
            load(tmp_path)
        assert time.process_time() - started < 5


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\x00\x01", b"[1, 2]", b"{", b"null"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_are_no_json_objects_are_refused_by_name(tmp_path: Path, name: str, text: bytes) -> None:
    SeqlibForCausalLM(SeqlibConfig(**OURS)).save_pretrained(tmp_path)
    if name != "config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(text)
    for load in (seqlib.from_pretrained, SeqlibForCausalLM.from_pretrained):
        with pytest.raises(CheckpointMismatch, match=rf"{name}.* (is not JSON|is nested too|must hold a JSON)"):
            load(tmp_path)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a/../../b.bin", "..\\b.bin", "", 3, None])
def test_an_index_does_not_point_outside_its_folder(copy: Path, place: Any) -> None:
    (copy / "model.safetensors").rename(copy.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"backbone.embeddings.weight": place}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointMismatch, match="no file beside it|must have a weight_map"):
        seqlib.from_pretrained(copy)


def test_weights_that_are_no_tensors_by_name_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    for held in ([torch.ones(2)], {"a": 3}, torch.ones(2)):
        torch.save(held, copy / "pytorch_model.bin")
        with pytest.raises(CheckpointMismatch, match="must hold tensors by name"):
            seqlib.from_pretrained(copy)
