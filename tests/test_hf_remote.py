"""Checkpoints with their own code open where seqlib is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import prompt, tiny
from hub_emulator import serving
from test_mixers import VARIANTS

import seqlib
from seqlib.errors import UnsupportedInput
from seqlib.hf import SeqlibConfig, SeqlibForCausalLM
from seqlib.mixers import MIXERS, looks_ahead

OPEN = """
import importlib.abc, sys, torch, warnings

class WithoutSeqlib(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "seqlib":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutSeqlib())
warnings.simplefilter("ignore")
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

name, again, told = sys.argv[1:]
ids, expected, said = torch.load(told)
for place in (name, again):
    try:
        AutoModelForCausalLM.from_pretrained(place)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise AssertionError("opened without consent")
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0), said)
    model.save_pretrained(again)
tagger = AutoModelForTokenClassification.from_pretrained(name, trust_remote_code=True, num_labels=3)
assert tagger(ids).logits.shape == (*ids.shape, 3)
judge = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True, num_labels=3)
assert judge(ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 3)
"""


def open_elsewhere(name: str, model: SeqlibForCausalLM, folder: Path, **environment: str) -> None:
    (ids,) = prompt(9)
    said = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        torch.save((ids, model(ids).logits, said), folder / "told.pt")
    arguments = [sys.executable, "-c", OPEN, name, str(folder / "again"), str(folder / "told.pt")]
    known = {"HF_HOME": str(folder / "home"), "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        arguments, env=os.environ | known | environment, input="n\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_opens_by_name_on_a_machine_without_seqlib(tmp_path: Path) -> None:
    model = tiny("hybrid", mlp={"d_mlp": 24})
    files = seqlib.export_remote_code(model, tmp_path / "export")
    assert "seqlib_mixers_mamba.py" in files and "seqlib_mixers_gla.py" not in files
    with serving() as hub:
        hub.add("me/tiny", tmp_path / "export")
        open_elsewhere("me/tiny", model, tmp_path, HF_ENDPOINT=hub.url)


def test_every_mixer_that_decodes_travels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    every = {kind: {"kind": kind, **VARIANTS[kind][0]} for kind in MIXERS}
    mixers = {kind: config for kind, config in every.items() if not looks_ahead(config)}
    config = SeqlibConfig(d_model=32, n_layer=len(mixers), vocab_size=64, mixers=mixers, layer_pattern=list(mixers))
    model = SeqlibForCausalLM(config).eval()
    seqlib.export_remote_code(model, tmp_path / "export")
    open_elsewhere(str(tmp_path / "export"), model, tmp_path)


def test_only_models_of_ours_are_exported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match="takes a model of seqlib.hf, got Linear"):
        seqlib.export_remote_code(torch.nn.Linear(2, 2), tmp_path)


def test_a_mixer_from_elsewhere_does_not_travel_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(MIXERS["gated_conv"]):
        pass

    monkeypatch.setitem(MIXERS, "own", Own)
    model = tiny("mamba")
    model.config.mixers = {"m": {"kind": "own"}}
    with pytest.raises(UnsupportedInput, match="mixer own lies outside seqlib"):
        seqlib.export_remote_code(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
