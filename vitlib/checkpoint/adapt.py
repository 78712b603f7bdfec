"""Adapt tensors to another image size, to another patch, to other channels, or to one dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.checkpoint.layouts.infer import SIZE_REMEDY
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError
from vitlib.image.processor import ImageProcessor
from vitlib.patch_embed import resize_positions
from vitlib.positions import RelativePositionBias

BandMap = Sequence[int | None]


def resize(
    state: dict[str, Tensor],
    cfg: ViTConfig,
    image_size: tuple[int, int],
    log: list[str],
    *,
    assumes_square: bool = False,
) -> ViTConfig:
    """Resample positions for another size in pixels, by the checkpoint's rule.

    Args:
        state: Tensors by vitlib's names; changed in place.
        cfg: The checkpoint's config.
        image_size: Pixels (height, width).
        log: Gets a line for each table that was resampled.
        assumes_square: The grid of `cfg` is square because nothing says its size.

    Returns:
        The config of the new size.

    Raises:
        CheckpointError: The grid is assumed, and the new one has as many patches.
    """
    new = replace(cfg, image_size=image_size)
    if assumes_square and new.grid_size != cfg.grid_size and new.num_positions == cfg.num_positions:
        raise CheckpointError(
            f"{cfg.num_positions} positions can be {_by(cfg.grid_size)} patches to resample, or "
            f"{_by(new.grid_size)} as they are: {SIZE_REMEDY}"
        )
    resize_tables(state, cfg, new, log)
    return new


def resize_tables(state: dict[str, Tensor], cfg: ViTConfig, new: ViTConfig, log: list[str]) -> None:
    """Resample positions, learned or relative, to the grid of another config.

    Args:
        state: Tensors by vitlib's names; changed in place.
        cfg: The config that they are of.
        new: The config that they become those of.
        log: Gets a line for each table that was resampled.
    """
    if new.grid_size != cfg.grid_size and cfg.positions.relative is not None:
        positions = RelativePositionBias(cfg)
        for name in [name for name in state if name.startswith("attn_position.tables.")]:
            state[name] = positions.resize_table(state[name], new.grid_size)
        log.append(f"position tables resampled to {_by(new.grid_size)} patches (bilinear)")
    if new.grid_size != cfg.grid_size and cfg.positions.embed:
        table = state["patch_embed.pos_embed"]
        first = table.shape[1] - cfg.grid_size[0] * cfg.grid_size[1]
        patches = resize_positions(
            table[:, first:], cfg.grid_size, new.grid_size, cfg.positions.resize
        )
        state["patch_embed.pos_embed"] = torch.cat([table[:, :first], patches], dim=1)
        log.append(
            f"positions resampled from {_by(cfg.grid_size)} to {_by(new.grid_size)} patches "
            f"({cfg.positions.resize})"
        )


def resample_kernel(kernel: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Resample the kernel of the patch projection, by a pseudo-inverse (2212.08013, section 3.3).

    Of all kernels, the new one gives patches that are resized to the new size the tokens that come
    nearest to those of the old patches and the old kernel.

    Args:
        kernel: Weight of the projection, (D, C, p, q).
        patch_size: Pixels (height, width) of the new patch.

    Returns:
        Weight of the new projection, (D, C, height, width).
    """
    old = kernel.shape[2] * kernel.shape[3]
    basis = torch.eye(old, device=kernel.device, dtype=torch.float32).reshape(
        old, 1, *kernel.shape[2:]
    )
    resized = F.interpolate(basis, patch_size, mode="bicubic", antialias=True)
    inverse: Tensor = torch.linalg.pinv(resized.flatten(1).T)
    return (kernel.float().flatten(2) @ inverse).reshape(*kernel.shape[:2], *patch_size).to(kernel)


def rechannel(
    state: dict[str, Tensor],
    cfg: ViTConfig,
    in_channels: int,
    band_map: BandMap | None,
    log: list[str],
) -> ViTConfig:
    """Convert the patch kernel to other channels.

    Args:
        state: Tensors by vitlib's names; changed in place.
        cfg: The checkpoint's config.
        in_channels: The new number of channels. To 1 the kernel's channels are summed; to N they
            are repeated and scaled by old / N.
        band_map: For each new channel the old channel whose kernel it gets, or None for zeros.
        log: Gets a line where the kernel changes.

    Returns:
        The config of the new channels.

    Raises:
        ConfigError: The map has another length, or names a channel that there is not.
    """
    new = replace(cfg, in_channels=in_channels)
    kernel, old = state["patch_embed.proj.weight"], cfg.in_channels
    if band_map is not None:
        if len(band_map) != in_channels or any(b not in (None, *range(old)) for b in band_map):
            raise ConfigError(
                f"band_map={list(band_map)}: expected {in_channels} entries, each None or one of "
                f"the checkpoint's channels 0 to {old - 1}"
            )
        zeros = torch.zeros_like(kernel[:, 0])
        bands = [zeros if band is None else kernel[:, band] for band in band_map]
        state["patch_embed.proj.weight"] = torch.stack(bands, dim=1)
        log.append(f"patch kernel taken from channels {list(band_map)}")
    elif in_channels == old:
        return new
    elif in_channels == 1:
        state["patch_embed.proj.weight"] = kernel.sum(dim=1, keepdim=True)
        log.append(f"patch kernel summed over its {old} channels")
    else:
        repeated = kernel[:, [i % old for i in range(in_channels)]] * (old / in_channels)
        state["patch_embed.proj.weight"] = repeated
        log.append(f"patch kernel repeated over {in_channels} channels, scaled {old}/{in_channels}")
    return new


def widen(state: dict[str, Tensor], log: list[str]) -> None:
    """Cast tensors of several dtypes to the narrowest that holds them all; no value changes.

    Args:
        state: Floating-point tensors by vitlib's names; changed in place, but for those of the
            widest dtype.
        log: Gets one line where a tensor was cast.
    """
    dtypes = sorted({tensor.dtype for tensor in state.values()}, key=str)
    if len(dtypes) < 2:
        return
    widest = reduce(torch.promote_types, dtypes)
    state |= {name: tensor.to(widest) for name, tensor in state.items()}
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    log.append(f"tensors of {names} are loaded as {str(widest).removeprefix('torch.')}")


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def adapt_processor(
    processor: ImageProcessor,
    old: ViTConfig,
    new: ViTConfig,
    band_map: BandMap | None,
    log: list[str],
) -> ImageProcessor:
    """Make a preprocessing follow a change of the model.

    Args:
        processor: Of the model as it was.
        old: The model as it was.
        new: The model as it is, of another image size or number of channels.
        band_map: The old channel that each new one stands for, or None.
        log: Gets a line where one channel takes the place of several.

    Returns:
        The preprocessing of the new model.
    """
    if new.image_size != old.image_size:
        processor = processor.with_image_size(new.image_size)
    if new.in_channels != old.in_channels or band_map is not None:
        if new.in_channels == 1 and not processor.equal_channels:
            log.append("one channel is normalised with the mean of image_mean and of image_std")
        processor = processor.with_channels(new.in_channels, band_map)
    return processor


def unread_norm(state: Mapping[str, Tensor], cfg: ViTConfig) -> dict[str, Tensor]:
    """Return a final norm that no forward reads.

    Args:
        state: The file's tensors. The norm has a dtype of theirs, so that it widens nothing.
        cfg: The model's config.

    Returns:
        Ones, and zeros where the norm has a bias, by vitlib's names.
    """
    dtype = next((tensor.dtype for tensor in state.values()), torch.float32)
    norm = {"norm.weight": torch.ones(cfg.embed_dim, dtype=dtype)}
    if cfg.norms.kind == "layer":
        norm["norm.bias"] = torch.zeros(cfg.embed_dim, dtype=dtype)
    return norm
