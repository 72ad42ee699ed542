"""One mixer's weights at several depths: what is shared, what is not, and how it is stored."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import prompt, tiny

from seqlib.errors import ConfigError
from seqlib.hf import SeqlibForCausalLM
from seqlib.models import Backbone, BackboneConfig, param_groups

ATTENTION = {"kind": "attention", "nheads": 2}
ZAMBA = {
    "n_layer": 6,
    "layer_pattern": "m a b",
    "mixers": {
        "m": {"kind": "mamba", "d_state": 4},
        "a": {"kind": "shared", "mixer": ATTENTION, "adapter_rank": 2},
        "b": {"kind": "sum", "mixers": [{"kind": "shared", "mixer": ATTENTION}, {"kind": "gated_conv"}]},
    },
}


def _stack(**changes) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(d_model=16, **(ZAMBA | changes))).double()


def _wake(backbone: torch.nn.Module) -> None:
    """Adapters start at zero, where nothing could be told apart."""
    for name, parameter in backbone.named_parameters():
        if "adapters" in name:
            torch.nn.init.normal_(parameter, std=0.5)


def test_layers_of_one_name_use_one_mixer() -> None:
    names = [name for name, _ in _stack().named_parameters()]
    assert "layers.1.mixer.mixer.q_proj.weight" in names
    assert "layers.2.mixer.mixers.0.mixer.q_proj.weight" in names
    assert not [name for name in names if name.startswith(("layers.4.mixer.mixer", "layers.5.mixer.mixers.0"))]
    assert "layers.4.mixer.adapters.q_proj.0.weight" in names
    assert "layers.5.mixer.mixers.1.in_proj.weight" in names  # only the part that is shared


def test_a_shared_stack_equals_one_with_equal_weights() -> None:
    """Every layer with a mixer of its own that holds the same numbers, adapters multiplied into the projections."""
    shared = _stack(n_layer=4, layer_pattern="m a", mixers={k: ZAMBA["mixers"][k] for k in "ma"})
    plain = _stack(n_layer=4, layer_pattern="m a", mixers={"m": ZAMBA["mixers"]["m"], "a": ATTENTION})
    _wake(shared)
    weights = shared.state_dict()
    for layer in (1, 3):
        own = {k.removeprefix("layers.1.mixer.mixer."): v for k, v in weights.items() if ".1.mixer.mixer." in k}
        for name in ("q_proj", "k_proj", "v_proj"):
            down, up = (weights[f"layers.{layer}.mixer.adapters.{name}.{i}.weight"] for i in (0, 1))
            own[f"{name}.weight"] = own[f"{name}.weight"] + up @ down
        plain.layers[layer].mixer.load_state_dict(own)
    plain.load_state_dict(
        {k: v for k, v in weights.items() if ".mixer.mixer." not in k and "adapters" not in k}, strict=False
    )
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(shared(x)[0], plain(x)[0])


def test_every_depth_has_a_state_and_adapters_of_its_own() -> None:
    backbone = _stack()
    _wake(backbone)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    want, _ = backbone(x)
    state = backbone.initial_state(2, 12)
    parts = []
    with torch.no_grad():
        for t in range(12):
            y, state = backbone.step(x[:, t], state)
            parts.append(y)
    torch.testing.assert_close(torch.stack(parts, 1), want)
    assert not torch.equal(state[1].k, state[4].k)
    assert state.nbytes == backbone.state_bytes(2, 12)


def test_gradients_of_all_depths_add_up_and_are_stepped_once() -> None:
    backbone = _stack()
    _wake(backbone)
    groups = param_groups(backbone, 1e-3, 0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(backbone.parameters()))
    backbone(torch.randn(1, 7, 16, dtype=torch.float64))[0].sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_copies_share_among_themselves() -> None:
    backbone = _stack()
    _wake(backbone)
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    want, _ = backbone(x)
    twin = copy.deepcopy(backbone)
    torch.testing.assert_close(twin(x)[0], want)
    with torch.no_grad():
        twin.layers[1].mixer.mixer.q_proj.weight.zero_()
        assert not torch.equal(twin(x)[0], want)
        torch.testing.assert_close(backbone(x)[0], want)
        changed = copy.deepcopy(backbone)
        changed.layers[1].mixer.mixer.q_proj.weight.zero_()
        torch.testing.assert_close(changed(x)[0], twin(x)[0])


def test_checkpoints_hold_shared_weights_once(tmp_path) -> None:
    model = tiny("mamba", **ZAMBA, mixer=None)
    _wake(model)
    ids = prompt(9)[0]
    model.save_pretrained(tmp_path)
    loaded = SeqlibForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.num_parameters() == model.num_parameters()
    layers = loaded.model.backbone.layers
    assert layers[4].mixer.mixer is None and layers[4].mixer._used[0] is layers[1].mixer.mixer
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=5, do_sample=False), want)
    half = SeqlibForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.backbone.layers[4].mixer._current().q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "must be the config of the mixer"),
        ({"mixer": {"kind": "mumba"}}, "unknown mixer kind 'mumba'"),
        ({"mixer": ATTENTION, "adapter_rank": 0}, "adapter_rank must be a positive integer"),
        ({"mixer": {"kind": "mamba"}, "adapter_rank": 2}, "no linear layer 'q_proj' to adapt; it has: in_proj"),
    ],
)
def test_wrong_configs_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _stack(n_layer=1, layer_pattern="a", mixers={"a": {"kind": "shared", **config}})
