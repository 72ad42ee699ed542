"""Laws of every mixer as a torch module: watched, written to, copied, built in any dtype, checkpointed, distributed."""

from __future__ import annotations

import copy
import pickle
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_mixers import AHEAD, D_MODEL, ROWS
from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.layers.norm import RMSNorm
from seqlib.mixers import build_mixer
from seqlib.models.backbone import Backbone
from seqlib.models.config import BackboneConfig

every = pytest.mark.parametrize("config", ROWS)
causal = pytest.mark.parametrize("config", [row for row in ROWS if row.id not in AHEAD])
PROMPT = 6


def stack(config: dict[str, Any], **changes: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(d_model=D_MODEL, n_layer=1, mixers={"m": config}, layer_pattern="m", **changes))


def inputs(seqlen: int = 10) -> Tensor:
    return torch.randn(2, seqlen, D_MODEL, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decoded(model: Backbone, x: Tensor) -> Tensor:
    """Outputs of steps after a prompt."""
    _, state = model(x[:, :PROMPT])
    outputs = []
    for t in range(PROMPT, x.shape[1]):
        y, state = model.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1)


@causal
def test_hooks_see_a_step_as_they_see_a_pass(config: dict) -> None:
    """Of every part that a pass calls, all watched at once and each one alone."""
    model, x = stack(config).eval(), inputs()
    plain = decoded(model, x)

    def seen(watched: list[str]) -> tuple[set[str], set[str]]:
        calls: set[str] = set()
        hooks = [model.get_submodule(n).register_forward_hook(lambda *_, n=n: calls.add(n)) for n in watched]
        with torch.no_grad():
            _, state = model(x[:, :PROMPT])
            in_pass = set(calls)
            calls.clear()
            model.step(x[:, PROMPT], state)
            in_step = set(calls)
        torch.testing.assert_close(decoded(model, x), plain, atol=1e-4, rtol=1e-4)
        for hook in hooks:
            hook.remove()
        return in_pass, in_step

    called, in_step = seen([name for name, _ in model.named_modules() if name])
    assert in_step >= called
    for name in called:
        assert seen([name])[1] == {name}, name


@causal
def test_a_write_of_any_kind_changes_steps_and_passes_alike(config: dict) -> None:
    """Through `.data` too, which torch does not count: a step equals that of a model that never saw the old numbers."""
    model, x = stack(config).eval(), inputs()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            decoded(model, x)  # whatever is remembered is remembered now
            tensor.data.mul_(1.25).add_(0.01)
            fresh = stack(config).eval()
            fresh.load_state_dict(model.state_dict())
            torch.testing.assert_close(decoded(model, x), decoded(fresh, x), atol=1e-4, rtol=1e-4, msg=name)


@every
def test_modules_are_pickled_and_copied(config: dict) -> None:
    x = inputs()
    for activation in ("relu2", "gelu_tanh", "identity"):
        model = stack(config, mlp={"d_mlp": 8, "activation": activation}).eval()
        with torch.no_grad():
            want = model(x)[0]
            for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
                torch.testing.assert_close(twin(x)[0], want)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_are_built_in_every_dtype(config: dict, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = stack(config)
    finally:
        torch.set_default_dtype(before)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@causal
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_decode_or_say_why_not(config: dict, dtype: torch.dtype) -> None:
    model, x = stack(config).eval().to(dtype), inputs()
    try:
        assert bool(torch.isfinite(decoded(model, x.to(dtype))).all())
    except UnsupportedInput as error:
        assert "float" in str(error)


@every
def test_every_parameter_is_reached(config: dict) -> None:
    """Data-parallel training waits for the gradient of each."""
    model = stack(config).train()
    model(inputs())[0].square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@causal
def test_a_step_refuses_gradients(config: dict) -> None:
    mixer, x = build_mixer(config, D_MODEL), inputs()
    with torch.no_grad():
        _, state = mixer(x[:, :PROMPT])
        want, _ = mixer.step(x[:, PROMPT], state.clone())
    got, _ = mixer.step(x[:, PROMPT], state.clone())
    assert not got.requires_grad and torch.equal(got, want)
    with pytest.raises(UnsupportedInput, match="records no gradients"):
        mixer.step(x[:, PROMPT].requires_grad_(), state)


@causal
def test_what_was_made_in_inference_mode_goes_on_outside(config: dict) -> None:
    """States and what a mixer keeps for itself, by forward, step and a whole branch, with gradients and without."""
    mixer, norm, x = build_mixer(config, D_MODEL), RMSNorm(D_MODEL), inputs()
    fresh = copy.deepcopy(mixer)
    with torch.inference_mode():
        begun = mixer.initial_state(2, x.shape[1])
        _, state = mixer(x[:, :PROMPT], begun)
        _, state = mixer.step(x[:, PROMPT], state)
    kept = [t.clone() for t in state.tensors()]
    with torch.no_grad():
        _, ordinary = fresh(x[:, : PROMPT + 1])
    rest = x[:, PROMPT + 1 :]
    want = fresh(rest, ordinary)[0]
    want.square().sum().backward()

    got = mixer(rest, state)[0]
    got.square().sum().backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for (name, p), q in zip(mixer.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(mixer(rest, state=state)[0], want, atol=1e-5, rtol=1e-5)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            after: Any = state
            for t in range(rest.shape[1]):
                y, after = mixer.step(rest[:, t], after)
                torch.testing.assert_close(y, want[:, t], atol=1e-5, rtol=1e-5)
    if not mixer.takes_residual:
        with torch.no_grad():
            y, _ = mixer.added_step(rest[:, 0], norm, state)
            torch.testing.assert_close(y, rest[:, 0] + mixer.step(norm(rest[:, 0]), ordinary)[0], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), kept, strict=True)), "the given state was written to"
    mixer.step(x[:, 0], mixer.initial_state(2, 4))
    mixer(x[:, :4], begun)[0].sum().backward()


@causal
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_hands_on_the_gradients_of_states(config: dict, reentrant: bool) -> None:
    """Of a state that is carried from span to span, which no plain tensor of the call holds."""

    def gradients(again: bool) -> dict[str, Tensor]:
        model, x = stack(config).train(), inputs().requires_grad_()
        model.gradient_checkpointing = again
        model._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
            f, *a, use_reentrant=reentrant
        )
        first, state = model(x[:, :PROMPT])
        second, _ = model(x[:, PROMPT:], state)
        (first.square().sum() + second.square().sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}

    want, got = gradients(False), gradients(True)
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.dist
def test_every_mixer_trains_data_parallel() -> None:
    """Two rounds each, because a parameter that was not reached shows in the second."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            for row in ROWS:
                parallel = torch.nn.parallel.DistributedDataParallel(stack(row.values[0]).train())
                for _ in range(2):
                    parallel(inputs())[0].square().sum().backward()
        finally:
            dist.destroy_process_group()
