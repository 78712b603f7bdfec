"""Optimize a model: choose the kernels of its device, and put fast modules in place of stock ones.

On a CPU everything is here; a GPU has a file of its own, cuda.py.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from vitlib.checkpoint.reconcile import reconcile
from vitlib.encoder import Block
from vitlib.errors import ConfigError, count_noun, first_line
from vitlib.fast import onednn_ops
from vitlib.fast.block import (
    BlockWeights,
    FastBlock,
    LastBlock,
    linear_weights,
)
from vitlib.fast.cpu import PRECISIONS, KernelPlan, Precision, kernel_plan
from vitlib.fast.embeddings import FastAttentionPosition, make_patch_embed
from vitlib.fast.int8_linears import int8_plan, make_linear
from vitlib.fast.model import FastViT
from vitlib.fast.module_swap import (
    copy_as_float32,
    copy_with_children,
    is_reduced,
    is_stock_tree,
    swap_stock_modules,
    unoptimized_modules,
)
from vitlib.image.decode import ImageLike
from vitlib.image.processor import uint8_affine
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.fast.calibration import CalibrationGoal
    from vitlib.fast.int8_quantization import QuantParams

logger = logging.getLogger("vitlib")
# Below this the ranges of activations still move by several per cent with each photo.
MIN_CALIBRATION = 16


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
    """Make a faster model for inference, with the same calls and the same shapes.

    Modules that are not vitlib's own, or have hooks, run as they are:
    FastViT.unoptimized_modules names them. Of what vitlib.adapt added, LoRA is merged into float32
    weights and prompts cost nothing but their tokens; adapters, and blocks with prompts of their
    own, are named there.

    Args:
        model: The model, which is only read.
        precision: "fp32" gives the model's numbers to 5e-6 of the largest one. "bf16" and "fp16"
            compute in 16 bits, "int8" and "fp8" in 8. fp16 and fp8 are for GPUs, int8 for CPUs with
            VNNI. A CPU that is no faster in bf16 computes in fp32, and a GPU without bfloat16 in
            fp16; the log says so.
        calibrate: For int8, 32 or more of your photos, or their normalised pixels (B, C, H, W). The
            ranges of activations are measured on them. None measures them on images that vitlib
            draws, and leaves more layers in 16 bits.
        batch_size: Images computed at a time. None: as many as the caches hold.
        device: The device to run on. None stays where the model is.
        compile: Compile with torch.compile. On a GPU, the blocks for large batches, some ten
            seconds at the first batch of each size. On a CPU, the whole forward for each size, some
            thirty seconds, with a C++ compiler; a program that is no faster is not used.

    Returns:
        The optimized model. It holds copies, so that the model may be changed afterwards.

    Raises:
        ConfigError: An argument is not valid, or the device cannot compute the precision.
        ImageError: Something to calibrate with is no photo.
    """
    _check_arguments(model, precision, calibrate, batch_size, compile)
    model = _merge_updates(model)
    weight = next(model.parameters())
    target = weight.device if device is None else resolve_device(device)
    if target.type == "cuda":
        from vitlib.fast.cuda import optimize_cuda

        return optimize_cuda(model, precision, batch_size, target, compile)
    if target.type != weight.device.type:
        model = copy.deepcopy(model).to(target)
    plan = cpu_plan(precision) if target.type == "cpu" else fallback_plan(precision, target)
    if precision == "bf16" and plan.arithmetic != "bf16":
        logger.warning("bf16 is not used: %s", plan.reason)
    unoptimized = tuple(unoptimized_modules(model))
    if unoptimized and weight.dtype != torch.float32:  # they expect inputs of the model's dtype
        logger.warning("not optimized: %s weights, and modules that are not vitlib's", weight.dtype)
        return FastViT(model, None, precision, weight.dtype, batch_size, unoptimized)
    from vitlib.fast.stock_blocks import StockBlocks  # a model that is only loaded needs none

    blocks: Mapping[str, BlockWeights] = StockBlocks(model)
    if plan.arithmetic == "int8":
        blocks = quantize_blocks(model, blocks, calibrate)
    fast = assemble(model, blocks, plan, precision, batch_size)
    if not compile:
        return fast
    from vitlib.fast.compiled import compile_model  # few programs compile

    return compile_model(fast)


def _check_arguments(
    model: object, precision: str, calibrate: object, batch_size: object, compiles: object
) -> None:
    """Check the arguments of optimize()."""
    if not isinstance(model, ViT):
        raise ConfigError(
            f"a {type(model).__name__} is not a ViT: optimize() takes what vitlib.load gave"
        )
    reconcile(model)
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ConfigError(f"batch_size={batch_size!r}: expected a whole number from 1")
    if type(compiles) is not bool:
        raise ConfigError(f"compile={compiles!r}: expected True or False")
    if calibrate is not None and precision != "int8":
        raise ConfigError(f"calibrate= is for int8: leave it out for {precision}")
    if model.training and unoptimized_modules(model):
        raise ConfigError(
            "the model is in training mode and has modules that are not vitlib's: call eval()"
        )


def _merge_updates(model: ViT) -> ViT:
    """Merge LoRA of vitlib.adapt into float32 weights; 16 bits would round small updates away."""
    if model.adaptation is None or model.adaptation.lora is None or model.dtype != torch.float32:
        return model
    from vitlib.adapters import merge_lora  # few models have it

    return merge_lora(model)


FALLBACK_PLAN = KernelPlan("fp32", False, "fused", torch.float32, "torch's own")


def cpu_plan(precision: Precision) -> KernelPlan:
    """Return the kernels of a precision on this CPU.

    Args:
        precision: The precision.

    Returns:
        The plan, whose operations this torch has.

    Raises:
        ConfigError: This CPU cannot compute the precision.
    """
    if precision == "fp16":
        raise ConfigError("fp16 is for GPUs: use bf16 or fp32 on a CPU")
    if precision == "fp8":
        raise ConfigError("fp8 needs a GPU that has it: use int8, bf16 or fp32 on a CPU")
    plan = int8_plan() if precision == "int8" else kernel_plan(precision)
    assert plan is not None  # fp32 and bf16 have one on every CPU
    dtype = torch.bfloat16 if plan.arithmetic == "bf16" else torch.float32
    if plan.packed and not onednn_ops.has_packed_linear(dtype):
        if plan.arithmetic == "int8":
            return plan._replace(packed=False)
        reason = f"torch {torch.__version__} has no packed linear that agrees with the plain one"
        return FALLBACK_PLAN._replace(reason=reason)
    return plan


def resolve_device(device: torch.device | str) -> torch.device:
    """Return a device, after checking that it is there.

    Args:
        device: The device, or torch's name for it.

    Returns:
        The device.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    try:
        resolved = torch.device(device)
        torch.empty(0, dtype=torch.float32, device=resolved)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)[:120]
        raise ConfigError(f"device={device!r} is not there: {reason}; leave device= out") from error
    return resolved


def fallback_plan(precision: Precision, device: torch.device) -> KernelPlan:
    """Return torch's own float32 kernels, for a device that is neither a CPU nor CUDA.

    Args:
        precision: The precision.
        device: The device.

    Returns:
        The plan.

    Raises:
        ConfigError: The precision is for CPUs, or for CUDA.
    """
    if precision in ("int8", "fp8", "fp16"):
        raise ConfigError(
            f"{precision} is for {'CPUs' if precision == 'int8' else 'CUDA'}: use "
            f"fp32 on {device}, or another device="
        )
    return FALLBACK_PLAN._replace(reason=f"float32 serves everything on {device}")


def quantize_blocks(
    model: ViT,
    blocks: Mapping[str, BlockWeights],
    calibrate: Iterable[ImageLike] | torch.Tensor | None,
) -> dict[str, BlockWeights]:
    """Quantize the blocks of a model to 8 bits.

    Args:
        model: The model.
        blocks: Its stock blocks in float32, by path.
        calibrate: Photos or pixels to calibrate with; None for images that are drawn.

    Returns:
        The blocks, with the layers that bear it in 8 bits.
    """
    from vitlib.fast.int8_quantization import quantize_block

    if not blocks:
        return {}
    blocks = dict(blocks)  # calibration reads them many times
    params = search_params(model, blocks, calibrate, model.image_processor)
    return {path: quantize_block(block, params[path]) for path, block in blocks.items()}


def search_params(
    model: ViT,
    blocks: Mapping[str, BlockWeights],
    calibrate: Iterable[ImageLike] | torch.Tensor | None,
    processor: object | None,
    goal: CalibrationGoal | None = None,
) -> dict[str, dict[str, QuantParams]]:
    """Search the 8-bit form of the layers of a model on photos.

    Args:
        model: The model, which is only read.
        blocks: Its stock blocks in float32, by path.
        calibrate: Photos or pixels; None for images that are drawn.
        processor: The preprocessing of the photos.
        goal: How near to float32 the model has to stay; None: as optimize() stays.

    Returns:
        For each block the layers that go into 8 bits, as calibrate_blocks returns them.

    Raises:
        ImageError: Something to calibrate with is no photo.
        ConfigError: There are no photos, or no preprocessing for them.
    """
    from vitlib.fast.calibration import CalibrationGoal, calibrate_blocks, calibration_batches

    if calibrate is None:
        from vitlib.fast.drawn_images import MAX_EMBEDDING_ERROR, draw_batches

        pixels, count = draw_batches(model.config, processor)
        goal = goal or CalibrationGoal(MAX_EMBEDDING_ERROR)
    else:
        pixels, count = calibration_batches(calibrate, processor, model.config.in_channels)
    if count < MIN_CALIBRATION:
        logger.warning(
            "int8 is calibrated with %s: labels may differ from float32's; give 32 or more",
            count_noun(count, "photo"),
        )

    def assemble_trunk(precision: Precision) -> ViT:
        return assemble(model, blocks, cpu_plan(precision), precision, None).trunk

    return calibrate_blocks(assemble_trunk, blocks, pixels, count, goal or CalibrationGoal())


def assemble(
    model: ViT,
    blocks: Mapping[str, BlockWeights],
    plan: KernelPlan,
    precision: Precision,
    batch_size: int | None,
) -> FastViT:
    """Put fast modules in place of a model's stock modules.

    Args:
        model: The model, which is only read.
        blocks: The numbers of its stock blocks, by path.
        plan: The kernels.
        precision: The precision that the user asked for.
        batch_size: Images computed at a time; None for as many as the caches hold.

    Returns:
        The optimized model.
    """
    from vitlib.system.heap import keep_small_blocks  # a model that is only loaded needs none

    keep_small_blocks()
    reads_class_tokens = model.config.pool in ("cls", "pooler")
    last = f"blocks.{model.config.depth - 1}"
    affine = uint8_affine(model.image_processor)

    has_token_functions = is_reduced(model)

    def convert(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, Block) and has_token_functions:
            is_narrow = reads_class_tokens and path == last and plan.arithmetic == "fp32"
            return make_reduced_block(blocks[path], plan, is_narrow=is_narrow)
        if isinstance(module, Block):
            is_narrow = reads_class_tokens and path == last
            return make_block(blocks[path], plan, is_narrow=is_narrow)
        if isinstance(module, PatchEmbed):
            return make_patch_embed(module, plan)
        if isinstance(module, AttentionPosition):
            positions = copy_as_float32(module)
            assert isinstance(positions, AttentionPosition)
            return FastAttentionPosition(positions)
        if isinstance(module, nn.Linear) and path.split(".")[0] in ("blocks", "attn_pool"):
            return make_linear(linear_weights(module), plan._replace(arithmetic="fp32"))
        return None if any(module.children()) else copy_as_float32(module)

    trunk = swap_stock_modules(model, convert)
    assert isinstance(trunk, ViT)
    trunk.image_processor = model.image_processor
    uint8_trunk: ViT | None = None
    if affine is not None and is_stock_tree(model.patch_embed):
        embed = make_patch_embed(model.patch_embed, plan, affine)
        other = copy_with_children(trunk, {**trunk._modules, "patch_embed": embed})
        assert isinstance(other, ViT)
        uint8_trunk = other
    unoptimized, dtype = tuple(unoptimized_modules(model)), next(model.parameters()).dtype
    return FastViT(trunk, uint8_trunk, precision, dtype, batch_size, unoptimized)


def make_reduced_block(weights: BlockWeights, plan: KernelPlan, *, is_narrow: bool) -> nn.Module:
    """Make a fast block of a model whose tokens become fewer.

    Args:
        weights: The numbers of the block.
        plan: The kernels.
        is_narrow: The last block in float32, whose head reads class tokens: these alone are
            computed without K and V.

    Returns:
        The block.
    """
    from vitlib.fast.reduced_block import ReducedBlock  # few programs have one

    absorbs_kv = is_narrow and not weights.rotary and "q" not in weights.sub_norms
    return ReducedBlock(weights, plan, absorbs_kv)


def make_block(weights: BlockWeights, plan: KernelPlan, *, is_narrow: bool) -> nn.Module:
    """Make a fast block.

    Args:
        weights: The numbers of the block.
        plan: The kernels.
        is_narrow: The last block of a model whose head reads class tokens. It gets a block for
            these alone, without K and V and in float32, beside the block for all tokens.

    Returns:
        The block.
    """
    absorbs_kv = is_narrow and not weights.rotary and "q" not in weights.sub_norms
    full_block = FastBlock(weights, plan, absorbs_kv and plan.arithmetic == "fp32")
    if not absorbs_kv or plan.arithmetic == "fp32":
        return full_block
    from vitlib.fast.int8_quantization import dequantize_block

    float32 = plan._replace(arithmetic="fp32", attention="fused")
    return LastBlock(FastBlock(dequantize_block(full_block.weights()), float32, True), full_block)
