"""Dropout and stochastic depth from counter-based random numbers.

Each draw is a function of (key of the sample, site in the model, index in the tensor), as in
counter-based generators (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011). Draws
of a sample therefore do not depend on the batch it is in. Two processes with half a batch each, a
resumed run and a block recomputed for its gradient draw what one process draws, on any device.

Shapes: B samples, Q tokens, D embed_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SITES = 8  # random sites reserved for each block, and for the patch embedding
_MASK = 0xFFFFFFFF
_STEP = 0x9E3779B9  # 2**32 divided by the golden ratio: it spreads consecutive counters


class SampleKeys(NamedTuple):
    """Random keys of a batch, as one module uses them.

    Attributes:
        keys: (B,) int64, one of each sample; see `sample_keys`.
        first: The module's first random site.
    """

    keys: Tensor
    first: int


def set_keys(model: Any, keys: Tensor | None) -> None:
    """Make every draw of a ViT depend on these keys.

    Args:
        model: A ViT. Modules that a user put in keep their own random numbers.
        keys: (B,) int64 from `sample_keys`; None returns to torch's global generator.
    """
    for index, part in enumerate([model.patch_embed, *model.blocks]):
        module_keys = None if keys is None else SampleKeys(keys, index * SITES)
        for module in (part, getattr(part, "attn", None)):
            if module is not None:
                module.dropout_keys = module_keys


def sample_keys(seed: int, epoch: int, samples: Sequence[int]) -> Tensor:
    """Derive a key for each sample.

    Args:
        seed: Seed of the run; its lowest 64 bits count.
        epoch: Number of the epoch, from 0.
        samples: Indices of the samples in the data set.

    Returns:
        Keys, (B,) int64 in 0..2**32 - 1, on the CPU.
    """
    # Two words: a seed of more than 32 bits must not lose its upper half.
    run_key = hash32(_int64(seed & _MASK) ^ hash32(_int64((seed >> 32) & _MASK)))
    epoch_key = hash32(run_key + epoch * _STEP)
    indices = torch.as_tensor(samples, dtype=torch.int64, device="cpu")
    return hash32(epoch_key + indices * _STEP)


def uniform(
    keys: SampleKeys | None, site: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Draw uniform numbers in 0..1, without 1.

    Args:
        keys: Keys of the batch; None draws from torch's global generator.
        site: Random site within the module, below SITES.
        shape: Shape of the result, (B, ...).
        device: Device of the result.

    Returns:
        Numbers of the given shape, float32.

    Raises:
        ValueError: There are more or fewer keys than samples.
    """
    if keys is None:
        return torch.rand(shape, dtype=torch.float32, device=device)
    samples = keys.keys.to(device)
    if samples.shape[0] != shape[0]:
        raise ValueError(f"keys of {samples.shape[0]} samples for a batch of {shape[0]}")
    site_keys = hash32(samples + (keys.first + site + 1) * _STEP)
    counters = torch.arange(math.prod(shape[1:]), device=device) * _STEP
    # float32 holds 24 bits exactly: with more, rounding could give 1.
    bits = hash32(site_keys[:, None] + counters) >> 8
    return bits.to(torch.float32).mul_(2**-24).view(shape)


def dropout(x: Tensor, rate: float, keys: SampleKeys | None, site: int) -> Tensor:
    """Set numbers to 0 at a rate and divide the others by 1 - rate (1207.0580).

    Args:
        x: Activations, (B, ...).
        rate: Probability of 0, from 0 to below 1.
        keys: Keys of the batch, see `uniform`.
        site: Random site within the module.

    Returns:
        The activations after dropout, (B, ...).
    """
    if not rate:
        return x
    mask = uniform(keys, site, tuple(x.shape), x.device) >= rate
    return x * (mask / (1 - rate)).to(x.dtype)


def drop_path(x: Tensor, rate: float, keys: SampleKeys | None = None, site: int = 0) -> Tensor:
    """Apply stochastic depth (1603.09382): drop the whole branch of a sample at a rate.

    The branches of the other samples are divided by 1 - rate.

    Args:
        x: Output of a branch, (B, Q, D).
        rate: Probability of dropping, from 0 to below 1.
        keys: Keys of the batch, see `uniform`.
        site: Random site within the module.

    Returns:
        The output of the branch, (B, Q, D).
    """
    if not rate:
        return x
    mask = uniform(keys, site, (x.shape[0], 1, 1), x.device) >= rate
    return x * (mask / (1 - rate)).to(x.dtype)


def _int64(number: int) -> Tensor:
    """Return a number as a tensor, (1,) int64."""
    return torch.tensor([number], dtype=torch.int64, device="cpu")


def hash32(x: Tensor) -> Tensor:
    """Hash to 32 bits, each of which depends on every input bit (Ettinger's lowbias32).

    Args:
        x: Integers of any shape, int64; their lowest 32 bits count.

    Returns:
        Hashes of the same shape, int64 in 0..2**32 - 1.
    """
    # In int64, as torch has no uint32 product: 32 x 31 bits do not overflow its 63.
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
