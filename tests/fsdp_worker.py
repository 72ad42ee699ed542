"""One of two processes that train a model sharded by accelerate's FSDP2; see test_hf_ecosystem.py."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from hf_models import prompt, tiny
from torch.distributed.tensor import DTensor


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, backward) -> list[float]:
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids, use_cache=False).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def main(stack: str) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    # On CPUs accelerate shards nothing by itself and says nothing; what it would call works there.
    AcceleratorState._shared_state |= {"fsdp_plugin": plugin, "distributed_type": DistributedType.FSDP}
    (ids,) = prompt(12)
    whole = tiny(stack).train()
    expected = train(whole, optimizer_of(whole), ids, torch.Tensor.backward)
    model = tiny(stack).train()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    got = train(model, optimizer, ids, accelerator.backward)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for (name, weight), shard in zip(whole.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(shard.full_tensor(), weight, rtol=1e-4, atol=1e-5, msg=name)


if __name__ == "__main__":
    main(*sys.argv[1:])
    torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter
