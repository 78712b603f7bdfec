"""optimize: which parts of a model become what, by the machine's table."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable

import torch
from torch import nn

from vitlib.checkpoint.reconcile import reconcile
from vitlib.encoder import Block
from vitlib.errors import ConfigError, first_line
from vitlib.fast import onednn_ops
from vitlib.fast.block import BlockWeights, FastBlock, LastBlock, gather, plain
from vitlib.fast.calibrate import batches, calibrated
from vitlib.fast.cpu import PRECISIONS, Precision, Route, route
from vitlib.fast.fast_vit import FastViT
from vitlib.fast.int8 import quantised, restored
from vitlib.fast.linears import make, route_of_int8
from vitlib.fast.swap import (
    FastPositions,
    as_they_are,
    floated,
    meaning,
    patches,
    rebuilt,
    stock,
    with_children,
)
from vitlib.image.decode import ImageLike
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")


@isolate_torch_settings()
def optimize(
    model: ViT,
    precision: Precision = "fp32",
    *,
    calibrate: Iterable[ImageLike] | torch.Tensor | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,  # noqa: A002
) -> FastViT:
    """The same model for inference only, faster: same call, same shapes; the model is only read.

    precision: "fp32" gives the model's numbers to 5e-6; "bf16"; "fp16" (GPUs); "int8" (CPUs with
        VNNI); "fp8" (GPUs that have it). What a CPU cannot do in bf16 it does in fp32, a GPU
        without bfloat16 in fp16, and the log says so.
    calibrate: for int8, some of your photos (32 or more), or their normalised pixels (B, C, H, W):
        the ranges of activations are taken from them. None: found anew for each token, slower.
    batch_size: images in one pass; None: as many as the caches hold.
    device: None stays where the model is.
    compile: On a GPU, compile the blocks of large passes with torch.compile too, at the first
        batch of each size (some ten seconds). False: kernels as they are, which start at once.

    Parts that are not vitlib's own, or have hooks, run as they are: as_they_are names them.

    Raises ConfigError for an unknown precision and for one that the device cannot do, ImageError
    for a photo to calibrate with that is none.
    """
    if not isinstance(model, ViT):
        raise ConfigError(
            f"a {type(model).__name__} is not a ViT: optimize() takes what vitlib.load gave"
        )
    reconcile(model)
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ConfigError(f"batch_size={batch_size!r}: expected a whole number from 1")
    if type(compile) is not bool:
        raise ConfigError(f"compile={compile!r}: expected True or False")
    if calibrate is not None and precision != "int8":
        raise ConfigError(f"calibrate= is for int8: leave it out for {precision}")
    if model.training and as_they_are(model):
        raise ConfigError("the model is in training mode, and has parts of its own: call eval()")
    there = next(model.parameters())
    where = there.device if device is None else as_device(device)
    if where.type == "cuda":
        from vitlib.fast.cuda import optimize_cuda

        return optimize_cuda(model, precision, batch_size, where, compile)
    if where.type != there.device.type:
        model = copy.deepcopy(model).to(where)
    way = cpu_route(precision) if where.type == "cpu" else elsewhere(precision, where)
    if precision == "bf16" and way.arithmetic != "bf16":
        logger.warning("bf16 is not used: %s", way.why)
    own = as_they_are(model)
    if own and there.dtype != torch.float32:  # they take what the model's dtype is
        logger.warning("not sped up: %s weights, and parts of its own", there.dtype)
        return FastViT(model, None, precision, there.dtype, batch_size, tuple(own))
    blocks = {
        path: gather(part)
        for path, part in model.named_modules(remove_duplicate=False)  # one may stand twice
        if isinstance(part, Block) and stock(part)
    }
    if way.arithmetic == "int8":
        blocks = in_8_bits(model, blocks, calibrate)
    return assembled(model, blocks, way, precision, batch_size)


PLAIN = Route("fp32", False, "fused", torch.float32, "torch's own")


def cpu_route(precision: Precision) -> Route:
    """The table's path, if its operations are there. Raises ConfigError where it has none."""
    if precision == "fp16":
        raise ConfigError("fp16 is for GPUs: use bf16 or fp32 on a CPU")
    if precision == "fp8":
        raise ConfigError("fp8 needs a GPU that has it: use int8, bf16 or fp32 on a CPU")
    way = route_of_int8() if precision == "int8" else route(precision)
    assert way is not None  # fp32 and bf16 have one on every CPU
    dtype = torch.bfloat16 if way.arithmetic == "bf16" else torch.float32
    if way.packed and not onednn_ops.has_packed_linear(dtype):
        why = f"torch {torch.__version__} has no packed linear that agrees with the plain one"
        way = PLAIN._replace(why=why) if way.arithmetic != "int8" else way._replace(packed=False)
    return way


def as_device(device: torch.device | str) -> torch.device:
    """What torch calls it, if it is there. Raises ConfigError."""
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)[:120]
        raise ConfigError(f"device={device!r} is not there: {reason}; leave device= out") from error
    return where


def elsewhere(precision: Precision, where: torch.device) -> Route:
    """torch's own float32, on a device that is neither a CPU nor CUDA."""
    if precision in ("int8", "fp8", "fp16"):
        raise ConfigError(
            f"{precision} is for {'CPUs' if precision == 'int8' else 'CUDA'}: use "
            f"fp32 on {where}, or another device="
        )
    return PLAIN._replace(why=f"float32 serves everything on {where}")


def in_8_bits(
    model: ViT,
    blocks: dict[str, BlockWeights],
    calibrate: Iterable[ImageLike] | torch.Tensor | None,
) -> dict[str, BlockWeights]:
    """Float32 blocks -> in 8 bits, by photos where there are some."""
    if calibrate is None:  # nothing tells which linears suffer; errors of the first go furthest
        return {
            path: block if path == "blocks.0" else quantised(block, None)
            for path, block in blocks.items()
        }
    pixels, count = batches(calibrate, model.image_processor, model.config.in_channels)
    float32 = assembled(model, blocks, cpu_route("fp32"), "fp32", None)
    chosen = calibrated(float32.trunk, blocks, pixels, count)
    return {path: quantised(block, chosen[path]) for path, block in blocks.items()}


def assembled(
    model: ViT,
    blocks: dict[str, BlockWeights],
    way: Route,
    precision: Precision,
    batch_size: int | None,
) -> FastViT:
    """The model with these blocks, by their paths, in the place of its own."""
    reads_first = model.config.pool in ("cls", "pooler")
    last = f"blocks.{model.config.depth - 1}"
    levels = meaning(model.image_processor)

    def speed(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, Block):
            return fast_block(blocks[path], way, lone=reads_first and path == last)
        if isinstance(module, PatchEmbed):
            return patches(module, way)
        if isinstance(module, AttentionPosition):
            positions = floated(module)
            assert isinstance(positions, AttentionPosition)
            return FastPositions(positions)
        if isinstance(module, nn.Linear) and path.split(".")[0] in ("blocks", "attn_pool"):
            return make(plain(module), way._replace(arithmetic="fp32"))
        return None if any(module.children()) else floated(module)

    trunk = rebuilt(model, speed)
    assert isinstance(trunk, ViT)
    trunk.image_processor = model.image_processor
    on_levels: ViT | None = None
    if levels is not None and stock(model.patch_embed):
        embed = patches(model.patch_embed, way, levels)
        other = with_children(trunk, {**trunk._modules, "patch_embed": embed})
        assert isinstance(other, ViT)
        on_levels = other
    own, dtype = tuple(as_they_are(model)), next(model.parameters()).dtype
    return FastViT(trunk, on_levels, precision, dtype, batch_size, own)


def fast_block(weights: BlockWeights, way: Route, *, lone: bool) -> nn.Module:
    """A block; the last one of a model whose head reads class tokens has a way for them alone."""
    absorbs = lone and not weights.rotary
    every = FastBlock(weights, way, absorbs and way.arithmetic == "fp32")
    if not absorbs or way.arithmetic == "fp32":
        return every
    float32 = way._replace(arithmetic="fp32", attention="fused")
    return LastBlock(FastBlock(restored(every.weights()), float32, True), every)
