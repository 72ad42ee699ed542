"""Mixture of experts: routing, the sum over experts, and the loss that balances them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqlib.errors import ConfigError
from seqlib.layers.moe import MoE, MoEConfig, balance_loss

CONFIGS = [
    {"nexperts": 5, "top_k": 2},
    {"nexperts": 4, "top_k": 4, "score": "chosen_softmax", "d_shared": 6, "shared_gate": True},
    {"nexperts": 6, "top_k": 2, "score": "sigmoid", "choice_bias": True, "ngroups": 3, "top_groups": 2, "scale": 2.5},
    {
        "nexperts": 3,
        "top_k": 1,
        "normalize": False,
        "gated": False,
        "activation": "relu2",
        "d_latent": 8,
        "d_shared": 4,
    },
]


def made(config: dict, **more) -> MoE:
    torch.manual_seed(0)
    moe = MoE(MoEConfig(d_mlp=10, **config, **more), 16).double()
    if moe.choice_bias is not None:
        moe.choice_bias.data.normal_(0, 0.3)
    return moe


def dense(moe: MoE, x: Tensor) -> Tensor:
    """Every expert on every token, weighed."""
    weights, chosen = moe.route(x)
    full = torch.zeros(len(x), moe.config.nexperts, dtype=x.dtype).scatter(1, chosen, weights)
    h = x if moe.latent_in is None else moe.latent_in(x)
    hidden = torch.einsum("td,efd->tef", h, moe.in_weight)
    out = torch.einsum("tef,edf->ted", moe._activated(hidden), moe.out_weight)
    y = torch.einsum("te,ted->td", full, out)
    y = y if moe.latent_out is None else moe.latent_out(y)
    if moe.shared is not None:
        gate = 1.0 if moe.shared_gate is None else torch.sigmoid(moe.shared_gate(x))
        y = y + gate * moe.shared(x)
    return y


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 16), (37, 16), (2, 9, 16)])
def test_it_is_the_weighed_sum_of_the_chosen_experts(config: dict, shape: tuple[int, ...]) -> None:
    moe = made(config)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    want = dense(moe, x.reshape(-1, 16)).view_as(x)
    torch.testing.assert_close(moe(x), want, atol=1e-12, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), want, atol=1e-12, rtol=0)
    a, b = (torch.autograd.grad(y.square().sum(), [x, moe.in_weight, moe.router.weight]) for y in (moe(x), want))
    for got, expected in zip(a, b):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_groups_are_chosen_first() -> None:
    """With one group kept, both experts of a token are neighbours; the bias moves the choice and not the weights."""
    moe = made({"nexperts": 6, "top_k": 2, "score": "sigmoid", "ngroups": 3, "choice_bias": True, "normalize": False})
    x = torch.randn(50, 16, dtype=torch.float64)
    weights, chosen = moe.route(x)
    assert torch.equal(chosen[:, 0] // 2, chosen[:, 1] // 2)
    torch.testing.assert_close(weights, torch.sigmoid(moe.router(x)).gather(1, chosen))
    moe.choice_bias.data[:2] += 10
    assert bool((moe.route(x)[1] < 2).all())


def test_the_balance_loss_is_least_when_experts_share_the_work() -> None:
    even = torch.full((8, 4), 0.25)
    assert float(balance_loss(even, torch.arange(8).view(8, 1) % 4)) == pytest.approx(1.0)
    one = torch.zeros(8, 4)
    one[:, 0] = 1
    assert float(balance_loss(one, torch.zeros(8, 1, dtype=torch.long))) == pytest.approx(4.0)


def test_the_balance_loss_reaches_the_router_in_training_only() -> None:
    x = torch.randn(30, 16, dtype=torch.float64)
    plain, balanced = made(CONFIGS[0]), made(CONFIGS[0], balance=0.3)
    gradients = []
    for moe in (plain, balanced):
        moe(x).sum().backward()
        gradients.append(moe.router.weight.grad.clone())
    scores = plain.router(x).softmax(-1)
    loss = 0.3 * balance_loss(scores, plain.route(x)[1])
    (extra,) = torch.autograd.grad(loss, plain.router.weight)
    torch.testing.assert_close(gradients[1] - gradients[0], extra, atol=1e-12, rtol=0)
    balanced.eval()
    balanced.zero_grad()
    balanced(x).sum().backward()
    torch.testing.assert_close(balanced.router.weight.grad, gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_equals_one_by_one(dtype: torch.dtype) -> None:
    """Here on the CPU, where torch has it too; CUDA devices take it in bfloat16."""
    moe = MoE(MoEConfig(d_mlp=64, nexperts=5, top_k=2), 32).to(dtype)
    x = torch.randn(70, 32, dtype=dtype)
    experts, order = (moe.route(x)[1] % 4).flatten().sort()  # the last expert gets nothing
    rows = x[order // 2]
    results = []
    for way in (moe._grouped, moe._one_by_one):
        y = way(rows, experts)
        results.append((y, *torch.autograd.grad((y * y.detach()).sum(), [moe.in_weight, moe.out_weight])))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "relu"}, "score must be"),
        ({"nexperts": 2, "top_k": 3}, "1 <= top_k <= nexperts"),
        ({"nexperts": 4, "ngroups": 3}, "ngroups must divide"),
        ({"bias": True}, "no bias"),
    ],
)
def test_what_describes_no_experts_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEConfig(d_mlp=8, **fields)
