"""Positions inside attention: rotary embeddings, or a learned bias of the scores.

Shapes: h w patches (down, across), N = h * w, T = 1 + N tokens, H num_heads, K width of a head.
Sources: Su et al. 2104.09864, Heo et al. 2403.13298 and Simeoni et al. 2508.10104 (rotary); Bao et
al. 2106.08254 (relative position bias, BEiT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.config_parts import Rope
from vitlib.errors import ConfigError

# True inside torch.jit.trace. There sides of images are tensors, and each `if` is decided once.
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


class AttentionPosition(nn.Module):
    """Base of the positions that attention takes in every block."""

    def per_block(
        self, grid: tuple[int, int], device: torch.device, count: int
    ) -> Iterable[Tensor]:
        """Compute `attn_pos` of each block.

        Args:
            grid: Patches down and across, (h, w).
            device: Device of the result.
            count: Number of blocks.

        Returns:
            One tensor for each block, in order.
        """
        raise NotImplementedError


def build_attn_position(cfg: ViTConfig) -> AttentionPosition | None:
    """Build the positions that attention takes.

    Args:
        cfg: The model's config.

    Returns:
        The module; None for a model whose only positions are added to the patch embedding.
    """
    if cfg.rope is not None:
        return LearnedRotaryEmbedding(cfg) if cfg.rope.learned else RotaryEmbedding(cfg)
    return None if cfg.positions.relative is None else RelativePositionBias(cfg)


class RotaryEmbedding(AttentionPosition):
    """Rotary angles over both axes of the grid, the same in every block.

    Nothing is learned, but where the class token has angles (MLCD): these are `cls_angles`.

    Args:
        cfg: The model's config, with rope.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        assert cfg.rope is not None
        self.rope, self.head_dim = cfg.rope, cfg.head_dim
        self.register_grid = (math.isqrt(cfg.tokens.registers),) * 2
        self.cls_angles: nn.Parameter | None = None
        if cfg.rope.class_token:
            self.cls_angles = nn.Parameter(torch.empty(1, cfg.head_dim // 2, dtype=torch.float32))
            nn.init.normal_(self.cls_angles)

    def per_block(
        self, grid: tuple[int, int], device: torch.device, count: int
    ) -> Iterable[Tensor]:
        """Compute the rotary table once, for every block.

        Args:
            grid: Patches down and across, (h, w).
            device: Device of the result.
            count: Number of blocks.

        Returns:
            For each block the same cosines and sines, (2, N, K), float32. Rows of the class token
            (MLCD) or of registers (ViT-5) stand before those of patches.
        """
        angles = [rotary_angles(grid, self.head_dim, self.rope, device)]
        if (rope := self.rope.register_rope) is not None:
            angles.insert(0, rotary_angles(self.register_grid, self.head_dim, rope, device))
        if self.cls_angles is not None:
            angles.insert(0, self.cls_angles.float())
        return repeat(rotary_table(torch.cat(angles)), count)


class LearnedRotaryEmbedding(AttentionPosition):
    """Rotary angles whose frequencies are learned for each block and head (2403.13298).

    A frequency has a part for each axis, so that pairs of channels turn along any direction.

    Args:
        cfg: The model's config, with rope.learned.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        assert cfg.rope is not None
        self.rope, self.head_dim = cfg.rope, cfg.head_dim
        # Two right angles a head, in a random direction, as RoPE-ViT draws them.
        steps = torch.arange(0, 1, 4 / cfg.head_dim, dtype=torch.float32)
        direction = 2 * math.pi * torch.rand(cfg.depth, cfg.num_heads, 1)
        directions = torch.cat([direction, direction + math.pi / 2], dim=-1)[..., None]
        both = torch.stack([directions.cos(), directions.sin()]) / cfg.rope.theta**steps
        self.freqs = nn.Parameter(both.flatten(3))

    def per_block(
        self, grid: tuple[int, int], device: torch.device, count: int
    ) -> Iterator[Tensor]:
        """Compute the rotary table of each block when the block asks for it.

        Args:
            grid: Patches down and across, (h, w).
            device: Device of the result.
            count: Number of blocks.

        Returns:
            Cosines and sines of each block, (2, H, N, K), float32.

        Raises:
            ConfigError: There are more or fewer blocks than frequencies.
        """
        if self.freqs.shape[1] != count:
            raise ConfigError(
                f"{count} blocks and rotary frequencies of {self.freqs.shape[1]}: give "
                "model.attn_position.freqs the frequencies of these blocks, (2, blocks, heads, "
                f"{self.head_dim // 2})"
            )
        x, y = rotary_coordinates(grid, self.rope, device).unbind(1)
        return (
            rotary_table(x[:, None] * fx[:, None] + y[:, None] * fy[:, None])
            for fx, fy in self.freqs.float().unbind(1)
        )


def rotary_coordinates(grid: tuple[int, int], rope: Rope, device: torch.device) -> Tensor:
    """Compute the coordinates of each patch that rotary angles are multiples of.

    Args:
        grid: Patches down and across, (h, w).
        rope: Kind of the coordinates, and order of the axes.
        device: Device of the result.

    Returns:
        Coordinates of the patches in row-major order, (N, 2), float32.
    """
    counts = [torch.arange(n, dtype=torch.float32, device=device) for n in grid]
    if rope.coords == "centers":
        axes = [(i + 0.5) / n * 2.0 - 1.0 for i, n in zip(counts, grid, strict=True)]
    else:
        axes = [i + rope.offset for i in counts]
        if rope.reference_grid is not None:
            sides = zip(axes, grid, rope.reference_grid, strict=True)
            axes = [i / n * reference for i, n, reference in sides]
    both = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return both if rope.axes == "ij" else both.flip(1)


def rotary_angles(grid: tuple[int, int], head_dim: int, rope: Rope, device: torch.device) -> Tensor:
    """Compute the rotary angles of each patch (2104.09864, 2508.10104).

    An angle is a coordinate times a frequency. A half of the pairs of channels belongs to each
    axis.

    Args:
        grid: Patches down and across, (h, w).
        head_dim: Width of a head, K, a multiple of 4.
        rope: Coordinates and periods.
        device: Device of the result.

    Returns:
        Angles, (N, K / 2), float32.
    """
    steps = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)
    frequencies = 1 / rope.theta**steps
    coordinates = rotary_coordinates(grid, rope, device)
    if rope.coords == "centers":
        coordinates = 2 * math.pi * coordinates
    return (coordinates[:, :, None] * frequencies).flatten(1)


def rotary_table(angles: Tensor) -> Tensor:
    """Compute cosines and sines for both halves of the channels, which turn by the same angles.

    Args:
        angles: Angles of pairs of channels, (..., N, K / 2).

    Returns:
        Cosines and sines, (2, ..., N, K), in the dtype of the angles.
    """
    return torch.stack((angles.cos(), angles.sin())).tile(2)


def apply_rope(x: Tensor, first: int, attn_pos: Tensor) -> Tensor:
    """Rotate patch tokens by their angles: first half of the channels with the second (2508.10104).

    Computed in float32 whatever the dtype of x: angles rounded to bfloat16 would move patches.

    Args:
        x: Queries or keys of one attention, (B, H, Q, K).
        first: Index of the first patch token; class tokens and registers before it have no
            position and stay as they are.
        attn_pos: Cosines and sines of the patches, (2, N, K), or of each head, (2, H, N, K);
            float32.

    Returns:
        The rotated queries or keys, (B, H, Q, K), in the dtype of x.
    """
    patches = x[:, :, first:]
    cos, sin = attn_pos[..., : patches.shape[2], :].unbind()
    left, right = patches.chunk(2, dim=-1)
    rotated = patches * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((x[:, :, :first], rotated.to(x.dtype)), dim=2)


class RelativePositionBias(AttentionPosition):
    """Learned bias of the scores for each offset between two tokens (2106.08254).

    There is a table for each block, or one for all. A row of a table belongs to an offset between
    patches; the last three belong to [CLS] to patch, patch to [CLS], and [CLS] to itself.

    Args:
        cfg: The model's config, with relative_position.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.grid_size, self.resize = cfg.grid_size, cfg.positions.relative_resize
        self.shared = cfg.positions.relative == "shared"
        rows = (2 * cfg.grid_size[0] - 1) * (2 * cfg.grid_size[1] - 1) + 3
        count = 1 if self.shared else cfg.depth
        self.tables = nn.ParameterList(
            nn.Parameter(torch.zeros(rows, cfg.num_heads)) for _ in range(count)
        )

    def per_block(
        self, grid: tuple[int, int], device: torch.device, count: int
    ) -> Iterator[Tensor]:
        """Compute the bias of each block when the block asks for it.

        Args:
            grid: Patches down and across, (h, w).
            device: Device of the result.
            count: Number of blocks.

        Returns:
            Biases of the scores, each (1, H, T, T). They are computed one at a time: all of them
            together take as much memory as many layers.

        Raises:
            ConfigError: Each block has a table, and there are more or fewer blocks than tables.
        """
        if not self.shared and len(self.tables) != count:
            raise ConfigError(
                f"{count} blocks and {len(self.tables)} tables of relative positions, one a block: "
                "give model.attn_position.tables = nn.ParameterList(...) the tables of these blocks"
            )
        index = relative_index(grid, device)
        biases = (self.bias(table, grid, index) for table in self.tables)
        return repeat(next(biases), count) if self.shared else biases

    def bias(self, table: Tensor, grid: tuple[int, int], index: Tensor) -> Tensor:
        """Look up the bias of each pair of tokens.

        Args:
            table: Learned rows, one an offset on the learned grid and a column a head.
            grid: Patches down and across, (h, w).
            index: Row of each pair of tokens, (T, T), from `relative_index`.

        Returns:
            Bias of the scores, (1, H, T, T).
        """
        # torch's ONNX exporter does not decompose fused attention whose bias has a gradient.
        if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
            table = table.detach()
        return self.resize_table(table, grid)[index].permute(2, 0, 1)[None]

    def resize_table(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """Resample a table of the learned grid to another grid.

        Args:
            table: Learned rows, ((2h - 1)(2w - 1) + 3, H) of the learned grid.
            grid: Patches down and across of the new grid, (h, w).

        Returns:
            Rows of the new grid; the three rows of [CLS] are unchanged.
        """
        (h, w), size = self.grid_size, (2 * grid[0] - 1, 2 * grid[1] - 1)
        if grid == self.grid_size:
            if not is_tracing():
                return table
            rows = pin_traced_grid(table[None, :-3], (2 * h - 1, 2 * w - 1), size)
            return torch.cat([rows[0], table[-3:]])
        offsets = table[:-3].reshape(1, 2 * h - 1, 2 * w - 1, -1).permute(0, 3, 1, 2)
        if self.resize == "geometric":
            sizes = zip(self.grid_size, grid, strict=True)
            axes = [geometric_weights(geometric_points(old, new), new) for old, new in sizes]
            down, across = (weights.to(table.device) for weights in axes)
            offsets = (down @ offsets.float() @ across.T).to(table.dtype)
            if is_tracing():
                rows = offsets.flatten(2).transpose(1, 2)
                rows = pin_traced_grid(rows, (len(down), len(across)), size)
                return torch.cat([rows[0], table[-3:]])
        else:
            offsets = F.interpolate(offsets, size=size, mode="bilinear", align_corners=False)
        return torch.cat([offsets.flatten(2)[0].T, table[-3:]])


def pin_traced_grid(rows: Tensor, grid: tuple[int, int], traced: tuple[int, int]) -> Tensor:
    """Make a trace fail on images of another grid than it was made with.

    torch.jit.trace decides each `if` once, so a trace is right for one grid. It fails on other
    grids even where the number of patches is the same.

    Args:
        rows: Rows of the grid, (1, h * w, D).
        grid: Sides of the grid, (h, w).
        traced: The same sides as the trace records them, which are tensors.

    Returns:
        The same rows, (1, h * w, D).
    """
    # An empty tensor of the traced sides: cat refuses it where they differ from the grid's.
    empty = rows.new_empty(0, *traced, rows.shape[-1])
    return torch.cat([rows.reshape(1, *grid, -1), empty]).flatten(1, 2)


def geometric_points(old: int, new: int) -> Tensor:
    """Compute the points of one axis at which the learned offsets of a table are taken to lie.

    The k-th one lies at 1 + q + ... + q^(k-1), with the ratio q at which the last one lies at the
    last new offset. BEiT's code does so (2106.08254; a cubic spline between), and so does timm.

    Args:
        old: Patches along the axis of the learned grid.
        new: Patches along the axis of the new grid.

    Returns:
        Points in ascending order, (2 old - 1), float64.
    """
    # Bisection for q, with the bounds and the precision of BEiT's code.
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old - 1)) / (1 - q) > new - 1 else (q, high)
    points = list(accumulate((q**k for k in range(old - 1)), initial=0.0))
    return torch.tensor([-x for x in points[:0:-1]] + points, dtype=torch.float64, device="cpu")


def geometric_weights(points: Tensor, new: int) -> Tensor:
    """Compute weights that resample the offsets of one axis, linear between two learned ones.

    Args:
        points: Points of the learned offsets, from `geometric_points`, (2 old - 1).
        new: Patches along the axis of the new grid.

    Returns:
        Weights, (2 new - 1, 2 old - 1), float32.
    """
    new_offsets = torch.arange(1 - new, new, device=points.device).to(points)
    offsets = new_offsets.clamp(points[0], points[-1])[:, None]
    rising, ones = (offsets - points[:-1]) / points.diff(), torch.ones_like(offsets)
    # Each learned offset has a hat: 1 at its point, and 0 at both neighbours.
    hats = torch.minimum(torch.cat([ones, rising], dim=1), torch.cat([1 - rising, ones], dim=1))
    return hats.clamp(0, 1).float()


def relative_index(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Compute the table's row for each pair of tokens, [CLS] first.

    Args:
        grid: Patches down and across, (h, w).
        device: Device of the result. It is computed there: a copy would make a GPU wait.

    Returns:
        Rows, (T, T) int64.
    """
    h, w = grid
    patches = torch.arange(h * w, device=device)
    rows, columns = patches // w, patches - patches // w * w
    down = rows[:, None] - rows[None, :] + h - 1
    across = columns[:, None] - columns[None, :] + w - 1
    last = (2 * h - 1) * (2 * w - 1) + 2
    index = torch.full((h * w + 1, h * w + 1), last, device=device)
    index[0, 1:], index[1:, 0] = last - 2, last - 1
    index[1:, 1:] = down * (2 * w - 1) + across
    return index
