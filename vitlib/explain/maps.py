"""What attention and features say of an image: mathematics on arrays, no model.

Shapes: B images, H heads, T tokens (P prefix tokens, then N = h * w patches by row), Q of them that
ask, D channels. Arrays are numpy's or tensors; float32 comes out.
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
    """Attention of every layer, first to last, each (B, H, T, T) -> how much of each token reaches
    each through all of them, (B, T, T); rows sum to 1 (2005.00928, section 3).

    fuse: how heads become one. residual: the share of the skip connection, 0..1; the paper's 0.5.
    discard: the share of each row's weakest entries that is left out, 0..1. rows: only the first so
    many tokens' (B, Q, T), for much less arithmetic.
    """
    if fuse not in ("mean", "max", "min"):
        raise ConfigError(f"fuse={fuse!r}: expected 'mean', 'max' or 'min'")
    if not 0 <= residual <= 1 or not 0 <= discard < 1:
        raise ConfigError(
            f"residual={residual}, discard={discard}: expected shares, 0..1 and 0 to below 1"
        )
    layers = [to_array(layer, 4, "attention") for layer in attention]
    _same_square(layers, "attention")

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
    """Attention of every layer and the target's gradient in it, each (B, H, T, T) -> how much each
    token counts for each, (B, T, T), 0 or more (2103.15679, equations 5 and 6).

    rows: only the first so many tokens' (B, Q, T).
    """
    pairs = [
        (to_array(a, 4, "attention"), to_array(g, 4, "gradients"))
        for a, g in zip(attention, gradients, strict=True)
    ]
    _same_square([a for a, _ in pairs], "attention")

    def step(reached: Array, layer: tuple[Array, Array]) -> Array:
        weighed = layer[0] * layer[1]  # of one layer at a time: all of them take as much again
        fused: Array = weighed.clip(min=0, out=weighed).mean(axis=1)
        return reached + reached @ fused

    return _backwards(pairs[0][0].shape, pairs, rows, step)


def _backwards(shape: tuple[int, ...], layers: Sequence[Any], rows: int | None, step: Any) -> Array:
    """Rows of the product of all layers, taken from the last one down: no T x T product where few
    rows are asked."""
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
    """Features of patches (..., N, D), of one image or of several together -> their first principal
    components (..., N, components), each scaled to 0..1, and the share of variance of each.

    mask: (..., N) booleans, the patches that count; the others get 0. The sign of a component is
    such that its largest weight is positive, so that a picture can be made again.
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
    centred = flat[chosen] - flat[chosen].mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:components]
    axes = axes * np.sign(axes[np.arange(components), np.abs(axes).argmax(axis=1)])[:, None]
    scores = centred @ axes.T
    low, high = scores.min(axis=0), scores.max(axis=0)
    found = np.zeros((len(flat), components), np.float32)
    found[chosen] = (scores - low) / np.where(high > low, high - low, 1)
    shares = sizes**2 / max((sizes**2).sum(), 1e-30)
    return found.reshape(*x.shape[:-1], components), shares[:components].astype(np.float32)


def cosine(queries: Any, features: Any) -> Array:
    """Vectors (..., Q, D) and (..., N, D) -> the cosine of each with each, (..., Q, N), -1..1."""
    a, b = to_array(queries, None, "queries"), to_array(features, None, "features")
    a = a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
    b = b / np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-12)
    return np.asarray((a @ np.swapaxes(b, -1, -2)).clip(-1, 1), np.float32)


def top_mass(rows: Any, mass: float = 0.6) -> npt.NDArray[np.bool_]:
    """Non-negative rows (..., N) -> in each the fewest entries that hold `mass` of its sum
    (2104.14294, section 4.2.2, with its 0.6)."""
    if not 0 < mass <= 1:
        raise ConfigError(f"mass={mass}: expected a share, above 0 and at most 1")
    x = to_array(rows, None, "rows")
    order = np.argsort(-x, axis=-1, kind="stable")
    ordered = np.take_along_axis(x, order, -1).astype(np.float64)
    before = np.cumsum(ordered, axis=-1) - ordered
    kept = before < mass * ordered.sum(axis=-1, keepdims=True)
    found = np.zeros(x.shape, bool)
    np.put_along_axis(found, order, kept, -1)
    return found


def split_groups(
    features: Any, first: npt.NDArray[np.bool_], rounds: int = 20
) -> npt.NDArray[np.bool_]:
    """Features (N, D), a first guess (N,) -> the group that grew from it: each goes to the nearer
    mean, by the cosine of what is left without all's mean, until none moves."""
    x = to_array(features, 2, "features")
    x = x - x.mean(axis=0)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    mine = np.asarray(first, bool)
    for _ in range(rounds):
        if mine.all() or not mine.any():
            break
        inside, outside = (x[group].mean(axis=0) for group in (mine, ~mine))
        inside, outside = (v / max(float(np.linalg.norm(v)), 1e-12) for v in (inside, outside))
        moved = x @ inside > x @ outside
        if np.array_equal(moved, mine):
            break
        mine = moved
    return mine


def smooth(grid: Any) -> Array:
    """Maps (..., h, w) -> each patch the mean with its neighbours', weighed 1 2 1 both ways; edges
    repeat."""
    x = to_array(grid, None, "grid")
    for axis in (-1, -2):
        before = np.concatenate([x.take([0], axis), x.take(range(x.shape[axis] - 1), axis)], axis)
        after = np.concatenate([x.take(range(1, x.shape[axis]), axis), x.take([-1], axis)], axis)
        x = (before + 2 * x + after) / 4
    return x


def to_array(values: Any, axes: int | None, name: str) -> Array:
    """A numpy array or a tensor anywhere -> float32 of numpy's. Raises ConfigError for what it is
    not."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    array = np.asarray(values, np.float32)
    if axes is not None and array.ndim != axes:
        raise ConfigError(f"{name} of shape {array.shape}: expected {axes} axes")
    return array


def _same_square(layers: list[Array], name: str) -> None:
    if not layers:
        raise ConfigError(f"{name} of no layers: expected one array a layer")
    shapes = {layer.shape for layer in layers}
    shape = layers[0].shape
    if len(shapes) > 1 or shape[-1] != shape[-2]:
        raise ConfigError(
            f"{name} of shapes {sorted(shapes)}: expected (B, H, T, T), the same for every layer; "
            "that is model.attention(images)"
        )
