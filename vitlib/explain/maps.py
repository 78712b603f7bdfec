"""Mathematics of explanations: maps from attention and features, on arrays, without a model.

Shapes: B images, H heads, T tokens (P prefix tokens, then N = h * w patches by row), Q queries,
D channels. Arguments are numpy arrays or tensors on any device; results are float32 arrays.
Sources: Abnar and Zuidema 2005.00928 (rollout); Chefer et al. 2103.15679 (relevance); Caron et al.
2104.14294 (masks of the class token's attention); Oquab et al. 2304.07193 (patch PCA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError

Array = npt.NDArray[np.float32]
Fuse = Literal["mean", "max", "min"]


def rollout(
    attention: Sequence[Any],
    *,
    fuse: Fuse = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    rows: int | None = None,
) -> Array:
    """Multiply the attention of all layers: how much of each token reaches each (2005.00928, 3).

    Args:
        attention: Probabilities of every layer, first to last, each (B, H, T, T).
        fuse: How heads become one: "mean", "max" or "min".
        residual: Share of the skip connection, 0..1; 0.5 is the paper's.
        discard: Share of each row's weakest entries that is set to 0, from 0 to below 1.
        rows: Number of leading rows to compute, Q, for much less arithmetic; None means all T.

    Returns:
        Shares, (B, Q, T). Each row sums to 1.

    Raises:
        ConfigError: An option is out of range, or the layers differ in shape.
    """
    if fuse not in ("mean", "max", "min"):
        raise ConfigError(f"fuse={fuse!r}: expected 'mean', 'max' or 'min'")
    if not 0 <= residual <= 1 or not 0 <= discard < 1:
        raise ConfigError(
            f"residual={residual}, discard={discard}: expected shares, 0..1 and 0 to below 1"
        )
    layers = [to_array(layer, 4, "attention") for layer in attention]
    _check_square(layers, "attention")

    def step(reached: Array, layer: Array) -> Array:
        fused: Array = getattr(layer, fuse)(axis=1)
        if discard:
            count = int(fused.shape[-1] * discard)
            weak = fused < np.sort(fused, axis=-1)[..., count, None]
            fused[weak] = 0
        total = fused.sum(axis=-1, keepdims=True)
        fused /= np.where(total > 0, total, 1)
        return residual * reached + (1 - residual) * (reached @ fused)

    return _backwards(layers[0].shape, layers, rows, step)


def relevance(
    attention: Sequence[Any], gradients: Sequence[Any], *, rows: int | None = None
) -> Array:
    """Compute the relevance of each token to each (2103.15679, equations 5 and 6).

    Args:
        attention: Probabilities of every layer, first to last, each (B, H, T, T).
        gradients: Gradients of the target in them, of the same shapes.
        rows: Number of leading rows to compute, Q; None means all T.

    Returns:
        Relevance, (B, Q, T), 0 or more.

    Raises:
        ConfigError: The layers differ in shape.
    """
    pairs = [
        (to_array(a, 4, "attention"), to_array(g, 4, "gradients"))
        for a, g in zip(attention, gradients, strict=True)
    ]
    _check_square([a for a, _ in pairs], "attention")

    def step(reached: Array, layer: tuple[Array, Array]) -> Array:
        # One layer at a time: the products of all layers would double the memory.
        weighed = layer[0] * layer[1]
        fused: Array = weighed.clip(min=0, out=weighed).mean(axis=1)
        return reached + reached @ fused

    return _backwards(pairs[0][0].shape, pairs, rows, step)


def _backwards(shape: tuple[int, ...], layers: Sequence[Any], rows: int | None, step: Any) -> Array:
    """Multiply layers from the last one down, so that few rows need no T x T product."""
    batch, _, tokens, _ = shape
    reached = np.broadcast_to(
        np.eye(tokens, dtype=np.float32)[:rows], (batch, rows or tokens, tokens)
    )
    for layer in reversed(layers):
        reached = step(reached, layer)
    return np.ascontiguousarray(reached, dtype=np.float32)


def patch_pca(
    features: Any, components: int = 3, *, mask: Any | None = None
) -> tuple[Array, Array]:
    """Compute the first principal components of the features of patches.

    The largest weight of a component is positive: its sign, which is arbitrary, is reproducible.

    Args:
        features: Features of one image or of several, (..., N, D).
        components: Number of components.
        mask: True for the patches that count, (..., N); the others get 0. None means all.

    Returns:
        Components, (..., N, components), each scaled to 0..1, and the share of variance of each,
        (components,).

    Raises:
        ConfigError: The mask does not match, or there are not so many components.
    """
    x = to_array(features, None, "features")
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    chosen = np.ones(len(flat), bool) if mask is None else np.asarray(mask, bool).reshape(-1)
    if len(chosen) != len(flat):
        raise ConfigError(f"mask of {len(chosen)} patches: expected {len(flat)}")
    if not 1 <= components <= min(flat.shape[1], max(chosen.sum() - 1, 1)):
        raise ConfigError(
            f"components={components}: expected 1 to {min(flat.shape[1], chosen.sum() - 1)}, as "
            "there are no more channels, or patches"
        )
    # In float64: the smallest components are differences of large, similar numbers.
    centred = flat[chosen] - flat[chosen].mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:components]
    # The SVD's signs are arbitrary.
    axes = axes * np.sign(axes[np.arange(components), np.abs(axes).argmax(axis=1)])[:, None]
    scores = centred @ axes.T
    low, high = scores.min(axis=0), scores.max(axis=0)
    result = np.zeros((len(flat), components), np.float32)
    result[chosen] = (scores - low) / np.where(high > low, high - low, 1)
    shares = sizes**2 / max((sizes**2).sum(), 1e-30)
    return result.reshape(*x.shape[:-1], components), shares[:components].astype(np.float32)


def cosine(queries: Any, features: Any) -> Array:
    """Compute the cosine similarity of each query with each feature.

    Args:
        queries: (..., Q, D).
        features: (..., N, D).

    Returns:
        Cosines, (..., Q, N), -1..1.
    """
    a, b = to_array(queries, None, "queries"), to_array(features, None, "features")
    a = a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
    b = b / np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-12)
    return np.asarray((a @ np.swapaxes(b, -1, -2)).clip(-1, 1), np.float32)


def top_mass(rows: Any, mass: float = 0.6) -> npt.NDArray[np.bool_]:
    """Select the fewest entries of each row that hold a share of its sum (2104.14294, 4.2.2).

    Args:
        rows: Non-negative rows, (..., N).
        mass: Share of the sum, above 0, at most 1; the paper's is 0.6.

    Returns:
        True for the selected entries, (..., N).

    Raises:
        ConfigError: mass is out of range.
    """
    if not 0 < mass <= 1:
        raise ConfigError(f"mass={mass}: expected a share, above 0 and at most 1")
    x = to_array(rows, None, "rows")
    order = np.argsort(-x, axis=-1, kind="stable")
    ordered = np.take_along_axis(x, order, -1).astype(np.float64)
    # The sum before an entry decides, so that the entry which reaches the share is selected.
    before = np.cumsum(ordered, axis=-1) - ordered
    selected = before < mass * ordered.sum(axis=-1, keepdims=True)
    result = np.zeros(x.shape, bool)
    np.put_along_axis(result, order, selected, -1)
    return result


def split_groups(
    features: Any, first: npt.NDArray[np.bool_], rounds: int = 20
) -> npt.NDArray[np.bool_]:
    """Split patches into two groups by their features, from a first guess.

    This is 2-means on centred features with cosine distance: each patch joins the nearer mean until
    no patch changes its group.

    Args:
        features: (N, D).
        first: True for the first guess of the group, (N,).
        rounds: Largest number of rounds.

    Returns:
        True for the patches of the group, (N,).
    """
    x = to_array(features, 2, "features")
    x = x - x.mean(axis=0)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    group = np.asarray(first, bool)
    for _ in range(rounds):
        if group.all() or not group.any():
            break
        inside, outside = (x[members].mean(axis=0) for members in (group, ~group))
        inside, outside = (v / max(float(np.linalg.norm(v)), 1e-12) for v in (inside, outside))
        nearer = x @ inside > x @ outside
        if np.array_equal(nearer, group):
            break
        group = nearer
    return group


def orient_groups(group: npt.NDArray[np.bool_], attention: Any) -> npt.NDArray[np.bool_]:
    """Turn a group into its complement where the complement has more attention a patch.

    Args:
        group: True for the patches of the group, (N,).
        attention: Attention of each patch, (N,).

    Returns:
        True for the patches of the side with the greater mean, (N,). A group of all patches or none
        is returned as it is.
    """
    x = to_array(attention, 1, "attention")
    if group.all() or not group.any():
        return group
    return group if x[group].mean() >= x[~group].mean() else ~group


def smooth(grid: Any) -> Array:
    """Smooth maps by the weights 1 2 1 along both axes; edges repeat.

    Args:
        grid: Maps, (..., h, w).

    Returns:
        The smoothed maps, (..., h, w).
    """
    x = to_array(grid, None, "grid")
    for axis in (-1, -2):
        before = np.concatenate([x.take([0], axis), x.take(range(x.shape[axis] - 1), axis)], axis)
        after = np.concatenate([x.take(range(1, x.shape[axis]), axis), x.take([-1], axis)], axis)
        x = (before + 2 * x + after) / 4
    return x


def to_array(values: Any, axes: int | None, name: str) -> Array:
    """Convert to a float32 array.

    Args:
        values: An array, a list or a tensor on any device.
        axes: Expected number of axes; None accepts any.
        name: Name of the argument, for the message.

    Returns:
        The array.

    Raises:
        ConfigError: The number of axes differs.
    """
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    array = np.asarray(values, np.float32)
    if axes is not None and array.ndim != axes:
        raise ConfigError(f"{name} of shape {array.shape}: expected {axes} axes")
    return array


def _check_square(layers: list[Array], name: str) -> None:
    """Raise ConfigError unless there are layers, all of one shape (B, H, T, T)."""
    if not layers:
        raise ConfigError(f"{name} of no layers: expected one array a layer")
    shapes = {layer.shape for layer in layers}
    shape = layers[0].shape
    if len(shapes) > 1 or shape[-1] != shape[-2]:
        raise ConfigError(
            f"{name} of shapes {sorted(shapes)}: expected (B, H, T, T), the same for every layer; "
            "that is model.attention(images)"
        )
