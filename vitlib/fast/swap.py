"""A model whose stock parts are fast: the same structure, the user's own parts as they are.

How data flows: the model is copied without its weights (a module is its dictionary of children, and
only that is new); every part that is vitlib's own, with no hook and no change, is replaced by its
fast counterpart, and everything else is the very object the user put there. ViT.forward then runs
on the copy, so whatever a subclass or a hook does still happens. The original is only read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitlib.encoder import (
    MLP,
    Attention,
    AttentionPool,
    Block,
    LayerNorm,
    LayerScale,
    Linear,
    RotaryAttention,
    SwiGLU,
)
from vitlib.fast.cpu import Route
from vitlib.fast.linears import FastLinear, Weights, make, own
from vitlib.image.processor import ImageProcessor
from vitlib.patch_embed import PatchEmbed, PatchProjection
from vitlib.positions import AttentionPosition, RelativePositionBias, RotaryEmbedding
from vitlib.system.torch_state import float64_device
from vitlib.vit import ViT

STOCK = (
    ViT, PatchEmbed, Block, Attention, RotaryAttention, AttentionPool, MLP, SwiGLU,
    Linear, LayerNorm, LayerScale, RelativePositionBias, RotaryEmbedding,
    nn.Linear, nn.LayerNorm, nn.Conv2d, PatchProjection,
    nn.Identity, nn.ModuleList, nn.ParameterList,
)  # fmt: skip
# Whose children may be replaced even in a subclass: it calls them, and needs nothing else of them.
OURS = (ViT, PatchEmbed, Block, Attention, MLP, SwiGLU, nn.ModuleList)
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)  # fmt: skip


def untouched(module: nn.Module) -> bool:
    """Whether a module is of the library's own kind and does what its class says."""
    hooked = any(getattr(module, name, None) for name in HOOKS)
    if type(module) not in STOCK or hooked:
        return False
    # A method of the instance's own, which hides the class's.
    return not any(
        callable(v) and callable(getattr(type(module), n, None)) for n, v in vars(module).items()
    )


def stock(module: nn.Module) -> bool:
    """Whether a module and all within it are untouched and where they were, and no hook watches
    every module."""
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    return all(untouched(part) for part in module.modules()) and in_place(module)


def in_place(module: nn.Module) -> bool:
    """Whether a block or patch projection of stock parts is built as the library builds it."""
    if isinstance(module, PatchEmbed):
        conv, patch = module.proj, module.patch_size
        return isinstance(conv, nn.Conv2d) and (
            (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            == (patch, patch, (0, 0), (1, 1), 1)
        )
    if not isinstance(module, Block):
        return True
    attn, mlp = module.attn, module.mlp
    if not isinstance(attn, Attention) or not isinstance(mlp, MLP | SwiGLU):
        return False
    norms, linears = (module.norm1, module.norm2), (attn.q, attn.k, attn.v, attn.proj)
    d = attn.num_heads * attn.head_dim
    return (
        all(x is None or isinstance(x, LayerScale) for x in (module.ls1, module.ls2))
        and all(
            isinstance(n, nn.LayerNorm) and n.weight is not None and n.bias is not None
            for n in norms
        )
        and all(isinstance(x, nn.Linear) and x.weight.shape == (d, d) for x in linears)
        and all(isinstance(x, nn.Linear) for x in (mlp.fc1, mlp.fc2))
    )


Speed = Callable[[str, nn.Module], "nn.Module | None"]


def rebuilt(module: nn.Module, speed: Speed, path: str = "") -> nn.Module:
    """The module with every stock part that `speed` has a counterpart for replaced by that."""
    if stock(module):
        fast = speed(path, module)
        if fast is not None:
            return fast
    if not isinstance(module, OURS):
        return module
    children = {
        name: None if child is None else rebuilt(child, speed, f"{path}.{name}" if path else name)
        for name, child in module._modules.items()
    }
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    return with_children(module, children)


def with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """A copy of a module, sharing its hooks, with other children and its tensors in float32."""
    clone = copy.copy(module)
    clone.__dict__["_modules"] = children
    clone.__dict__["_parameters"] = {
        name: None if tensor is None else own(tensor) for name, tensor in module._parameters.items()
    }
    clone.__dict__["training"] = False
    return clone


def as_they_are(model: ViT) -> list[str]:
    """The paths of the parts that are not stock, outermost where all within is unknown."""
    found: list[str] = []

    def look(module: nn.Module, path: str) -> None:
        if not untouched(module):
            found.append(path or "the model itself")
            if not isinstance(module, OURS):
                return
        for name, child in module.named_children():
            look(child, f"{path}.{name}" if path else name)

    look(model, "")
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        found.insert(0, "every module (a global hook)")
    return found


class FastPatchEmbed(PatchEmbed):
    """A PatchEmbed made by patches(): positions off the learned grid are resampled once a grid."""

    def resize_pos_embed(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(h, w) -> as PatchEmbed's."""
        last = self.remembered  # another thread may put another grid's there at any moment
        if last is None or last[0] != grid:
            last = self.remembered = grid, super().resize_pos_embed(grid)
        return last[1]

    remembered: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle resamples for itself."""
        return {**self.__dict__, "remembered": None}


class FastPositions(AttentionPosition):
    """What another module says of where tokens lie, computed once a grid."""

    def __init__(self, of: AttentionPosition) -> None:
        super().__init__()
        self.of = of
        self.remembered: tuple[object, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle computes for itself."""
        return {**self.__dict__, "remembered": None}

    def per_block(self, grid: tuple[int, int], device: torch.device, count: int) -> list[Tensor]:
        """(h, w) -> as the other's, but always a list."""
        key = grid, device, count
        last = self.remembered
        if last is None or last[0] != key:
            last = self.remembered = key, list(self.of.per_block(grid, device, count))
        return last[1]


class Projection(nn.Module):
    """The patch projection as one product: patches do not overlap, so a convolution is a linear."""

    def __init__(self, linear: FastLinear, kernel: torch.Size) -> None:
        """kernel: (D, C, p, q)."""
        super().__init__()
        self.linear, self.kernel = linear, kernel
        self.in_channels = kernel[1]
        self.weight = torch.empty(0, dtype=torch.float32)  # PatchEmbed casts pixels to its dtype

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w), a view of (B, h * w, D)."""
        _, _, p, q = self.kernel
        grid = images.shape[2] // p, images.shape[3] // q
        x = self.tokens(images).float().transpose(1, 2)
        return x.unflatten(2, grid)  # type: ignore[no-any-return, no-untyped-call]

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h * w, D) in the linear's dtype."""
        _, c, p, q = self.kernel
        b, h, w = len(images), images.shape[2] // p, images.shape[3] // q
        whole = images[:, :, : h * p, : w * q]  # a convolution drops the rest
        patches = whole.view(b, c, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
        return self.linear(patches.reshape(b, h * w, c * p * q))  # type: ignore[no-any-return]


def projection(conv: nn.Conv2d, route: Route, levels: Levels | None = None) -> Projection:
    """The patch projection of normalised pixels, or of 0..255 where `levels` says how."""
    # bfloat16 is near enough beside 8 bits; beside bfloat16 it loses answers, and gains little.
    route = route if route.arithmetic == "int8" else route._replace(arithmetic="fp32")
    dtype = route.attention_dtype if route.arithmetic == "int8" else torch.float32
    weight = conv.weight.detach().to(dtype).float()  # first, as save() writes that
    bias = None if conv.bias is None else own(conv.bias.to(dtype))
    weights = Weights(weight, bias)
    if levels is not None:
        weights = fold(weights, levels)
    return Projection(make(Weights(weights.weight.flatten(1), weights.bias), route), weight.shape)


def fold(weights: Weights, levels: Levels, centre: tuple[float, ...] | None = None) -> Weights:
    """Fold the normalisation of levels into a patch projection.

    Args:
        weights: The projection of normalised pixels, weight (D, C, p, q).
        levels: What a level of each channel is as a pixel.
        centre: What is taken away from the levels of each channel before the projection.

    Returns:
        The projection of levels less `centre`, computed in float64 and rounded once.
    """
    device = weights.weight.device
    there = float64_device(device)
    exact = weights.weight.to(there, torch.float64)
    factor, offset = (torch.tensor(v, dtype=torch.float64, device=there) for v in levels)
    if centre is not None:
        offset = offset + factor * torch.tensor(centre, dtype=torch.float64, device=there)
    bias = (exact.sum(dim=(2, 3)) * offset).sum(dim=1)
    if weights.bias is not None:
        bias = bias + weights.bias.to(there, torch.float64)
    weight = (exact * factor[:, None, None]).float()
    return Weights(weight.to(device), bias.float().to(device))


def patches(stock: PatchEmbed, way: Route, levels: Levels | None = None) -> PatchEmbed:
    """The counterpart of a stock PatchEmbed, for pixels, or for the levels they are made of."""
    fast = with_children(stock, {"proj": projection(stock.proj, way, levels)})
    fast.__class__ = FastPatchEmbed
    assert isinstance(fast, PatchEmbed)
    return fast


class Levels(NamedTuple):
    """What levels mean, a channel each: a pixel is level * factor + offset."""

    factor: tuple[float, ...]
    offset: tuple[float, ...]


def floated(module: nn.Module) -> nn.Module:
    """A stock part that is too small to be made fast, in float32; a copy, as of own()."""
    return copy.deepcopy(module).float().requires_grad_(False)


def meaning(processor: object | None) -> Levels | None:
    """What 8-bit levels are as pixels under a rule; None where that is not all there is to it."""
    if not isinstance(processor, ImageProcessor) or processor.float_resize:
        return None
    factor = 1.0 if processor.rescale_factor is None else processor.rescale_factor
    mean = processor.image_mean or (0.0,) * processor.in_channels
    std = processor.image_std or (1.0,) * processor.in_channels
    return Levels(
        tuple(factor / s for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
    )
