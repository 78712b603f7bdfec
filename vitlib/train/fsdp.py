"""A model shared out among the processes (FSDP2): each holds a part of every weight, and of its
gradient, its average and the optimizer's numbers.

How data flows: each block is a group of weights, and what is around the blocks is one more. All
processes gather a group before it computes, forward or backward, and let go of it after; gradients
are averaged on their way to the parts (Rajbhandari et al. 1910.02054, stage 3; Zhao et al.
2304.11277). So all processes must compute as often as each other, in evaluation too; and the parts
are put together for files, which are those of a run without.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from vitlib.errors import ConfigError
from vitlib.train.distributed import World
from vitlib.vit import ViT


def taken_from(model: ViT) -> ViT:
    """The model, its weights with it, as one that may be shared out: that cannot be undone.

    The one given keeps the shapes alone, until `put_back`: for good where the run fails. Raises
    ConfigError in a process that torchrun did not start.
    """
    if not distributed.is_initialized():
        raise ConfigError(
            "fsdp shares a model out among processes, and this one is alone: start with torchrun, "
            "or leave fsdp out"
        )
    taken = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
                module._parameters[name] = empty
    return taken


def put_back(shared: ViT, model: ViT, world: World) -> None:
    """All weights into the model they were taken from: on the CPU, at the first process alone."""
    state = whole(shared.state_dict(), world)
    if world.first:
        model.load_state_dict(state, assign=True)
        model.cpu()


def share(module: nn.Module, blocks: nn.ModuleList, world: World, *others: str) -> None:
    """Share a module, and the blocks in it, out. others: its methods called as forward is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (*blocks, module):
        # After forward the outermost goes too, else it would stay gathered after evaluation.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for name in others:
        register_fsdp_forward_method(module, name)


@torch.no_grad()
def whole(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Each tensor put together, on the CPU of the first process; nothing at the others."""
    found = {}
    for name, tensor in tensors.items():
        every = full(tensor.detach())
        if world.first:  # one at a time, so that no device ever holds all of them
            found[name] = every.cpu()
    return found


def full(tensor: Tensor) -> Tensor:
    """A tensor put together, at every process."""
    parted: Any = tensor
    return parted.full_tensor() if hasattr(parted, "full_tensor") else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor that every process has -> on the other's device, shared out as it is."""
    tensor, parted = tensor.to(other.device, copy=True), other
    if not hasattr(parted, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parted, DTensor)
    return distribute_tensor(tensor, parted.device_mesh, parted.placements, src_data_rank=None)
