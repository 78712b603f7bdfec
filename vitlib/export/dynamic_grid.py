"""Positions of any grid: an exported file computes them from the size of its input.

How data flows: the sides of the input, which torch.export knows as symbols -> a matrix for each
axis of the grid (axis_matrices.py) -> the learned positions resampled by the checkpoint's rule. On
the learned grid both matrices are the identity, so that the positions are the learned ones. Rotary
tables need no matrix: positions.py computes them from the sides, whatever these are.

Shapes: B images, C channels, H W pixels, h w patches (down, across), N = h * w, D embed_dim,
K class tokens, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from vitlib.errors import ConfigError
from vitlib.export.axis_matrices import (
    count_points,
    has_matrix,
    identity_matrix,
    resize_matrix,
)
from vitlib.fast.module_swap import copy_with_children
from vitlib.patch_embed import (
    POSITION_RESIZE,
    PatchEmbed,
    ResizeRule,
    compute_sincos_positions,
)
from vitlib.positions import (
    AttentionPosition,
    LearnedRotaryEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
    geometric_points,
    geometric_weights,
    relative_index,
)
from vitlib.vit import ViT

# Patches down or across that a file takes: torch.export states a largest size, and BEiT's
# geometric rule needs a row of points for each.
MAX_PATCHES = 256
Grid = tuple[int, int]
# Learned positions (old h, old w, D), and the new grid -> positions (N, D).
Resize = Callable[[Tensor, Grid], Tensor]


class DynamicPatchEmbed(PatchEmbed):
    """A patch embedding that resamples its positions by matrices, for any grid."""

    def patch_grid(self, images: Tensor) -> Grid:
        """Count the patches down and across without checks: the sides are symbols.

        Args:
            images: Normalised pixels, (B, C, H, W).

        Returns:
            Patches down and across, (h, w).
        """
        (p, q), (height, width) = self.patch_size, images.shape[2:]
        # As torch counts the steps of a convolution, so that it sees equal shapes.
        return (height - p) // p + 1, (width - q) // q + 1

    def resize_pos_embed(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Resample the position embeddings to a grid.

        Args:
            grid: Patches down and across, (h, w).

        Returns:
            Position embeddings of the class tokens, (1, K, D), and of the patches, (1, N, D).
        """
        assert self.pos_embed is not None
        first = self.num_prefix_positions
        learned = self.pos_embed[0, first:].reshape(*self.grid_size, -1)
        return self.pos_embed[:, :first], choose_resize(self.position_resize)(learned, grid)[None]


class DynamicRelativeBias(AttentionPosition):
    """Relative position biases whose tables are resampled by matrices, for any grid.

    Args:
        source: The biases of the learned grid, whose tables are shared.
    """

    def __init__(self, source: RelativePositionBias) -> None:
        super().__init__()
        self.grid_size, self.resize, self.shared = source.grid_size, source.resize, source.shared
        self.tables = source.tables
        if self.resize not in ("bilinear", "geometric"):
            raise ConfigError(_describe_refusal(f"relative_resize={self.resize!r}"))
        if self.resize == "geometric":
            for axis, old in enumerate(self.grid_size):
                points = [geometric_points(old, max(new, 1)) for new in range(MAX_PATCHES + 1)]
                self.register_buffer(f"points{axis}", torch.stack(points))

    def per_block(self, grid: Grid, device: torch.device, count: int) -> Iterable[Tensor]:
        """Compute the bias of each block.

        Args:
            grid: Patches down and across, (h, w).
            device: Device of the result.
            count: Number of blocks.

        Returns:
            Biases of the scores, each (1, H, T, T).
        """
        matrices, index = self._compute_matrices(grid), relative_index(grid, device)
        biases = [self._look_up(table.detach(), matrices, index) for table in self.tables]
        return repeat(biases[0], count) if self.shared else biases

    def _compute_matrices(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Compute the matrix of each axis, (2 new - 1, 2 old - 1)."""
        if self.resize == "geometric":
            down, across = (self._compute_geometric(axis, new) for axis, new in enumerate(grid))
        else:
            rule = ResizeRule("bilinear")
            sizes = zip(self.grid_size, grid, strict=True)
            down, across = (resize_matrix(2 * old - 1, 2 * new - 1, rule) for old, new in sizes)
        return select_learned(self.grid_size, grid, (down, across))

    def _compute_geometric(self, axis: int, new: int) -> Tensor:
        """Compute the matrix of the geometric rule, (2 new - 1, 2 old - 1)."""
        # A tensor picks the row: torch.export would make a constant of a number.
        points = self.get_buffer(f"points{axis}").index_select(0, count_points(new)[None])[0]
        return geometric_weights(points, new)

    def _look_up(self, table: Tensor, matrices: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
        """Look up the bias of each pair of tokens in a resampled table, (1, H, T, T)."""
        h, w = self.grid_size
        rows = apply_matrices(matrices, table[:-3].reshape(2 * h - 1, 2 * w - 1, -1))
        return torch.cat([rows, table[-3:]])[index].permute(2, 0, 1)[None]


def resize_in_graph(model: ViT) -> dict[str, nn.Module | None]:
    """Make the modules that compute the positions of any grid.

    Args:
        model: The model, which is only read.

    Returns:
        The modules `patch_embed` and `attn_position`, which share the weights of the model.

    Raises:
        ConfigError: The positions cannot be computed for any grid.
    """
    if model.patch_embed.pos_embed is not None:
        choose_resize(model.patch_embed.position_resize)
    embed = copy_with_children(model.patch_embed, dict(model.patch_embed._modules))
    embed.__class__ = DynamicPatchEmbed
    source = model.attn_position
    if isinstance(source, RelativePositionBias):
        return {"patch_embed": embed, "attn_position": DynamicRelativeBias(source)}
    if not isinstance(source, RotaryEmbedding | LearnedRotaryEmbedding | None):
        raise ConfigError(_describe_refusal(f"{type(source).__name__}"))
    return {"patch_embed": embed, "attn_position": source}


def choose_resize(name: str) -> Resize:
    """Return the function that resamples positions by a rule.

    Args:
        name: Name of the rule: "sincos", or a key of POSITION_RESIZE.

    Returns:
        The function.

    Raises:
        ConfigError: The rule cannot be computed for any grid.
    """
    if name == "sincos":
        return _recompute
    rule = next((rule for key, rule in POSITION_RESIZE.items() if key == name), None)
    if rule is None or not has_matrix(rule):
        raise ConfigError(_describe_refusal(f"position_resize={name!r}"))
    return partial(_interpolate, rule=rule)


def select_learned(old: Grid, new: Grid, matrices: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Replace the matrices of both axes by the identity where the grid is the learned one.

    Args:
        old: Patches down and across of the learned grid.
        new: Patches down and across of the new grid.
        matrices: A matrix for each axis.

    Returns:
        A matrix for each axis.
    """
    is_learned = _equals(old, new)
    kept = (identity_matrix(m.shape[1], m.shape[0]) for m in matrices)
    down, across = (torch.where(is_learned, *pair) for pair in zip(kept, matrices, strict=True))
    return down, across


def apply_matrices(matrices: tuple[Tensor, Tensor], values: Tensor) -> Tensor:
    """Resample both axes of a grid.

    Args:
        matrices: A matrix for each axis, (h, old h) and (w, old w).
        values: Values on the old grid, (old h, old w, D).

    Returns:
        Values on the new grid in row-major order, (N, D).
    """
    down, across = matrices
    rows = (down @ values.flatten(1)).reshape(-1, *values.shape[1:])
    return (across @ rows).flatten(0, 1)


def _interpolate(learned: Tensor, grid: Grid, rule: ResizeRule) -> Tensor:
    """Resample positions by an interpolation, (old h, old w, D) -> (N, D)."""
    old = learned.shape[0], learned.shape[1]
    # The grid may be a part of the square of its longer side.
    is_part = rule._asdict().get("square", False)
    spread = torch.maximum(*(count_points(n) for n in grid)) if is_part else None
    sizes = zip(old, grid, strict=True)
    down, across = (resize_matrix(m, n, rule, spread) for m, n in sizes)
    return apply_matrices(select_learned(old, grid, (down, across)), learned)


def _recompute(learned: Tensor, grid: Grid) -> Tensor:
    """Compute positions anew on all grids but the learned one, (old h, old w, D) -> (N, D)."""
    old = learned.shape[0], learned.shape[1]
    down, across = (identity_matrix(m, n) for m, n in zip(old, grid, strict=True))
    computed = compute_sincos_positions(grid, learned.shape[-1])[0].to(learned)
    return torch.where(_equals(old, grid), apply_matrices((down, across), learned), computed)


def _equals(old: Grid, new: Grid) -> Tensor:
    """Compare the learned grid with one whose sides may be symbols, a bool scalar."""
    return (count_points(new[0]) == old[0]) & (count_points(new[1]) == old[1])


def _describe_refusal(kind: str) -> str:
    """Explain that positions of a kind have no form for any size."""
    return (
        f"{kind}: no file can compute these positions for images of any size: export the sizes "
        "that you use, one a file (image_size=, --image-size)"
    )
