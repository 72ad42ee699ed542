"""Config, backbone, loss and pooling."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.mlp import MLPConfig
from seqlib.models import Backbone, BackboneConfig, LanguageModel, lm_loss, param_groups
from seqlib.models.config import expand_pattern
from seqlib.models.heads import finish_logits, pool
from seqlib.ops import rms_norm
from seqlib.ops.linear_cross_entropy import torch_impl
from seqlib.sequence import SequenceInfo

HYBRID = BackboneConfig(
    d_model=32,
    n_layer=4,
    mixers={"m": {"kind": "mamba", "d_state": 4}, "a": {"kind": "sliding_attention", "nheads": 4, "window": 6}},
    layer_pattern="m a",
    mlp=MLPConfig(d_mlp=48),
)


@pytest.mark.parametrize(
    ("pattern", "n_layer", "tile", "want"),
    [
        ("m", 3, "exact", "mmm"),
        ("m*2 a", 6, "exact", "mmamma"),
        ("m m a", 8, "truncate", "mmammamm"),  # Griffin's 26 = 8 * 3 + 2 in small
        (["a", "m"], 2, "exact", "am"),
    ],
)
def test_pattern(pattern, n_layer: int, tile: str, want: str) -> None:
    assert "".join(expand_pattern(pattern, n_layer, {"m": 0, "a": 0} if "a" in want else {"m": 0}, tile)) == want


@pytest.mark.parametrize(
    ("pattern", "n_layer", "message"),
    [
        ("m a", 3, "do not tile"),
        ("m*5 a", 4, "do not tile"),
        ("m b", 4, "'b'"),
        ("m*0 a", 4, r"m\*0"),
        ("", 4, "0 layers"),
        ("m", 4, "do not occur"),
    ],
)
def test_wrong_pattern_is_refused(pattern: str, n_layer: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_pattern(pattern, n_layer, {"m": 0, "a": 0})


def test_config_round_trip() -> None:
    plain = json.loads(json.dumps(HYBRID.to_dict()))
    assert BackboneConfig.from_dict(plain) == HYBRID
    with pytest.raises(ConfigError, match="no field depth"):
        BackboneConfig.from_dict({**plain, "depth": 3})
    with pytest.raises(ConfigError, match="n_layer must be a positive integer, got 0"):
        BackboneConfig.from_dict({**plain, "n_layer": 0})


def test_backbone_carries_its_state() -> None:
    backbone = Backbone(HYBRID).double()
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    want, last = backbone(x)
    y, state = backbone(x[:, :9])
    z, state = backbone(x[:, 9:20], state)
    parts = [y, z]
    for t in range(20, 23):
        y, state = backbone.step(x[:, t], state)
        parts.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-10, rtol=0)
    assert state.seqlen == last.seqlen == 23
    assert backbone.initial_state(2, 23).nbytes == backbone.state_bytes(2, 23)


ASIDE = {"attention": {"nheads": 2}, "d_mlp": 20, "rank": 3, "attention_adapters": True}


def options(**block) -> BackboneConfig:
    mixers = {"m": {"kind": "mamba2", "headdim": 8, "d_state": 4}, "a": {"kind": "attention", "nheads": 4}}
    mlp = {"d_mlp": 24, "nexperts": 3, "top_k": 2}
    return BackboneConfig(
        d_model=32, n_layer=4, mixers=mixers, layer_pattern="m a", mlp=MLPConfig(d_mlp=16), norm_offset=1.0,
        blocks={"a": {"mlp": mlp, "mixer_scale": 0.5, "mlp_scale": 2.0, "mixer_skip": 3.0, "mlp_skip": 0.7, **block}},
        aside=ASIDE if "aside" in block else None,
    )  # fmt: skip


@pytest.mark.parametrize("block", [{}, {"norm": "post"}, {"norm": "stream"}, {"aside": True}])
def test_every_block_carries_its_state(block: dict) -> None:
    """Split, stepped, saved as plain values and checkpointed, a stack with options is the same stack."""
    config = options(**block)
    assert BackboneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    torch.manual_seed(0)
    backbone = Backbone(config).double()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2) if parameter.dim() == 1 or not bool(parameter.any()) else None
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    want, _ = backbone(x)
    y, state = backbone(x[:, :6], backbone.initial_state(2, 13, dtype=x.dtype))
    parts = [y]
    for t in range(6, 13):
        y, state = backbone.step(x[:, t], state)
        parts.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-10, rtol=0)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :5] = False
    alone, _ = backbone(x[:1, 5:])
    torch.testing.assert_close(backbone(x, None, SequenceInfo(padding_mask=mask))[0][:1, 5:], alone, atol=1e-10, rtol=0)
    assert backbone.initial_state(2, 13).nbytes == backbone.state_bytes(2, 13)
    backbone.gradient_checkpointing = True
    torch.testing.assert_close(backbone(x)[0], want)
    torch.testing.assert_close(backbone(x.roll(1, 0))[0].roll(1, 0), want)


def test_blocks_are_what_they_say() -> None:
    """One layer of each form, against the formula."""
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    for norm in ("pre", "post", "stream"):
        layer = Backbone(options(norm=norm)).double().layers[1]
        f, g = lambda h, m=layer.mixer: m(h)[0], layer.mlp
        n = [lambda h, w=w: rms_norm(h, w.weight + 1, eps=1e-5) for w in (layer.norm, layer.mlp_norm)]
        if norm == "pre":
            y = 3.0 * x + 0.5 * f(n[0](x))
            want = 0.7 * y + 2.0 * g(n[1](y))
        elif norm == "post":
            y = 3.0 * x + 0.5 * n[0](f(x))
            want = 0.7 * y + 2.0 * n[1](g(y))
        else:
            y = 3.0 * n[0](x) + 0.5 * f(n[0](x))
            want = 0.7 * n[1](y) + 2.0 * g(n[1](y))
        torch.testing.assert_close(layer(x, None, None)[0], want)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"norm": "both"}, "norm must be"),
        ({"aside": True, "norm": "post"}, "aside needs norm='pre'"),
        ({"depth": 2}, "block config has no field depth"),
        ({"mlp": {"nexperts": 2, "d_mpl": 3}}, "mlp config has no field d_mpl"),
    ],
)
def test_blocks_that_mean_nothing_are_refused(block: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**block)
    with pytest.raises(ConfigError, match="blocks x do not occur"):
        BackboneConfig(d_model=8, n_layer=1, mixers={"m": {"kind": "mamba"}}, layer_pattern="m", blocks={"x": {}})


def test_backbone_refuses_a_foreign_state() -> None:
    backbone = Backbone(HYBRID)
    state = backbone.initial_state(1)
    state.states.pop()
    with pytest.raises(UnsupportedInput, match="3 layers, the model 4"):
        backbone(torch.zeros(1, 2, 32), state)


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    model = LanguageModel(HYBRID, 50).double()
    ids = torch.randint(50, (2, 17))
    grads = []
    for remember in (False, True):
        model.zero_grad()
        model.backbone.gradient_checkpointing = remember
        model.loss(ids).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_residual_stream_is_float32() -> None:
    seen = []
    backbone = Backbone(HYBRID).bfloat16()
    backbone.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    y, _ = backbone(torch.randn(1, 5, 32, dtype=torch.bfloat16))
    assert seen == [torch.float32] and y.dtype == torch.bfloat16


@pytest.mark.parametrize("chunk", [1 << 6, 1 << 24])
@pytest.mark.parametrize("num_items", [None, 7])
@pytest.mark.parametrize("shape", [{}, {"scale": 0.3}, {"scale": 2.0, "softcap": 1.5}])
def test_lm_loss_is_cross_entropy(monkeypatch, chunk: int, num_items: int | None, shape: dict) -> None:
    monkeypatch.setitem(torch_impl.LOGITS, "cpu", chunk)
    hidden = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(13, (2, 11))
    labels[0, 3:6] = -100
    loss = lm_loss(hidden, weight, labels, num_items=num_items, **shape)
    flat = finish_logits(hidden @ weight.t(), **shape)[:, :-1].reshape(-1, 13)
    want = F.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="mean" if num_items is None else "sum")
    want = want if num_items is None else want / num_items
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss * 3, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(want * 3, (hidden, weight))):
        torch.testing.assert_close(a, b)


def test_lm_loss_never_holds_all_logits() -> None:
    """The largest tensor made for 8192 positions over 4096 words is a chunk, half of the full logits or less."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    hidden = torch.randn(1, 8192, 4, requires_grad=True)
    weight = torch.randn(4096, 4, requires_grad=True)
    with Largest():
        lm_loss(hidden, weight, torch.randint(4096, (1, 8192))).backward()
    assert max(sizes) <= 8192 * 4096 // 2


def test_bad_labels_are_refused() -> None:
    with pytest.raises(UnsupportedInput, match="labels must have shape"):
        lm_loss(torch.zeros(1, 4, 8), torch.zeros(9, 8), torch.zeros(1, 3, dtype=torch.long))


def test_pooling() -> None:
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert torch.equal(pool(hidden, "last"), hidden[:, 2])
    assert torch.equal(pool(hidden, "last", mask), torch.stack([hidden[0, 1], hidden[1, 2]]))
    assert torch.equal(pool(hidden, "mean", mask), torch.stack([hidden[0, :2].mean(0), hidden[1, 1:].mean(0)]))
    with pytest.raises(ConfigError, match="'max'"):
        pool(hidden, "max")
    with pytest.raises(UnsupportedInput, match="no real position"):
        pool(hidden, "mean", mask & False)


def test_param_groups_cover_everything_once() -> None:
    model = LanguageModel(HYBRID, 50)
    groups = param_groups(model, lr=1e-3, weight_decay=0.1)
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        vector = parameter.dim() < 2
        special = name.endswith(("A_log", "mixer.D", "dt_bias"))
        assert decay[id(parameter)] == (0.0 if vector or special else 0.1), name


def test_a_hybrid_learns() -> None:
    """A repeating text is learnt to a small loss in a few steps; a broken gradient anywhere would stop it."""
    torch.manual_seed(0)
    model = LanguageModel(HYBRID, 20)
    ids = torch.randint(20, (1, 12)).repeat(4, 4)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.0))
    first = model.loss(ids).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(ids)
        loss.backward()
        optimizer.step()
    assert first > 2.5 and loss.item() < 0.6  # ln 20 = 3.0; the first of four repetitions cannot be known


def test_packed_loss_equals_separate_documents() -> None:
    model = LanguageModel(HYBRID, 30).double()
    lengths = [5, 9, 3]
    ids = torch.randint(30, (1, sum(lengths)))
    labels = ids.clone()
    labels[0, [0, 5, 14]] = -100
    packed = model.loss(ids, labels, SequenceInfo.packed(lengths))
    parts = [model.loss(part) * (part.shape[1] - 1) for part in ids.split(lengths, 1)]
    torch.testing.assert_close(packed, sum(parts) / (sum(lengths) - len(lengths)))
