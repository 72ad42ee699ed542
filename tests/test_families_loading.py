"""What `from_pretrained` and `export` accept, and what they refuse by name."""

from __future__ import annotations

import json
import pickle
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from families import PORTS, port, save, uncached
from hub_emulator import serving
from rederived import Original
from safetensors.torch import load_file, save_file
from test_families import same, weights
from test_hub import client
from transformers import AutoConfig, AutoModelForCausalLM

import seqlib
from seqlib.errors import CheckpointMismatch, ConfigError
from seqlib.hf import SeqlibConfig, SeqlibForCausalLM, SeqlibForSequenceClassification
from seqlib.hf.families import recognise
from seqlib.hf.files import WeightFiles

TINY = {"hidden_size": 32, "state_size": 6, "num_hidden_layers": 2}
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mamba(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mamba")
    save(port("mamba", **TINY), folder)
    return folder


@pytest.fixture
def copy(mamba: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mamba, tmp_path / "copy"))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def rewrite(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_shards_and_old_files_hold_the_same_model(mamba: Path, tmp_path: Path) -> None:
    want = logits(seqlib.from_pretrained(mamba))
    reference = AutoModelForCausalLM.from_pretrained(mamba)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(seqlib.from_pretrained(tmp_path / "shards")), want)
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(mamba / "config.json", old)
    parts = list(load_file(mamba / "model.safetensors").items())
    for i, part in enumerate((parts[:7], parts[7:])):
        torch.save(dict(part), old / f"pytorch_model-{i}.bin")
    index = {name: f"pytorch_model-{i}.bin" for i, part in enumerate((parts[:7], parts[7:])) for name, _ in part}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(logits(seqlib.from_pretrained(old)), want)
    (old / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointMismatch, match=r"index names pytorch_model-1\.bin"):
        seqlib.from_pretrained(old)


def test_legacy_torch_files_are_read(copy: Path) -> None:
    """Files of torch before 1.6 are no archives and cannot be mapped into memory."""
    want = logits(seqlib.from_pretrained(copy))
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (copy / "model.safetensors").unlink()
    assert torch.equal(logits(seqlib.from_pretrained(copy)), want)


class Harm:
    def __reduce__(self):
        return (open, ("harm.txt", "w"))


def test_a_pickle_is_not_run(copy: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"backbone.embeddings.weight": Harm()}))
    with pytest.raises(CheckpointMismatch, match="more than tensors|cannot be read as tensors"):
        seqlib.from_pretrained(copy)
    torch.save({"backbone.embeddings.weight": Harm()}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointMismatch, match="more than tensors"):
        seqlib.from_pretrained(copy)
    assert not (tmp_path / "harm.txt").exists()


def test_damaged_and_absent_weights_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointMismatch, match="damaged"):
        seqlib.from_pretrained(copy)
    file.unlink()
    with pytest.raises(CheckpointMismatch, match=r"no weights; looked for model\.safetensors"):
        seqlib.from_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointMismatch, match=r"neither config\.json nor params\.json"):
        seqlib.from_pretrained(copy)


def test_weights_that_do_not_fit_are_refused_by_name(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = load_file(file)
    spoiled = dict(whole)
    spoiled["backbone.layers.1.mixer.x_proj.weight"] = whole["backbone.layers.1.mixer.x_proj.weight"][1:].clone()
    spoiled["backbone.layers.0.mixer.B"] = spoiled.pop("backbone.layers.0.mixer.D")
    save_file(spoiled, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch) as error:
        seqlib.from_pretrained(copy)
    for told in (
        "missing: backbone.layers.0.mixer.D",
        "not part of the model: backbone.layers.0.mixer.B",
        "of another shape: backbone.layers.1.mixer.x_proj.weight (13, 64) for (14, 64)",
    ):
        assert told in str(error.value)
    whole["backbone.layers.0.mixer.D"][3] = float("nan")
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match="NaN or infinity"):
        seqlib.from_pretrained(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "no layout known here .model_type 'llama'.; known: mamba-hf"),
        ({"sliding_gate": 3}, r"no field sliding_gate.*pass ignore=\('sliding_gate',\)"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' \(supported: 'silu', 'swish'\)"),
        ({"num_hidden_layers": 3}, r"missing: backbone\.layers\.2\."),
        ({"model_type": "falcon_mamba", "state_size": 5}, "of another shape"),
    ],
)
def test_configs_that_mean_something_else_are_refused(copy: Path, changes: dict, message: str) -> None:
    rewrite(copy, **changes)
    with pytest.raises(CheckpointMismatch, match=message):
        seqlib.from_pretrained(copy)


def test_a_field_known_to_change_nothing_is_passed_over(copy: Path) -> None:
    want = logits(seqlib.from_pretrained(copy))
    rewrite(copy, sliding_gate=3)
    assert torch.equal(logits(seqlib.from_pretrained(copy, ignore=("sliding_gate",))), want)


@pytest.mark.parametrize(
    ("ssm", "message"),
    [
        ({"layer": "Mamba2", "d_ssm": 32}, "ssm_cfg has d_ssm=32"),
        ({"layer": "Mamba3"}, "layer='Mamba3'; known: Mamba1, Mamba2"),
        ({"layer": "Mamba1", "headdim": 4}, "ssm_cfg has headdim=4"),
    ],
)
def test_unknown_overrides_of_the_originals_are_refused(tmp_path: Path, ssm: dict, message: str) -> None:
    Original().save(tmp_path)
    rewrite(tmp_path, ssm_cfg=ssm)
    with pytest.raises(CheckpointMismatch, match=message):
        seqlib.from_pretrained(tmp_path)


def test_unknown_keywords_are_refused(mamba: Path) -> None:
    with pytest.raises(ConfigError, match="no keyword 'd_state' for a mamba-hf checkpoint; allowed are revision"):
        seqlib.from_pretrained(mamba, d_state=3)
    with pytest.raises(ConfigError, match="match must be"):
        seqlib.from_pretrained(mamba, match="both")
    with pytest.raises(ConfigError, match="dtype must be a floating-point type"):
        seqlib.from_pretrained(mamba, dtype="int8")
    assert seqlib.from_pretrained(mamba, use_cache=False).config.use_cache is False


def test_tensors_are_read_one_at_a_time(mamba: Path, monkeypatch) -> None:
    """While the model is filled, no more of the file is held than one tensor of it."""
    alive: list[weakref.ref] = []
    most = 0
    read = WeightFiles.read

    def watched(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(WeightFiles, "read", watched)
    seqlib.from_pretrained(mamba)
    assert len(alive) > 20 and most <= 2


def test_sixteen_bits_come_and_go_and_decays_stay_wide(copy: Path, tmp_path: Path) -> None:
    stored = {
        n: w if n.endswith(("A_log", "D")) else w.bfloat16() for n, w in load_file(copy / "model.safetensors").items()
    }
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    rewrite(copy, dtype="bfloat16")
    model = seqlib.from_pretrained(copy)
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters() if "mixer" in name}
    assert {dtypes[name] for name in ("A_log", "D", "dt_bias")} == {torch.float32}
    assert model.dtype == model.model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    seqlib.export(model, "mamba-hf", tmp_path / "out")
    written = weights(tmp_path / "out")
    assert written.keys() == stored.keys()
    assert all(torch.equal(w, written[n]) and w.dtype == written[n].dtype for n, w in stored.items())
    assert seqlib.from_pretrained(copy, dtype="float32").dtype == torch.float32


def test_devices_and_subfolders(mamba: Path, tmp_path: Path) -> None:
    want = logits(seqlib.from_pretrained(mamba))
    shutil.copytree(mamba, tmp_path / "deep" / "down")
    for options in ({"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}):
        assert torch.equal(logits(seqlib.from_pretrained(tmp_path, subfolder="deep/down", **options)), want)
    parts = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.backbone": "cpu"}
    assert torch.equal(logits(seqlib.from_pretrained(mamba, device_map=parts)), want)
    with pytest.raises(ConfigError, match="on disk"):
        seqlib.from_pretrained(mamba, device_map=parts | {"model.backbone": "disk"})


def test_by_name_from_a_hub(mamba: Path, tmp_path: Path) -> None:
    """Revisions, tokens, cache folders and the network's absence mean what they mean in transformers."""
    with serving() as hub:
        hub.add("them/mamba", mamba)
        other = Path(shutil.copytree(mamba, tmp_path / "other"))
        rewrite(other, eos_token_id=7)
        hub.add("them/mamba", other, "later")
        hub.repos["them/mamba"].token = "hf_let_me_in"
        cache = tmp_path / "cache"
        lines = client(
            hub,
            tmp_path / "home",
            f"""
            options = dict(token="hf_let_me_in", cache_dir={str(cache)!r})
            print(seqlib.from_pretrained("them/mamba", **options).config.eos_token_id)
            print(seqlib.from_pretrained("them/mamba", revision="later", **options).config.eos_token_id)
            print(seqlib.from_pretrained("them/mamba", local_files_only=True, **options).config.eos_token_id)
            for name, more in (("them/nothing", {{}}), ("them/mamba", {{"token": False, "cache_dir": None}})):
                try:
                    seqlib.from_pretrained(name, **(options | more))
                except Exception as error:
                    print(type(error).__name__)
            """,
        )
    assert lines == ["2", "7", "2", "RepositoryNotFoundError", "RepositoryNotFoundError"]
    assert cache.is_dir()


def test_a_head_of_its_own_unties(copy: Path) -> None:
    file = copy / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored["backbone.embeddings.weight"].clone()
    save_file(stored, file, metadata={"format": "pt"})
    tied = seqlib.from_pretrained(copy)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    stored["lm_head.weight"][0, 0] += 1
    save_file(stored, file, metadata={"format": "pt"})
    untied = seqlib.from_pretrained(copy)
    assert not untied.config.tie_word_embeddings and torch.equal(untied.lm_head.weight, stored["lm_head.weight"])
    assert not torch.equal(logits(untied), logits(tied))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_our_own_models_travel(kind: str, tmp_path: Path) -> None:
    """A model made here is written in transformers' layout and in the original one, and both open again."""
    torch.manual_seed(0)
    mixer = {"kind": kind, "d_state": 6} | ({"headdim": 8, "ngroups": 2} if kind == "mamba2" else {"dt_rank": 3})
    model = SeqlibForCausalLM(SeqlibConfig(d_model=32, n_layer=2, vocab_size=97, mixer=mixer, eos_token_id=2)).eval()
    want = logits(model)
    seqlib.export(model, f"{kind}-hf", tmp_path / "hf")
    same(uncached(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), IDS), want)
    seqlib.export(model, "state-spaces", tmp_path / "original")
    for folder in ("hf", "original"):
        assert torch.equal(logits(seqlib.from_pretrained(tmp_path / folder)), want)
    with pytest.raises(CheckpointMismatch, match="'jamba' can only be written for models that were opened from it"):
        seqlib.export(model, "jamba", tmp_path / "jamba")
    with pytest.raises(CheckpointMismatch, match="unknown layout 'gguf'; known: mamba-hf"):
        seqlib.export(model, "gguf", tmp_path / "gguf")
    with pytest.raises(CheckpointMismatch, match="layout has mamba2? in every layer"):
        seqlib.export(model, "mamba2-hf" if kind == "mamba" else "mamba-hf", tmp_path / "wrong")


def test_what_a_layout_cannot_express_is_refused(mamba: Path, tmp_path: Path) -> None:
    model = seqlib.from_pretrained(mamba)
    model.resize_token_embeddings(101)
    with pytest.raises(CheckpointMismatch, match="cannot express this model's vocab_size"):
        seqlib.export(model, "mamba-hf", tmp_path / "out")
    with pytest.raises(CheckpointMismatch, match="layer 0: norm"):
        odd = SeqlibConfig(d_model=16, n_layer=1, vocab_size=9, mixer={"kind": "mamba2", "norm": False, "headdim": 8})
        seqlib.export(SeqlibForCausalLM(odd), "mamba2-hf", tmp_path / "odd")


def test_codestral(tmp_path: Path) -> None:
    """params.json and one file whose names begin with "model.": the same network as mamba2 in transformers."""
    # The layout has no fields for the width of heads and states, which are 64 and 128.
    shape = {"num_heads": 2, "head_dim": 64, "n_groups": 2, "state_size": 128}
    reference = port("mamba2", hidden_size=64, num_hidden_layers=2, tie_word_embeddings=False, chunk_size=16, **shape)
    stored = {f"model.{n}".replace("embeddings", "embedding"): w.clone() for n, w in reference.state_dict().items()}
    save_file(stored, tmp_path / "consolidated.safetensors", metadata={"format": "pt"})
    params = {"dim": 64, "n_layers": 2, "vocab_size": 97, "n_groups": 2, "tie_embeddings": False}
    (tmp_path / "params.json").write_text(json.dumps(params | {"residual_in_fp32": True, "pad_vocab_size_multiple": 1}))
    model = seqlib.from_pretrained(tmp_path)
    same(logits(model), uncached(reference, IDS))
    seqlib.export(model, "codestral", tmp_path / "out")
    again = load_file(tmp_path / "out" / "consolidated.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(w, again[n]) for n, w in stored.items())
    assert torch.equal(logits(seqlib.from_pretrained(tmp_path / "out")), logits(model))


def test_xlstm_with_joined_weights(tmp_path: Path) -> None:
    """`weight_mode` "fused", which transformers cannot initialise, is the same model with rows end to end."""
    save(PORTS["xlstm"][1](), tmp_path)
    want, stored = logits(seqlib.from_pretrained(tmp_path)), load_file(tmp_path / "model.safetensors")
    joined = {
        "qkv_opreact.weight": ("q", "k", "v", "ogate_preact"),
        "ifgate_preact.weight": ("igate_preact", "fgate_preact"),
    }
    for i in range(3):
        block = f"backbone.blocks.{i}."
        for name, parts in joined.items():
            rows = [stored.pop(f"{block}mlstm_layer.{part}.weight") for part in parts]
            stored[f"{block}mlstm_layer.{name}"] = torch.cat(rows)
        biases = [stored.pop(f"{block}mlstm_layer.{part}_preact.bias") for part in ("igate", "fgate")]
        stored[f"{block}mlstm_layer.ifgate_preact.bias"] = torch.cat(biases)
        mlp = [stored.pop(f"{block}ffn.{part}.weight") for part in ("proj_up_gate", "proj_up")]
        stored[f"{block}ffn.proj_up_gate_z.weight"] = torch.cat(mlp)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rewrite(tmp_path, weight_mode="fused")
    assert torch.equal(logits(seqlib.from_pretrained(tmp_path)), want)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {
                **{"model_type": "minimax_text_01", "attn_type_list": [0, 1], "num_hidden_layers": 2, "rotary_dim": 8},
                **{"layernorm_linear_attention_alpha": 3.5, "layernorm_full_attention_beta": 0.5, "postnorm": True},
                **{"head_dim": 16, "rope_theta": 1e7, "layernorm_mlp_alpha": 3.0},
            },
            {
                **{"model_type": "minimax", "layer_types": ["linear_attention", "full_attention"], "head_dim": 16},
                **{"num_hidden_layers": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7}},
                **{
                    "linear_attn_alpha_factor": 3.5,
                    "full_attn_beta_factor": 0.5,
                    "mlp_alpha_factor": 3.0,
                    "rotary_dim": 8,
                },
            },
        ),
        (
            {"model_type": "zamba2", "hidden_size": 64, "mamba_headdim": 16, "lora_rank": 7, "num_mem_blocks": 2},
            {"model_type": "zamba2", "hidden_size": 64, "n_mamba_heads": 8, "adapter_rank": 7, "num_mem_blocks": 2},
        ),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*E", "mamba_d_conv": 3, "mamba_n_groups": 4},
            {
                **{"model_type": "nemotron_h", "conv_kernel": 3, "n_groups": 4},
                "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
            },
        ),
    ],
)
def test_older_names_of_fields_mean_the_same(old: dict, new: dict) -> None:
    made = []
    for values in (old, new):
        family, full = recognise("test", values)
        made.append(SeqlibConfig(**family.config(full, "authors")))
    assert made[0].backbone == made[1].backbone
    if old["model_type"].startswith("minimax"):
        assert made[0].backbone.mixers["a"].rotary_fraction == 0.5


def test_infinities_survive_our_own_config(tmp_path: Path) -> None:
    """The limit of dt that came from the layout goes through a checkpoint of ours and back."""
    save(PORTS["mamba2"][1](), tmp_path / "theirs")
    seqlib.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    seqlib.export(seqlib.from_pretrained(tmp_path / "ours"), "mamba2-hf", tmp_path / "back")
    limits = [AutoConfig.from_pretrained(tmp_path / name).time_step_limit for name in ("theirs", "back")]
    assert [tuple(limit) for limit in limits] == [(0.0, float("inf"))] * 2


def test_checkpoints_of_ours_open_as_what_they_were(mamba: Path, tmp_path: Path) -> None:
    model = seqlib.from_pretrained(mamba)
    model.save_pretrained(tmp_path / "lm")
    again = seqlib.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    assert type(again) is SeqlibForCausalLM and torch.equal(logits(again), logits(model))
    seqlib.export(again, "mamba-hf", tmp_path / "back")
    before, after = weights(mamba), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(w, after[n]) for n, w in before.items())
    SeqlibForSequenceClassification(model.config).save_pretrained(tmp_path / "classifier")
    assert type(seqlib.from_pretrained(tmp_path / "classifier")) is SeqlibForSequenceClassification


def test_authors_and_port_differ_where_they_do(tmp_path: Path) -> None:
    """The window of RecurrentGemma holds one key more for its authors: only beyond it do the logits part."""
    save(PORTS["recurrent_gemma"][1](), tmp_path)
    theirs, ports = (seqlib.from_pretrained(tmp_path, match=match) for match in ("authors", "transformers"))
    a, b = logits(theirs), logits(ports)
    window = ports.config.backbone.mixers["a"].window
    assert torch.equal(a[:, :window], b[:, :window]) and not torch.allclose(a[:, window], b[:, window], atol=1e-4)


@pytest.mark.parametrize("case", ["nemotron_h", "zamba2"])
@torch.no_grad()
def test_the_floor_of_dt_is_not_the_authors(case: str, tmp_path: Path) -> None:
    """The port without its floor equals what opens by default here; with it, what opens to match it."""
    reference = PORTS[case][1]()
    for name, weight in reference.named_parameters():
        if name.endswith("dt_bias"):
            weight.fill_(-9.0)
        if name.endswith("A_log"):
            weight.fill_(6.0)
    save(reference, tmp_path)
    floored = uncached(reference, IDS)
    same(logits(seqlib.from_pretrained(tmp_path, match="transformers")), floored)
    for module in reference.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    free = uncached(reference, IDS)
    same(logits(seqlib.from_pretrained(tmp_path)), free)
    assert (free - floored).abs().max() > 1e-4 * free.abs().max()
