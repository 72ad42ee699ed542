"""Configuration, registration and loading: what is saved comes back, what does not fit is named."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hf_models import STACKS, prompt, tiny, tiny_config
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from test_mixers import VARIANTS
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from seqlib.errors import CheckpointMismatch, ConfigError
from seqlib.hf import SeqlibConfig, SeqlibForCausalLM, SeqlibForSequenceClassification, SeqlibModel
from seqlib.hf.pair import SeqlibForPairClassification
from seqlib.mixers import MIXERS, looks_ahead
from seqlib.mixers.mamba import MambaConfig

stacks = pytest.mark.parametrize("stack", STACKS)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@stacks
def test_config_round_trip_is_exact(stack: str, tmp_path) -> None:
    config = tiny_config(stack)
    config.save_pretrained(tmp_path)
    opened = AutoConfig.from_pretrained(tmp_path)
    assert type(opened) is SeqlibConfig
    assert opened.backbone == config.backbone
    assert opened.to_diff_dict() == config.to_diff_dict()
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == config.layer_types


def test_short_form_is_stored_in_full() -> None:
    short = SeqlibConfig(d_model=32, n_layer=2, mixer="mamba")
    full = SeqlibConfig(d_model=32, n_layer=2, mixers={"mamba": {"kind": "mamba"}}, layer_pattern=["mamba", "mamba"])
    typed = SeqlibConfig(d_model=32, n_layer=2, mixer=MambaConfig())
    assert short.to_dict() == full.to_dict() and short.backbone == full.backbone
    assert typed.backbone.layer_pattern == ("mixer", "mixer")
    assert typed.backbone.mixers["mixer"] == short.backbone.mixers["mamba"]
    assert SeqlibConfig().backbone.layer_pattern == ("mamba",) * 24


def test_layer_types_are_transformers_names() -> None:
    assert tiny_config("mamba").layer_types == ["linear_attention"] * 2
    assert tiny_config("attention").layer_types == ["full_attention"] * 2
    assert tiny_config("hybrid").layer_types == ["linear_attention", "linear_attention", "sliding_attention"]


def test_names_of_transformers_are_aliases() -> None:
    config = SeqlibConfig(hidden_size=48, num_hidden_layers=3)
    assert (config.d_model, config.n_layer, config.hidden_size, config.num_hidden_layers) == (48, 3, 48, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "mambo"}, "unknown mixer kind 'mambo'; known: .*mamba"),
        ({"mixer": {"kind": "mamba", "d_stat": 3}}, "mamba has no field d_stat"),
        ({"mixer": "mamba", "mixers": {}, "layer_pattern": "m"}, "not both"),
        ({"mixers": {"m": {"kind": "mamba"}}}, "need a layer_pattern"),
        ({"layer_pattern": "m"}, "mixers is not given"),
        ({"mixers": {"m": {"kind": "mamba"}}, "layer_pattern": "m x"}, "layer_pattern has 'x'"),
        ({"mixers": {"m": {"kind": "mamba"}}, "layer_pattern": "m*5"}, "do not tile n_layer=24"),
        ({"d_state": 4}, "d_state is a field of a mixer"),
        ({"vocabsize": 4}, "did you mean 'vocab_size'"),
        ({"tie_embeddings": True}, "did you mean 'tie_word_embeddings'"),
        ({"zzz": 1}, "no field 'zzz'. Its fields are d_model, n_layer, "),
        ({"n_layerz": 1}, "no field 'n_layerz'; did you mean 'n_layer'"),
        ({"from_dict": 1}, "no field 'from_dict'"),
        ({"pooling": "max"}, "pooling must be"),
        ({"mlp": {"d_mlpp": 3}}, "mlp config has no field d_mlpp"),
        ({"n_layer": 0}, "n_layer must be a positive integer"),
    ],
)
def test_what_describes_no_model_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SeqlibConfig(**fields)


def test_what_transformers_writes_into_configs_is_read_back(tmp_path) -> None:
    """Also what other versions wrote, and what quantisers and remote code leave there."""
    written = {
        "torch_dtype": "float32", "transformers_version": "4.57.0", "model_type": "seqlib", "num_labels": 3,
        "auto_map": {"AutoConfig": "a.B"}, "quantization_config": {"quant_method": "x"}, "_name_or_path": "somewhere",
        "_attn_implementation_autoset": True, "attn_implementation": "eager", "output_attentions": False,
        "use_bfloat16": False, "is_decoder": True, "pruned_heads": {}, "tie_encoder_decoder": False, "top_k": 50,
        "task_specific_params": None, "max_length": 20, "return_dict": True, "problem_type": "regression",
    }  # fmt: skip
    config = tiny_config("mamba", **written)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    for cls in (SeqlibForCausalLM, SeqlibForSequenceClassification):
        model = cls(tiny_config("mamba")).to(torch.bfloat16)
        model.set_attn_implementation("eager")
        model.save_pretrained(tmp_path)
        AutoModel.from_pretrained(tmp_path, dtype="auto").save_pretrained(tmp_path / "again")
        assert AutoConfig.from_pretrained(tmp_path / "again").backbone == model.config.backbone


@pytest.mark.parametrize(
    "cls", [SeqlibModel, SeqlibForCausalLM, SeqlibForSequenceClassification, SeqlibForPairClassification]
)
def test_from_pretrained_names_what_is_no_option(cls: type, tmp_path) -> None:
    cls(tiny_config("mamba")).save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path, norm_eps=0.5).config.norm_eps == 0.5
    with pytest.raises(ConfigError, match=f"{cls.__name__} has no option 'n_layerz'.*; did you mean 'n_layer'"):
        cls.from_pretrained(tmp_path, n_layerz=3)
    with pytest.raises(ConfigError, match=r"no option 'zzz', nor has its config a field of that name\. What a config"):
        cls(tiny_config("mamba"), zzz=3)


def test_types_are_strict() -> None:
    for wrong in ({"d_model": "64"}, {"max_position_embeddings": 2.5}, {"tie_word_embeddings": "yes"}):
        with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(wrong))):
            SeqlibConfig(**wrong)


@pytest.mark.parametrize(
    "order",
    ["import seqlib, transformers", "import transformers, seqlib", "import seqlib.hf", "from seqlib.hf import *"],
)
def test_import_seqlib_registers_in_either_order(order: str, tmp_path) -> None:
    tiny_config("mamba").save_pretrained(tmp_path)
    code = f"""
{order}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
config = AutoConfig.from_pretrained({str(tmp_path)!r})
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    print(type(auto.from_config(config)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SeqlibModel", "SeqlibForCausalLM", "SeqlibForSequenceClassification"]


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import PreTrainedModel, GenerationMixin",
        "from transformers.models.auto.modeling_auto import AutoModel",
        "from transformers import Trainer",
        "import importlib.util; importlib.util.find_spec('transformers.models.auto.configuration_auto')",
        "from seqlib.hf.configuration import SeqlibConfig",
        "from seqlib.hf.modeling import SeqlibModel",
    ],
)
def test_registration_survives_any_first_import(first: str) -> None:
    code = f"import seqlib\n{first}\nfrom transformers import AutoConfig\nprint(AutoConfig.for_model('seqlib').d_model)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "768"


def test_import_seqlib_alone_leaves_transformers_alone() -> None:
    code = (
        "import sys, seqlib; assert 'transformers' not in sys.modules; seqlib.hf; assert 'transformers' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@stacks
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_comes_back(stack: str, tied: bool, tmp_path) -> None:
    model = tiny(stack, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert same_weights(model, opened)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == tied
    assert same_weights(AutoModel.from_pretrained(tmp_path), model.model)
    (ids,) = prompt(6)
    assert torch.equal(opened(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mixer_is_built_without_memory_and_loaded(kind: str, tmp_path) -> None:
    """from_pretrained builds models on the meta device and then fills them; all variants of a kind as layers of one."""
    torch.manual_seed(0)
    mixers = {f"v{i}": {"kind": kind, **options} for i, options in enumerate(VARIANTS[kind])}
    shape = {"d_model": 32, "n_layer": len(mixers), "vocab_size": 16, "layer_pattern": list(mixers)}
    ahead = any(map(looks_ahead, mixers.values()))
    made = SeqlibForSequenceClassification if ahead else SeqlibForCausalLM
    model = made(SeqlibConfig(**shape, mixers=mixers, use_cache=False)).eval()
    model.save_pretrained(tmp_path)
    opened = made.from_pretrained(tmp_path)
    assert same_weights(opened, model)
    ids = torch.randint(16, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits)


def test_sharded_model_comes_back(tmp_path) -> None:
    model = tiny("mamba")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same_weights(SeqlibForCausalLM.from_pretrained(tmp_path), model)


def test_half_precision_keeps_the_dynamics_in_float32(tmp_path) -> None:
    tiny("mamba").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    built = AutoModelForCausalLM.from_config(tiny_config("mamba"), dtype=torch.bfloat16)
    for model in (loaded, built):
        dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters() if "mixer" in name}
        assert {dtypes[name] for name in ("A_log", "D", "dt_bias")} == {torch.float32}
        assert model.model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
        (ids,) = prompt(5)
        assert bool(torch.isfinite(model(ids).logits).all())
        assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 8)


def test_what_a_checkpoint_lacks_is_initialised_and_the_rest_is_not_touched(tmp_path) -> None:
    model = tiny("hybrid", mlp={"d_mlp": 24})
    weights = {name: torch.full_like(w, 7.0) for name, w in model.state_dict().items() if "D" not in name}
    weights = {name: w for name, w in weights.items() if not name.endswith(("layers.1.mixer.A_log", "lm_head.weight"))}
    opened = SeqlibForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)
    for name, weight in opened.state_dict().items():
        if name in weights or name == "lm_head.weight":
            assert bool((weight == 7).all()), name
    fresh = opened.model.backbone.layers[1].mixer
    expected = torch.arange(1, 5).log().expand_as(fresh.A_log)
    torch.testing.assert_close(fresh.A_log.data, expected)
    torch.testing.assert_close(fresh.D.data, torch.ones_like(fresh.D))


def test_an_empty_checkpoint_gives_the_same_distributions_as_the_constructor() -> None:
    built = tiny("hybrid", mlp={"d_mlp": 24}, d_model=64)
    empty = SeqlibForCausalLM.from_pretrained(None, config=built.config, state_dict={})
    for (name, a), b in zip(built.named_parameters(), empty.parameters(), strict=True):
        assert bool(torch.isfinite(b).all()), name
        if a.numel() > 1000:
            assert 0.9 < a.std() / b.std() < 1.1, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float, tmp_path) -> None:
    tiny("mamba").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.backbone.layers.1.mixer.in_proj.weight"][3, 2] = bad
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"NaN or infinity in model\.backbone\.layers\.1\.mixer\.in_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_damaged_file_is_refused(tmp_path) -> None:
    tiny("mamba").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointMismatch, match="damaged"):
        SeqlibForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path) -> None:
    tiny("mamba").save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"missing: model\.backbone\.layers\.2"):
        SeqlibForCausalLM.from_pretrained(tmp_path, config=tiny_config("mamba", n_layer=3))
    with pytest.raises(CheckpointMismatch, match=r"not part of the model: model\.backbone\.layers\.1"):
        SeqlibForCausalLM.from_pretrained(tmp_path, config=tiny_config("mamba", n_layer=1))
    with pytest.raises(CheckpointMismatch, match=r"of another shape: model\.embed_tokens\.weight \(64, 16\)"):
        SeqlibForCausalLM.from_pretrained(tmp_path, config=tiny_config("mamba", vocab_size=65))
    wider = tiny_config("mamba", vocab_size=65)
    accepted = SeqlibForCausalLM.from_pretrained(tmp_path, config=wider, ignore_mismatched_sizes=True)
    assert accepted.lm_head.weight.shape[0] == 65 and bool(torch.isfinite(accepted.lm_head.weight).all())


def test_a_head_may_be_new_but_a_backbone_may_not(tmp_path) -> None:
    model = tiny("mamba")
    model.save_pretrained(tmp_path / "lm")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    assert same_weights(classifier.model, model.model) and classifier.score.weight.shape == (3, 16)
    model.model.save_pretrained(tmp_path / "base")
    assert same_weights(SeqlibForCausalLM.from_pretrained(tmp_path / "base"), model)
    assert same_weights(SeqlibModel.from_pretrained(tmp_path / "base"), model.model)
    classifier.save_pretrained(tmp_path / "classifier")
    again = SeqlibForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert same_weights(again, classifier)
    with pytest.raises(CheckpointMismatch, match=r"another shape: score\.weight"):
        SeqlibForSequenceClassification.from_pretrained(tmp_path / "classifier", num_labels=4)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["backbone.norm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"missing: (model\.)?backbone\.norm\.weight"):
        SeqlibForSequenceClassification.from_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointMismatch, match=r"missing: backbone\.norm\.weight"):
        SeqlibModel.from_pretrained(tmp_path / "base")
