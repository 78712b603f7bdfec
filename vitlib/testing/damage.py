"""Broken copies of a ViT, each with one mistake that people make: negative controls of tests."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.system.torch_state import isolate_torch_settings, preserve_rng_state
from vitlib.testing.arguments import check_module, check_pixels, kind_of
from vitlib.testing.distance import TOLERANCE, relative_distance
from vitlib.testing.images import seeded_images
from vitlib.testing.mistakes import MISTAKES
from vitlib.testing.recording import evaluating, to_module
from vitlib.vit import ViT

_LEAST_CHANGE = 10 * TOLERANCE  # of the largest output; a smaller one looks like rounding


def damage(model: ViT, images: Tensor | None = None) -> Iterator[tuple[str, ViT]]:
    """Break copies of a model, which a test must notice.

    The damage is to the middle block, to positions, to the final norm or to the head. Kinds that
    the model cannot have are left out, and those that change its output by less than 5e-5 of the
    largest value, as the sign of a bias of zeros: no test can tell them from rounding.

    Args:
        model: The model, which is not changed.
        images: Normalised pixels, (B, C, H, W), for which the output changes; None takes one of
            the model's size with seeded noise.

    Returns:
        An iterator of names such as "swapped q and k", and broken copies, in the mode of the model.

    Raises:
        ConfigError: The model is no ViT of vitlib, or the images are no pixels.
    """
    # Not in the iterator, which runs no line before its first item is taken.
    if not isinstance(model, ViT):
        raise ConfigError(
            f"model: expected a ViT of vitlib, got {kind_of(model)}: give the ViT that it is "
            "made of, and make it again from each broken copy"
        )
    check_module("model", model)
    pixels = seeded_images(model.config)[:1] if images is None else images
    return _iter_broken(model, check_pixels("images", pixels))


def _iter_broken(model: ViT, pixels: Tensor) -> Iterator[tuple[str, ViT]]:
    """Yield the broken copies whose output for the pixels is another."""
    expected = _run(model, pixels)
    for name, apply in MISTAKES.items():
        # A copy of all weights: training a broken model leaves the model as it is.
        broken = copy.deepcopy(model)
        with torch.no_grad():
            is_broken = apply(broken)
        if is_broken and _changes(expected, _run(broken, pixels)):
            yield name, broken


@isolate_torch_settings()
@preserve_rng_state()
@torch.no_grad()
def _run(model: ViT, images: Tensor) -> Tensor:
    """Compute the output of a model in eval mode."""
    with evaluating(model):
        output: Tensor = model(to_module(model, images))
    return output.double()


def _changes(expected: Tensor, output: Tensor) -> bool:
    """Return True if an output has changed by more than rounding."""
    return relative_distance(output, expected) > _LEAST_CHANGE
