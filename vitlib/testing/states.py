"""Tensors of one forward by comparable names, of a ViT by its trace, of any module by hooks.

Names are those of points, with four differences: "attn.q", "attn.k" and "attn.v" are what the
projections give, (B, T, D), before norms of heads and rotation; "attn.heads" has the heads side by
side, (B, T, D); the outputs of the modules "norm1", "norm2", "mlp.fc1" and "patch_embed.proj" have
names too; "pooled" is what the last linear layer takes. Every tensor is float64 on the CPU.

Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.encoder import MLP, Attention, Block
from vitlib.points.names import block_points, has_pooled_point
from vitlib.points.trace import trace
from vitlib.testing.module_names import find_blocks
from vitlib.testing.outputs import to_float64
from vitlib.testing.recording import call, record, to_module
from vitlib.variants import PostNormBlock
from vitlib.vit import ViT

States = dict[str, Tensor]
_TRACED = ("resid_pre", "attn.heads", "attn.out", "resid_mid", "mlp.hidden", "mlp.out", "resid")


@dataclass(frozen=True)
class Subject:
    """A module under comparison.

    Attributes:
        role: "model" or "reference", for messages.
        module: The module.
        sources: Its points, where it is not a ViT of vitlib.
        named: Points that the caller named.
        eps: Step of the dtype to which the weights were rounded, near 1; 0 where they were not.
    """

    role: str
    module: nn.Module
    sources: Mapping[str, str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()
    eps: float = 0.0

    @property
    def vit(self) -> ViT | None:
        """The module if it is a ViT of vitlib, else None."""
        return self.inner if isinstance(self.inner, ViT) else None

    @property
    def inner(self) -> nn.Module:
        """The module itself where torch.compile has wrapped it."""
        inner = getattr(self.module, "_orig_mod", self.module)
        return inner if isinstance(inner, nn.Module) else self.module

    @property
    def depth(self) -> int:
        """Number of blocks; 0 where they have no known form."""
        blocks = len(self.vit.blocks) if self.vit else len(find_blocks(self.inner))
        named = [int(name.split(".")[1]) + 1 for name in self.sources if name[:7] == "blocks."]
        return max(blocks, *named, 0)

    def widen(
        self, rounded: torch.dtype, images: Tensor, dtype: torch.dtype = torch.float64
    ) -> Subject | None:
        """Copy the module in a dtype of more bits, if it runs in it.

        Args:
            rounded: Dtype to which its weights are rounded before.
            images: Images to try it on, (B, C, H, W).
            dtype: Dtype of the copy; one in float64 is on the CPU, as few devices have it.

        Returns:
            The copy; None where the module cannot be copied, or does not run.
        """
        try:
            module = copy.deepcopy(self.inner)
            if dtype == torch.float64:
                module = module.to("cpu")
            # Tables that a module computes are buffers: those are rounded only if it rounds them.
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(rounded)
            module = module.to(dtype)
            call(module, to_module(module, images))
        except Exception:  # a module of someone else's may refuse in any way
            return None
        eps = torch.finfo(rounded).eps
        is_coarse = eps > torch.finfo(torch.float32).eps
        return replace(self, module=module, eps=max(self.eps, eps * is_coarse))

    def read(self, images: Tensor) -> tuple[Any, States]:
        """Run the module and read its points.

        Args:
            images: (B, C, H, W).

        Returns:
            What the module returns, and tensors by name.
        """
        images = to_module(self.module, images)
        if self.vit is not None:
            output, states = read_vit(self.vit, images)
        else:
            output, states = record(self.inner, images, self.sources)
        return output, {name: to_float64(x) for name, x in states.items()}

    def part(self, point: str) -> nn.Module | None:
        """Return the module whose output a point is.

        Args:
            point: Its name.

        Returns:
            The module; None where there is none, or it computes more than the point.
        """
        path = _PARTS.get(point.split(".", 2)[-1] if point.startswith("blocks.") else point, "")
        if self.vit is not None:
            prefix = ".".join(point.split(".")[:2]) + "." if point.startswith("blocks.") else ""
            path = prefix + path if path else ""
        else:
            path = self.sources.get(point, "")
            is_shared = list(self.sources.values()).count(path) > 1
            path = "" if ":" in path or "+" in path or is_shared else path
        try:
            return self.inner.get_submodule(path) if path else None
        except AttributeError:
            return None


# Modules of a ViT whose outputs are points.
_PARTS = {
    **{name: name for name in ("norm1", "norm2", "attn.q", "attn.k", "attn.v", "mlp.fc1")},
    **{"attn.out": "attn.proj", "mlp.out": "mlp.fc2"},
    **{"patch_embed.proj": "patch_embed.proj", "norm": "norm", "logits": "head"},
}


def read_vit(model: ViT, images: Tensor) -> tuple[Tensor, States]:
    """Trace a ViT, and compute from the trace what its modules between the points give.

    Args:
        model: The model, in eval mode.
        images: (B, C, H, W), in its dtype and on its device.

    Returns:
        Logits and tensors by name.
    """
    points = ["embed", "norm"]
    for index, block in enumerate(model.blocks):
        present = set(block_points(block))
        points += [f"blocks.{index}.{name}" for name in _TRACED if name in present]
    logits, at = trace(model, images, points)
    states = {"pixels": images, "patch_embed.proj": model.patch_embed.proj(images), **at}
    for index, block in enumerate(model.blocks):
        if type(block) in (Block, PostNormBlock):
            prefix = f"blocks.{index}."
            inner = {name[len(prefix) :]: x for name, x in at.items() if name.startswith(prefix)}
            states |= {prefix + name: x for name, x in _read_block(block, inner).items()}
    if has_pooled_point(model):
        is_headless = isinstance(model.head, nn.Identity)
        vector = model.pool(at["norm"])
        states["pooled"] = vector if is_headless else model.projection(vector)
    return logits, states


def _read_block(block: Block, at: Mapping[str, Tensor]) -> States:
    """Compute the tensors between the points of a block, and flatten its heads."""
    is_post = isinstance(block, PostNormBlock)
    states: States = {}
    if "attn.out" in at:
        states["norm1.in"] = at["attn.out"] if is_post else at["resid_pre"]
        states["norm1"] = block.norm1(states["norm1.in"])
    if "attn.heads" in at and isinstance(block.attn, Attention):
        x = at["resid_pre"] if is_post else states["norm1"]
        states |= {f"attn.{name}": getattr(block.attn, name)(x) for name in "qkv"}
        states["attn.heads"] = at["attn.heads"].transpose(1, 2).flatten(2)
    if "mlp.out" in at:
        states["norm2.in"] = at["mlp.out"] if is_post else at["resid_mid"]
        states["norm2"] = block.norm2(states["norm2.in"])
    if "mlp.hidden" in at and isinstance(block.mlp, MLP):
        states["mlp.fc1"] = block.mlp.fc1(at["resid_mid"] if is_post else states["norm2"])
    return states


def align(x: Tensor, like: Tensor) -> Tensor:
    """Bring a tensor into the order of axes of another: maps to tokens, heads side by side.

    Args:
        x: Any tensor.
        like: The tensor that it is compared with.

    Returns:
        The tensor, with the shape of `like` where an order of its axes has it.
    """
    if x.shape == like.shape:
        return x
    # The first order that fits is right: sizes of axes rarely agree by chance.
    orders = [x]
    if x.ndim == 4:  # (B, D, h, w), (B, H, T, K), (B, T, H, K), (B, h, w, D)
        orders += [x.flatten(2).mT, x.transpose(1, 2).flatten(2), x.flatten(2), x.flatten(1, 2)]
    if x.ndim == 3:
        orders += [x.transpose(0, 1)]
    if x.ndim == 2:  # tokens of all images in a row
        orders += [x[None]]
    return next((order for order in orders if order.shape == like.shape), x)


def common_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[States, States]:
    """Bring the tensors of two modules to the same shapes.

    Args:
        a: Tensors of the model by name.
        b: Tensors of the reference by name.

    Returns:
        Both: maps of patches are (B, N, D), and tensors of both modules have the same axes.
    """
    first, second = (
        {n: x.flatten(2).mT if n == "patch_embed.proj" and x.ndim == 4 else x for n, x in s.items()}
        for s in (a, b)
    )
    for states in (first, second):
        for name in [name for name in states if name.endswith(".norm2.in")]:
            branch = states.get(name.replace("norm2.in", "mlp.out"))
            # After a branch, the norm does not take the residual stream.
            if branch is not None and torch.equal(states[name], branch):
                states.pop(name.replace("norm2.in", "resid_mid"), None)
    last = max((int(n.split(".")[1]) for n in (*first, *second) if n[:7] == "blocks."), default=0)
    for name in first.keys() & second.keys():
        second[name] = align(second[name], first[name])
        first[name] = align(first[name], second[name])
        if name == "norm" or name.startswith(f"blocks.{last}."):
            first[name], second[name] = _cut_tokens(first[name], second[name])
    return first, second


def _cut_tokens(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cut tokens to those that both modules compute: some compute only what the head reads."""
    is_longer = x.ndim == y.ndim == 3 and x.shape[::2] == y.shape[::2]
    count = min(x.shape[1], y.shape[1]) if is_longer else 0
    return (x[:, :count], y[:, :count]) if count else (x, y)
