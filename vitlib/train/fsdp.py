"""FSDP2: each process holds a shard of every weight, gradient, average and optimizer state.

How data flows: each block is a group of weights, and the weights outside the blocks are one more.
All processes gather a group before it computes, forward or backward, and free it afterwards.
Gradients are averaged on their way to the shards (Rajbhandari et al. 1910.02054, stage 3; Zhao et
al. 2304.11277). So every process must run forward as often as the others, in evaluation too. Files
hold full tensors and equal those of a run without FSDP.
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


def move_parameters(model: ViT) -> ViT:
    """Move a model's parameters to a copy that may be sharded, as sharding cannot be undone.

    Args:
        model: The caller's model. Its parameters become empty (meta), until restore_parameters; if
            the run fails they stay so.

    Returns:
        The copy with the parameters.

    Raises:
        ConfigError: torchrun did not start this process.
    """
    if not distributed.is_initialized():
        raise ConfigError(
            "fsdp shares a model out among processes, and this one is alone: start with torchrun, "
            "or leave fsdp out"
        )
    # The memo of deepcopy maps each parameter to itself, so that the copy takes it over.
    sharded = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
                module._parameters[name] = empty
    return sharded


def restore_parameters(sharded: ViT, model: ViT, world: World) -> None:
    """Put full weights back into the caller's model, on the CPU of the first process alone.

    Args:
        sharded: The model that was trained.
        model: The model from which move_parameters took the parameters.
        world: The processes.
    """
    state = gather_full(sharded.state_dict(), world)
    if world.is_first:
        model.load_state_dict(state, assign=True)
        model.cpu()


def shard(module: nn.Module, blocks: nn.ModuleList, world: World, *methods: str) -> None:
    """Shard a module, and the blocks in it, among the processes.

    Args:
        module: The outermost module.
        blocks: Modules in it that are groups of their own.
        world: The processes.
        *methods: Names of methods that compute with the weights, besides forward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (*blocks, module):
        # By default the outermost group stays gathered after forward, thus after an evaluation.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for name in methods:
        register_fsdp_forward_method(module, name)


@torch.no_grad()
def gather_full(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Gather full tensors on the CPU of the first process.

    Args:
        tensors: Tensors by name, sharded or not.
        world: The processes, all of which must call this.

    Returns:
        The full tensors in the first process, an empty dictionary in the others.
    """
    result = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        # Tensor by tensor, so that no device ever holds all of them.
        if world.is_first:
            result[name] = full.cpu()
    return result


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor in every process.

    Args:
        tensor: A tensor, sharded (DTensor) or not.

    Returns:
        A full tensor.
    """
    sharded: Any = tensor
    return sharded.full_tensor() if hasattr(sharded, "full_tensor") else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Copy a full tensor to the device of another, and shard it in the same way.

    Args:
        tensor: A full tensor that every process has.
        other: A tensor of the same shape, sharded or not.

    Returns:
        A new tensor.
    """
    copied, target = tensor.to(other.device, copy=True), other
    if not hasattr(target, "full_tensor"):
        return copied
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    # No source rank: every process has the tensor already, so nothing is sent.
    return distribute_tensor(copied, target.device_mesh, target.placements, src_data_rank=None)
