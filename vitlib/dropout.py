"""What training drops, drawn for each sample by itself: the same whatever batch it is in.

A number is a function of (key of the sample, site in the model, place in the tensor), as in
counter-based generators (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), so that
two processes with half a batch each, a run that goes on after a kill, and a block that is computed
again for its gradient draw what one process would have drawn, on any device.

Shapes: B samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

SITES = 8  # numbers of sites that a block, or the embedding, may use
_MASK = 0xFFFFFFFF
_STEP = 0x9E3779B9  # of 2**32, the golden section: neighbours come far apart


class SampleKeys(NamedTuple):
    """Where a module's draws come from."""

    keys: Tensor  # (B,) int64, one a sample: sample_keys
    first: int  # the module's first site


def set_keys(model: nn.Module, keys: Tensor | None) -> None:
    """Have every draw of a ViT come from these keys (B,); None: from torch's global generator."""
    parts = [model.patch_embed, *model.blocks]  # type: ignore[misc]
    for index, part in enumerate(parts):
        module_keys = None if keys is None else SampleKeys(keys, index * SITES)
        for module in (part, getattr(part, "attn", None)):
            if module is not None:
                module.dropout_keys = module_keys


def sample_keys(seed: int, epoch: int, samples: Sequence[int]) -> Tensor:
    """One key a sample, (B,) int64 in 0..2**32 - 1."""
    start = hash32(_whole(seed & _MASK) ^ hash32(_whole((seed >> 32) & _MASK)))
    turned = hash32(start + epoch * _STEP)
    return hash32(turned + torch.as_tensor(samples, dtype=torch.int64, device="cpu") * _STEP)


def uniform(
    keys: SampleKeys | None, site: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """(B, ...) float32 from 0 up to, not with, 1."""
    if keys is None:
        return torch.rand(shape, dtype=torch.float32, device=device)
    samples = keys.keys.to(device)
    if samples.shape[0] != shape[0]:
        raise ValueError(f"keys of {samples.shape[0]} samples for a batch of {shape[0]}")
    own = hash32(samples + (keys.first + site + 1) * _STEP)
    places = torch.arange(math.prod(shape[1:]), device=device) * _STEP
    return (hash32(own[:, None] + places) >> 8).to(torch.float32).mul_(2**-24).view(shape)


def dropout(x: Tensor, rate: float, keys: SampleKeys | None, site: int) -> Tensor:
    """(B, ...) -> the same, each number 0 at `rate`, the others divided by what is left."""
    if not rate:
        return x
    kept = uniform(keys, site, tuple(x.shape), x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


def drop_path(x: Tensor, rate: float, keys: SampleKeys | None = None, site: int = 0) -> Tensor:
    """Stochastic depth (1603.09382): (B, Q, D) -> the same, each sample's branch dropped at `rate`.

    What is kept is divided by its probability.
    """
    if not rate:
        return x
    kept = uniform(keys, site, (x.shape[0], 1, 1), x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


def _whole(number: int) -> Tensor:
    """One number as (1,) int64."""
    return torch.tensor([number], dtype=torch.int64, device="cpu")


def hash32(x: Tensor) -> Tensor:
    """int64 -> 32 bits, every bit of the answer hanging on every bit (Ettinger's lowbias32)."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
