"""Checks of what a user passes to assert_same and damage: each mistake is one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from vitlib.errors import ConfigError

PointMap = Mapping[str, str | tuple[str, str]]


def check_module(name: str, value: object) -> None:
    """Check that a value is a module whose weights have numbers.

    Args:
        name: Name of the argument, for the message.
        value: Anything.

    Raises:
        ConfigError: It is no module, or it has no numbers.
    """
    if not isinstance(value, nn.Module):
        model = getattr(value, "model", None)
        hint = f": give its model ({name}.model)" if isinstance(model, nn.Module) else ""
        raise ConfigError(f"{name}: expected an nn.Module, got {kind_of(value)}{hint}")
    if any(parameter.is_meta for parameter in value.parameters()):
        raise ConfigError(
            f"{name}: {type(value).__name__} has weights on the meta device, without numbers: load "
            "them first"
        )


def kind_of(value: object) -> str:
    """Return the kind of a value for a message, as "a list" or "None".

    Args:
        value: Anything.
    """
    return "None" if value is None else f"a {type(value).__name__}"


def iter_batches(inputs: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the batches of the inputs.

    Args:
        inputs: A batch, or several.

    Yields:
        Batches of pixels, (B, C, H, W).

    Raises:
        ConfigError: There is none, or an item is no tensor of finite pixels.
    """
    # A mapping is iterable, by its names.
    is_single = isinstance(inputs, Tensor | Mapping | str | bytes)
    batches: Iterable[Any] = inputs if isinstance(inputs, Iterable) and not is_single else [inputs]
    batch = None
    for number, batch in enumerate(batches):
        # A data loader gives pixels and labels.
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        yield check_pixels("inputs", images, number)
    if batch is None:
        raise ConfigError("inputs: expected at least one batch of pixels, got none")


def check_pixels(name: str, images: Any, number: int = 0) -> Tensor:
    """Check that a value is a batch of pixels.

    Args:
        name: Name of the argument, for the message.
        images: Anything.
        number: Number of the batch, for the message.

    Returns:
        The pixels, (B, C, H, W); an image alone becomes a batch.

    Raises:
        ConfigError: The value is no tensor, or it has no pixels or some that are not finite.
    """
    if isinstance(images, Mapping):
        names = ", ".join(map(repr, list(images)[:3]))
        raise ConfigError(
            f"{name}: expected tensors of pixels, got {kind_of(images)} of {names}: give "
            "the pixels of it"
        )
    if not isinstance(images, Tensor):
        raise ConfigError(
            f"{name}: expected tensors of pixels, got {kind_of(images)}: give (B, C, H, W), as an "
            "ImageProcessor makes them of images"
        )
    where = f"{name}: batch {number} of shape {tuple(images.shape)}"
    if images.is_meta:
        raise ConfigError(f"{where} is on the meta device: expected pixels with numbers")
    if not images.numel():
        raise ConfigError(f"{where} is empty: expected one image or more")
    if images.is_floating_point() and not bool(images.isfinite().all()):
        raise ConfigError(f"{where} has pixels that are not finite: expected finite numbers")
    return images[None] if images.ndim == 3 else images


def check_points(points: object) -> dict[str, tuple[str, str]]:
    """Check the form of a caller's map.

    Args:
        points: Anything; None is an empty map.

    Returns:
        A pair of sources by point.

    Raises:
        ConfigError: It is no map from names to paths, or to pairs of them.
    """
    if points is None:
        return {}
    if not isinstance(points, Mapping):
        raise ConfigError(
            "points: expected a dict from points to paths of modules, such as "
            f'{{"blocks.*.resid": "layers.*"}}, got a {type(points).__name__}'
        )
    pairs: dict[str, tuple[str, str]] = {}
    for point, paths in points.items():
        if not isinstance(point, str):
            raise ConfigError(f"points: expected names of points, got {point!r}")
        pair = (paths, paths) if isinstance(paths, str) else paths
        is_pair = isinstance(pair, tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(path, str) for path in pair):
            raise ConfigError(f"points[{point!r}]={paths!r}: expected a path, or a pair of paths")
        for path in pair:
            _check_source(point, path)
        pairs[point] = pair
    return pairs


def _check_source(point: str, source: str) -> None:
    """Check that a source has the stars of its point, and known sides."""
    if ("*" in point) != ("*" in source):
        lacking = "path" if "*" in point else "point"
        raise ConfigError(
            f"points[{point!r}]={source!r}: expected `*`, the number of a block, in the {lacking} "
            "too"
        )
    for part in source.split("+"):
        _, _, side = part.strip().partition(":")
        if side not in ("", "in", "out"):
            raise ConfigError(
                f"points[{point!r}]={source!r}: expected 'path' for the output of a module, or "
                "'path:in' for its input"
            )
