"""To the Hub and back, against an emulated Hub on the loopback interface."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hf_models import prompt, tiny
from hub_emulator import Hub, Repo, serving

from seqlib.hf import Card, SeqlibForCausalLM

START = """
import sys, torch, seqlib, seqlib.hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

def attempt(name, **options):
    try:
        AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:
        print(type(error).__name__ + ": " + " ".join(str(error).split()))
    else:
        print("loaded")
"""


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture
def saved(tmp_path: Path) -> tuple[SeqlibForCausalLM, Path]:
    model = tiny("hybrid")
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def client(hub: Hub, home: Path, code: str, **environment: str) -> list[str]:
    """Lines printed by a process that knows no other Hub; its settings are read when it imports huggingface_hub."""
    known = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "no_proxy": "127.0.0.1",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(code)],
        env=inherited | known | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_pushed_comes_back_by_name_and_revision(hub: Hub, saved, tmp_path: Path) -> None:
    model, folder = saved
    hub.repos["me/described"] = Repo()
    hub.repos["me/described"].commit({"README.md": b"---\nlicense: mit\n---\n\nMine.\n"})
    (ids,) = prompt(7)
    lines = client(
        hub,
        tmp_path / "home",
        f"""
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
        model.push_to_hub("me/described")
        model.card = seqlib.hf.Card(license="apache-2.0", figures={{"bits per byte": 1.25}})
        first = model.push_to_hub("me/tiny")
        model.lm_head.weight.data.mul_(2)
        model.push_to_hub("me/tiny")
        model.push_to_hub("me/sharded", max_shard_size="4KB")
        ids = torch.tensor({ids.tolist()})
        for name, revision in (("me/tiny", first.oid), ("me/tiny", "main"), ("me/sharded", "main")):
            back = AutoModelForCausalLM.from_pretrained(name, revision=revision)
            print(back(ids).logits.double().norm().item())
        base = AutoModel.from_pretrained("me/tiny")
        print(type(base).__name__, AutoConfig.from_pretrained("me/tiny").layer_pattern)
        """,
        HF_TOKEN="hf_x",
    )
    with torch.no_grad():
        once = model(ids).logits.double().norm().item()
        model.lm_head.weight.mul_(2)
        twice = model(ids).logits.double().norm().item()
    assert [float(line) for line in lines[:3]] == pytest.approx([once, twice, twice], rel=1e-6)
    assert lines[3] == "SeqlibModel ['m', 'm', 'a']"
    assert sum(name.endswith(".safetensors") for name in hub.files("me/sharded")) > 2
    card = hub.files("me/tiny")["README.md"].decode()
    assert "license: apache-2.0" in card and "2 x m, 1 x a" in card and "| bits per byte | 1.25 |" in card
    assert b"Mine." in hub.files("me/described")["README.md"]  # nobody gave another


def test_an_interrupted_download_goes_on_where_it_broke_and_is_kept(hub: Hub, tmp_path: Path) -> None:
    tiny("mamba", vocab_size=200_000).save_pretrained(tmp_path / "large")
    hub.add("me/large", tmp_path / "large")
    hub.cut["model.safetensors"] = 12_000_000
    tries = "attempt('me/large'); attempt('me/large'); attempt('me/large', local_files_only=True)"
    assert client(hub, tmp_path / "home", tries) == ["loaded"] * 3
    asked = [begin for method, path, begin in hub.log if method == "GET" and path.endswith("model.safetensors")]
    assert asked == [None, "bytes=10485760-"]  # huggingface_hub writes pieces of 10 MB


def test_what_is_not_there_or_not_whole_is_named(hub: Hub, saved, tmp_path: Path) -> None:
    _, folder = saved
    hub.add("me/tiny", folder)
    hub.add("me/private", folder)
    hub.repos["me/private"].token = "hf_owner"
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-50])
    hub.add("me/truncated", folder)
    (folder / "model.safetensors").unlink()
    hub.add("me/empty", folder)
    lines = client(
        hub,
        tmp_path / "home",
        """
        attempt("me/nothing")
        attempt("me/tiny", revision="v9")
        attempt("me/private")
        attempt("me/private", token="hf_stranger")
        attempt("me/private", token="hf_owner")
        attempt("me/truncated")
        attempt("me/empty")
        """,
    )
    nothing, revision, private, stranger, owner, truncated, empty = lines
    assert nothing.startswith("OSError: me/nothing is not a local folder and is not a valid model identifier")
    assert revision.startswith("OSError: v9 is not a valid git identifier")
    assert private.startswith("OSError: me/private is not a local folder") and "token" in private
    assert stranger.startswith("OSError: You are trying to access a gated repo")
    assert owner == "loaded"
    assert truncated.startswith("CheckpointMismatch: me/truncated: model.safetensors is damaged")
    assert empty.startswith("CheckpointMismatch: me/empty has no weights; looked for model.safetensors")


def test_saving_writes_a_card_and_keeps_one_that_is_there(tmp_path: Path) -> None:
    model = tiny("hybrid")
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    assert "library_name: transformers" in first and "license" not in first and "2 x m, 1 x a" in first
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    model.card = Card(license="mit", figures={"loss": 2.5}, text="A toy.")
    model.save_pretrained(tmp_path)
    written = (tmp_path / "README.md").read_text()
    assert "license: mit" in written and "| loss | 2.5 |" in written and "A toy." in written
