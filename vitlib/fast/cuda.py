"""Optimize a model for a GPU: float32, bfloat16, float16 or fp8, chosen attention, CUDA graphs.

How data flows: uint8 pixels go to the device as bytes, and are normalised there, in the patch
projection. cuda_runner.py splits a batch into sizes that it has run before. Small ones are captured
as one CUDA graph; large ones, if asked for, are compiled block by block. A model with modules of
the user's own runs on the fast modules (cuda_modules.py) without either. Everything but graphs and
the GPU's kernels also runs on a CPU, where it is tested.

Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

import copy
import logging
import os
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitlib.errors import ConfigError, ImageError
from vitlib.fast import row_ops
from vitlib.fast.cpu import KernelPlan, Precision
from vitlib.fast.cuda_attention import get_gpu, has_bfloat16
from vitlib.fast.cuda_embeddings import CudaPatchEmbed, Grid
from vitlib.fast.cuda_graphs import BatchFunction
from vitlib.fast.cuda_modules import CudaModuleFactory
from vitlib.fast.cuda_runner import BatchRunner
from vitlib.fast.fp8 import has_fp8
from vitlib.fast.micro_batch import (
    halve_until_fits,
    max_graph_tokens,
    micro_batch_size,
    split_batch,
)
from vitlib.fast.model import FastViT, Method, bind
from vitlib.fast.module_swap import (
    copy_with_children,
    is_reduced,
    is_stock_tree,
    swap_stock_modules,
    unoptimized_modules,
)
from vitlib.image.processor import ImageProcessor, uint8_affine
from vitlib.system.memory import explain_out_of_memory
from vitlib.system.torch_state import strict_float32
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")


def optimize_cuda(
    model: ViT,
    precision: Precision,
    batch_size: int | None,
    device: torch.device,
    compiles: bool = False,
) -> FastViT:
    """Optimize a model for a GPU; optimization.py has checked the arguments.

    Args:
        model: The model, which is only read.
        precision: The precision.
        batch_size: Images computed at a time; None for as many as the caches hold.
        device: The GPU, or a CPU in tests.
        compiles: Compile the blocks for large batches.

    Returns:
        The optimized model.

    Raises:
        ConfigError: The GPU cannot compute the precision.
    """
    device = with_index(device)
    plan = cuda_plan(precision, device)
    dtype = plan.attention_dtype
    runner = BatchRunner(device, dtype, compiles, max_graph_tokens(model.config.embed_dim))
    unoptimized = tuple(unoptimized_modules(model))
    model_dtype = next(model.parameters()).dtype
    if unoptimized and next(model.parameters()).device != device:
        raise ConfigError(
            "the model has modules that are not vitlib's, and lies on another device: call "
            f"model.to({str(device)!r}) first"
        )
    if is_reduced(model):  # its forward would call methods that blocks for a GPU do not have
        logger.warning("not optimized on a GPU: a model with token functions")
        paths = ("the model itself", *unoptimized)
        if next(model.parameters()).device != device:
            model = copy.deepcopy(model).to(device)
        return CudaViT(model, None, precision, model_dtype, batch_size, paths, runner)
    if unoptimized and model_dtype != torch.float32:  # they expect inputs of the model's dtype
        logger.warning("not optimized: %s weights, and modules that are not vitlib's", model_dtype)
        return CudaViT(model, None, precision, model_dtype, batch_size, unoptimized, runner)
    # float16 holds no number above 65,504, which a residual stream may exceed.
    is_narrow = dtype == torch.bfloat16 and not unoptimized
    stream_dtype = torch.bfloat16 if is_narrow else torch.float32
    with torch.inference_mode(False), torch.no_grad():
        if device.type == "cuda":
            row_ops.find_triton_kernels(device)  # tries them, which a capture by the caller forbids
        # A block that runs as it is computes its scores in float32.
        is_fused = all(is_stock_tree(block) for block in model.blocks)
        bias_dtype = dtype if is_fused else torch.float32
        factory = CudaModuleFactory(
            plan, device, precision == "fp8", stream_dtype, bias_dtype, get_gpu(device)
        )
        trunk = require_vit(swap_stock_modules(model, factory.convert))
        affine, uint8_trunk = uint8_affine(model.image_processor), None
        if affine is not None and is_stock_tree(model.patch_embed):
            embed = factory.make_patch_embed(model.patch_embed, affine)
            children = {**trunk._modules, "patch_embed": embed}
            uint8_trunk = require_vit(copy_with_children(trunk, children))
    return CudaViT(trunk, uint8_trunk, precision, model_dtype, batch_size, unoptimized, runner)


def with_index(device: torch.device) -> torch.device:
    """Return a device with its index.

    Args:
        device: Any device; "cuda" is the current GPU.

    Returns:
        The device.

    Raises:
        ConfigError: torch sees no GPU.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no GPU here: leave device= out, or say 'cpu'")
    return torch.device("cuda", torch.cuda.current_device())


_FLOAT32 = KernelPlan("fp32", False, "fused", torch.float32, "cuBLAS in float32, not TF32")
_BFLOAT16 = KernelPlan("bf16", False, "fused", torch.bfloat16, "cuBLAS in bfloat16")
_FLOAT16 = KernelPlan("fp16", False, "fused", torch.float16, "cuBLAS in float16")


def cuda_plan(precision: Precision, device: torch.device) -> KernelPlan:
    """Return the kernels of a precision on a GPU.

    Args:
        precision: The precision.
        device: The GPU, or a CPU in tests.

    Returns:
        The plan.

    Raises:
        ConfigError: The GPU cannot compute the precision.
    """
    if precision == "int8":
        raise ConfigError("int8 is for CPUs: use bf16 on a GPU, or fp8 where it has that")
    if precision in ("fp32", "fp16"):
        return _FLOAT32 if precision == "fp32" else _FLOAT16
    if device.type != "cuda":
        return _BFLOAT16
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if precision == "fp8" and capability < (8, 9):
        raise ConfigError(
            f"fp8 needs a GPU of compute capability 8.9 or more, and {name} has "
            f"{'.'.join(map(str, capability))}: use bf16"
        )
    if precision == "fp8" and not has_fp8(device):
        raise ConfigError(
            f"torch {torch.__version__} has no fp8 product by rows on {name} that computes what it "
            "should: use bf16"
        )
    if not has_bfloat16(device):
        logger.warning("bf16 is not used: float16 serves it, as %s has no bfloat16", name)
        return _FLOAT16
    return _BFLOAT16


class CudaViT(FastViT):
    """A FastViT on a GPU. Pixels may lie on the CPU; outputs lie on the GPU.

    Args:
        trunk: The model with fast modules.
        uint8_trunk: The same with a patch projection for uint8 pixels; None where there is none.
        precision: The precision that the user asked for.
        dtype: Dtype of the outputs.
        batch_size: Images of a micro-batch; None for as many as the caches hold.
        unoptimized_modules: Paths of the modules that run as the user made them.
        runner: The runner of the device.
    """

    def __init__(
        self,
        trunk: ViT,
        uint8_trunk: ViT | None,
        precision: Precision,
        dtype: torch.dtype,
        batch_size: int | None,
        unoptimized_modules: tuple[str, ...],
        runner: BatchRunner,
    ) -> None:
        super().__init__(trunk, uint8_trunk, precision, dtype, batch_size, unoptimized_modules)
        self.runner = runner
        self.max_micro_batch = 2**31  # images that fit in memory, as far as is known

    def save(
        self,
        folder: str | os.PathLike[str],  # noqa: ARG002
        *,
        image_processor: ImageProcessor | None = None,  # noqa: ARG002
        packed: bool = True,  # noqa: ARG002
    ) -> None:
        """Refuse to save: the checkpoint is as small, and is optimized within seconds.

        Args:
            folder: Not used.
            image_processor: Not used.
            packed: Not used.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "a model optimized for a GPU is not saved: save the model it was made from, with "
            "vitlib.save, and optimize it where it runs"
        )

    def upload(self, images: Tensor) -> Tensor:
        """Begin to copy images to the GPU, on a stream of its own.

        Args:
            images: (B, C, H, W) in pinned memory that is not written to any more.

        Returns:
            The images on the GPU; `images` itself where they are not pinned, or do not fit there.
        """
        if images.is_cuda or self.unoptimized_modules or not images.is_pinned():
            return images
        try:
            return self.runner.upload(images)
        except torch.OutOfMemoryError:  # of one micro-batch at a time there may be room
            return images

    def _run(self, trunk: ViT, method: Method, images: Tensor) -> Tensor:
        """Run a method of a trunk on images (B, C, H, W)."""
        runner = self.runner
        if self.unoptimized_modules:  # the user's modules get each batch as one, as it came
            with explain_out_of_memory(images):
                images = images.to(runner.device)
            return super()._run(trunk, method, images)
        self.refuse_gradients(images)
        is_uint8 = trunk is self.uint8_trunk
        grid = trunk.patch_embed.patch_grid(images)
        tokens = self.num_prefix_tokens + grid[0] * grid[1]

        def factory(compiles: bool) -> BatchFunction:
            fixed = copy_for_grid(trunk, grid, runner.device)
            return bind_method(compile_blocks(fixed) if compiles else fixed, method, runner.dtype)

        def run(size: int) -> Tensor:
            sizes = split_batch(len(images), size)
            return runner.run((is_uint8, method, grid), factory, images, sizes, tokens)

        # The runner keeps tensors between calls. A tensor of inference mode could not be written to
        # outside that mode, so that none may be made here.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            strict_float32(),
            explain_out_of_memory(images),
        ):
            largest = self.batch_size or min(micro_batch_size(tokens), self.max_micro_batch)
            outputs, size = halve_until_fits(run, largest)
            if size < largest:
                self._limit_micro_batch(size, largest, images)
            return outputs.to(self.dtype)

    def _limit_micro_batch(self, size: int, largest: int, images: Tensor) -> None:
        """Remember the size that fits; raise ImageError where the user asked for a larger one."""
        shape = "x".join(map(str, images.shape[1:]))
        problem = f"micro-batches of {largest} images of {shape} do not fit in memory"
        if self.batch_size is not None:
            raise ImageError(f"{problem}: optimize(batch_size={size}) does")
        if size < self.max_micro_batch:
            logger.warning("%s: %d images are computed at a time", problem, size)
        self.max_micro_batch = size


def copy_for_grid(trunk: ViT, grid: Grid, device: torch.device) -> ViT:
    """Copy a trunk and compute all that depends on the grid alone.

    Args:
        trunk: The model with fast modules.
        grid: Patches down and across, (h, w).
        device: The device.

    Returns:
        The copy, which shares the weights.
    """
    embed, positions = copy.copy(trunk.patch_embed), copy.copy(trunk.attn_position)
    assert isinstance(embed, CudaPatchEmbed)
    embed.grid_rows(grid)
    if positions is not None:
        positions.per_block(grid, device, len(trunk.blocks))
    changed = {"patch_embed": embed, "attn_position": positions}
    return require_vit(copy_with_children(trunk, {**trunk._modules, **changed}))


def require_vit(module: nn.Module) -> ViT:
    """Return a module that is a ViT, for the type checker.

    Args:
        module: A ViT.

    Returns:
        The same module.
    """
    assert isinstance(module, ViT)
    return module


def bind_method(trunk: ViT, method: Method, dtype: torch.dtype) -> BatchFunction:
    """Make the function that is run and captured.

    Args:
        trunk: The model with fast modules.
        method: Its method, or a function of it.
        dtype: The dtype that normalised pixels are cast to.

    Returns:
        A function of pixels (B, C, H, W), uint8 or normalised, that gives what the method does.
    """
    run = bind(trunk, method)

    def function(pixels: Tensor) -> Tensor:
        # uint8 pixels stay as they are: the patch projection subtracts their centre first.
        return run(pixels if pixels.dtype == torch.uint8 else pixels.to(dtype))

    return function


BlockStep = Callable[[nn.Module, Tensor, "int | None", "Tensor | None"], Tensor]


class CompiledBlock(nn.Module):
    """A block that is called through a compiled function.

    Args:
        block: The block.
        step: The compiled function of a block and its arguments.
    """

    def __init__(self, block: nn.Module, step: BlockStep) -> None:
        super().__init__()
        self.block, self.step = block, step

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Apply the block.

        Args:
            x: Tokens (B, T, D).
            num_queries: Q, the number of first tokens to compute; None for all.
            attn_pos: Position table of the attention.

        Returns:
            (B, Q, D).
        """
        return self.step(self.block, x, num_queries, attn_pos)


def compile_blocks(trunk: ViT) -> ViT:
    """Copy a trunk with its blocks compiled; one compilation serves all blocks that are alike.

    The last block may compute fewer tokens. It would need a second compilation for little gain, so
    it is compiled only where it is the only block.

    Args:
        trunk: The model with fast modules.

    Returns:
        The copy, which shares the weights.
    """

    def step(
        block: nn.Module, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        y: Tensor = block(x, num_queries, attn_pos)
        return y

    # The compiler caches by code object, and gives up after eight variants of one
    # (recompile_limit): each trunk gets a function with a code object of its own.
    unique = types.FunctionType(step.__code__.replace(), globals(), "step")
    compiled: BlockStep = torch.compile(unique, fullgraph=True, dynamic=False)
    blocks: list[nn.Module] = list(trunk.blocks)
    alike = blocks[:-1] or blocks
    compiled_blocks: list[nn.Module] = [CompiledBlock(block, compiled) for block in alike]
    modules = nn.ModuleList(compiled_blocks + blocks[len(alike) :])
    return require_vit(copy_with_children(trunk, {**trunk._modules, "blocks": modules}))
