"""Where tokens lie, as attention is told it: rotary angles, or a bias on the scores.

Shapes: h w patches (down, across), N = h * w, T = 1 + N tokens, H num_heads, K width of a head.
Sources: Su et al. 2104.09864 and Simeoni et al. 2508.10104 (rotary, DINOv3); Bao et al. 2106.08254
(relative position bias, BEiT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.errors import ConfigError

# In torch.jit.trace, where sides of images are tensors, and any `if` on them is decided once.
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


class AttentionPosition(nn.Module):
    """What every block's attention must know of where the tokens lie."""

    def per_block(
        self, grid: tuple[int, int], device: torch.device, count: int
    ) -> Iterable[Tensor]:
        """(h, w) -> one tensor for each of `count` blocks, in order, on the device."""
        raise NotImplementedError


def build_attn_position(cfg: ViTConfig) -> AttentionPosition | None:
    """The positions that a model has beside its absolute ones, or None."""
    if cfg.rope_theta is not None:
        return RotaryEmbedding(cfg)
    return None if cfg.relative_position is None else RelativePositionBias(cfg)


class RotaryEmbedding(AttentionPosition):
    """Rotary angles over both axes of the grid, the same for every block; nothing is learned."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        assert cfg.rope_theta is not None
        self.theta, self.head_dim = cfg.rope_theta, cfg.head_dim

    def per_block(
        self, grid: tuple[int, int], device: torch.device, count: int
    ) -> Iterable[Tensor]:
        """(h, w) -> for each block the same (2, h * w, K): cosines, sines; float32."""
        return repeat(rotary_table(grid, self.head_dim, self.theta, device), count)


def rotary_table(
    grid: tuple[int, int], head_dim: int, theta: float, device: torch.device
) -> Tensor:
    """(h, w) -> (2, h * w, K): cosines and sines of each patch's angles, float32.

    The centre of each patch, -1..1 along both axes, over periods from 1 to theta; a quarter of the
    width a sign and axis, and the second half of the width repeats the first.
    """
    steps = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)
    frequencies = 1 / theta**steps
    axes = [torch.arange(0.5, n, dtype=torch.float32, device=device) / n * 2.0 - 1.0 for n in grid]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
    angles = (2 * math.pi * centres[:, :, None] * frequencies).flatten(1).tile(2)  # (N, K)
    return torch.stack((angles.cos(), angles.sin()))


class RelativePositionBias(AttentionPosition):
    """A learned score for each offset between two patches and for [CLS]; a table a block, or one.

    The last three rows are [CLS] to patch, patch to [CLS], [CLS] to itself.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.grid_size, self.resize = cfg.grid_size, cfg.relative_resize
        self.shared = cfg.relative_position == "shared"
        rows = (2 * cfg.grid_size[0] - 1) * (2 * cfg.grid_size[1] - 1) + 3
        count = 1 if self.shared else cfg.depth
        self.tables = nn.ParameterList(
            nn.Parameter(torch.zeros(rows, cfg.num_heads)) for _ in range(count)
        )

    def per_block(
        self, grid: tuple[int, int], device: torch.device, count: int
    ) -> Iterator[Tensor]:
        """(h, w) -> for each block, when it is asked for, a bias on its scores (1, H, T, T).

        Raises ConfigError where each block has a table, and there are other blocks than tables.
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
        """A table of the learned grid -> (1, H, T, T) of this one; offsets between are bilinear."""
        # torch's ONNX exporter does not decompose fused attention whose bias has a gradient.
        if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
            table = table.detach()
        return self.resize_table(table, grid)[index].permute(2, 0, 1)[None]

    def resize_table(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """A table of the learned grid -> of another (h, w), [CLS] rows as they are."""
        h, w = self.grid_size
        if grid == self.grid_size:
            if not is_tracing():
                return table
            sizes = (2 * h - 1, 2 * w - 1), (2 * grid[0] - 1, 2 * grid[1] - 1)
            return torch.cat([pin_traced_grid(table[None, :-3], *sizes)[0], table[-3:]])
        offsets = table[:-3].reshape(1, 2 * h - 1, 2 * w - 1, -1).permute(0, 3, 1, 2)
        if self.resize == "geometric":
            down, across = (
                geometric_weights(old, new).to(table.device)
                for old, new in zip(self.grid_size, grid, strict=True)
            )
            offsets = (down @ offsets.float() @ across.T).to(table.dtype)
            if is_tracing():
                sizes = (len(down), len(across)), (2 * grid[0] - 1, 2 * grid[1] - 1)
                rows = pin_traced_grid(offsets.flatten(2).transpose(1, 2), *sizes)
                return torch.cat([rows[0], table[-3:]])
        else:
            size = (2 * grid[0] - 1, 2 * grid[1] - 1)
            offsets = F.interpolate(offsets, size=size, mode="bilinear", align_corners=False)
        return torch.cat([offsets.flatten(2)[0].T, table[-3:]])


def pin_traced_grid(rows: Tensor, grid: tuple[int, int], traced: tuple[int, int]) -> Tensor:
    """(1, h * w, D) of a grid (h, w) -> the same rows, for torch.jit.trace.

    As `if` is decided once, a trace holds for the grid of the images it was made with. `traced` is
    the grid as the trace records it: the trace fails on images that have another one, also where
    the number of patches is the same.
    """
    none = rows.new_empty(0, *traced, rows.shape[-1])  # cat takes no sides of two lengths
    return torch.cat([rows.reshape(1, *grid, -1), none]).flatten(1, 2)


def geometric_weights(old: int, new: int) -> Tensor:
    """(2 new - 1, 2 old - 1): how the offsets of one axis are mixed from those of another length.

    The k-th learned offset is taken to lie at 1 + q + ... + q^(k-1), with the ratio q at which the
    last lies at the last new one; between two it is linear. As BEiT's fine-tuning places them
    (2106.08254; there with a cubic spline between), and timm.
    """
    if old == 1:
        return torch.ones(2 * new - 1, 1, dtype=torch.float32, device="cpu")
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old - 1)) / (1 - q) > new - 1 else (q, high)
    places = [0.0]
    for k in range(old - 1):
        places.append(places[-1] + q**k)
    x = torch.tensor(
        [-place for place in places[:0:-1]] + places, dtype=torch.float64, device="cpu"
    )
    wanted = torch.arange(1 - new, new, dtype=torch.float64, device="cpu")
    right = torch.searchsorted(x, wanted).clamp(1, max(len(x) - 1, 1))
    share = ((wanted - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
    weights = torch.zeros(2 * new - 1, 2 * old - 1, dtype=torch.float64, device="cpu")
    rows = torch.arange(2 * new - 1, device="cpu")
    weights[rows, right - 1] += 1 - share
    weights[rows, right] += share
    return weights.float()


def relative_index(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(h, w) -> the row of the table for each pair of tokens, (T, T), [CLS] first.

    It is made on the device, as a copy to a GPU would wait for it.
    """
    h, w = grid
    down, across = torch.arange(h, device=device), torch.arange(w, device=device)
    rows, columns = down.repeat_interleave(w), across.repeat(h)
    down = rows[:, None] - rows[None, :] + h - 1
    across = columns[:, None] - columns[None, :] + w - 1
    last = (2 * h - 1) * (2 * w - 1) + 2
    index = torch.full((h * w + 1, h * w + 1), last, device=device)
    index[0, 1:], index[1:, 0] = last - 2, last - 1
    index[1:, 1:] = down * (2 * w - 1) + across
    return index
