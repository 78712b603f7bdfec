"""optimize() on a GPU: float32, bfloat16, float16 or fp8, chosen attention, CUDA graphs.

How data flows: pixels go to the device as they are, levels as bytes, and are normalised there, in
the patch projection. passes.py cuts a batch into sizes that the machine already knows, of which
small ones are captured as one CUDA graph and large ones, where asked, compiled block by block. A
model with parts of the user's own runs on the fast parts (cuda_parts.py) as it is called, without
either. Everything but graphs and a GPU's kernels also runs on a CPU, where it is tested.

Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

import copy
import logging
import os
import types

import torch
from torch import Tensor, nn

from vitlib.errors import ConfigError, ImageError
from vitlib.fast.capture import Function
from vitlib.fast.cpu import Precision, Route
from vitlib.fast.cuda_attention import card_of, has_bfloat16
from vitlib.fast.cuda_graphs import Runner, halve_until_it_fits, pass_size, plan
from vitlib.fast.cuda_parts import CudaPatchEmbed, Grid, Parts
from vitlib.fast.fast_vit import FastViT, naming_memory
from vitlib.fast.fp8 import has_fp8
from vitlib.fast.swap import as_they_are, meaning, rebuilt, stock, with_children
from vitlib.image.processor import ImageProcessor
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
    """What optimize() gives on a GPU; build.py has checked the arguments. The model is only read.

    Raises ConfigError for a precision that the GPU has not.
    """
    device = known(device)
    way = route(precision, device)
    dtype = way.attention_dtype
    runner = Runner(device, dtype, compiles=compiles)
    own, given = tuple(as_they_are(model)), next(model.parameters()).dtype
    if own and next(model.parameters()).device != device:
        raise ConfigError(f"the model has parts of its own: model.to({str(device)!r}) it first")
    if own and given != torch.float32:  # they take what the model's dtype is
        logger.warning("not sped up: %s weights, and parts of its own", given)
        return CudaViT(model, None, precision, given, batch_size, own, runner)
    # float16 holds no number above 65,504, which a residual stream may pass.
    stream = torch.bfloat16 if dtype == torch.bfloat16 and not own else torch.float32
    with torch.inference_mode(False), torch.no_grad():
        parts = Parts(way, device, precision == "fp8", stream, card_of(device))
        trunk = of_vit(rebuilt(model, parts.fast))
        levels, on_levels = meaning(model.image_processor), None
        if levels is not None and stock(model.patch_embed):
            embed = parts.embed(model.patch_embed, levels)
            on_levels = of_vit(with_children(trunk, {**trunk._modules, "patch_embed": embed}))
    return CudaViT(trunk, on_levels, precision, given, batch_size, own, runner)


def known(device: torch.device) -> torch.device:
    """The device with its number."""
    if device.type != "cuda" or device.index is not None:
        return device
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no GPU here: leave device= out, or say 'cpu'")
    return torch.device("cuda", torch.cuda.current_device())


_FLOAT32 = Route("fp32", False, "fused", torch.float32, "cuBLAS in float32, not TF32")
_BFLOAT16 = Route("bf16", False, "fused", torch.bfloat16, "cuBLAS in bfloat16")
_FLOAT16 = Route("fp16", False, "fused", torch.float16, "cuBLAS in float16")


def route(precision: Precision, device: torch.device) -> Route:
    """What serves a precision on a GPU. Raises ConfigError where nothing does."""
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
    """A FastViT on a GPU. Pixels may lie on the CPU: what it gives lies on the GPU."""

    def __init__(
        self,
        trunk: ViT,
        on_levels: ViT | None,
        precision: Precision,
        dtype: torch.dtype,
        batch_size: int | None,
        as_they_are: tuple[str, ...],
        runner: Runner,
    ) -> None:
        """As FastViT's; runner: of the device."""
        super().__init__(trunk, on_levels, precision, dtype, batch_size, as_they_are)
        self.runner = runner
        self.largest = 2**31  # images in a pass that memory holds, as far as is known

    def save(
        self,
        folder: str | os.PathLike[str],  # noqa: ARG002
        *,
        image_processor: ImageProcessor | None = None,  # noqa: ARG002
    ) -> None:
        """Raises ConfigError: the checkpoint itself is as small, and becomes this in moments."""
        raise ConfigError(
            "a model optimized for a GPU is not saved: save the model it was made from, with "
            "vitlib.save, and optimize it where it runs"
        )

    def upload(self, images: Tensor) -> Tensor:
        """As FastViT's, on a stream of its own: what is computed meanwhile goes on."""
        if images.is_cuda or self.as_they_are or not images.is_pinned():
            return images
        return self.runner.upload(images)

    def _run(self, trunk: ViT, method: str, images: Tensor) -> Tensor:
        """(B, C, H, W) through a method of a trunk -> (B, ...)."""
        runner = self.runner
        if self.as_they_are:  # the user's own parts see each batch as it came
            with naming_memory(images):
                images = images.to(runner.device)
            return super()._run(trunk, method, images)
        self._refuse_gradients(images)
        on_levels = trunk is self.on_levels
        grid = trunk.patch_embed.patch_grid(images)
        tokens = self.config.num_prefix_tokens + grid[0] * grid[1]

        def function(compiles: bool) -> Function:
            fixed = at_grid(trunk, grid, runner.device)
            return called(with_compiled_blocks(fixed) if compiles else fixed, method, runner.dtype)

        def run(size: int) -> Tensor:
            sizes = plan(len(images), size)
            return runner.run((on_levels, method, grid), function, images, sizes, tokens)

        # Nothing kept from here may be inference mode's: it could not be written to outside.
        with torch.inference_mode(False), torch.no_grad(), strict_float32(), naming_memory(images):
            asked = self.batch_size or min(pass_size(tokens), self.largest)
            answers, size = halve_until_it_fits(run, asked)
            if size < asked:
                self._fits(size, asked, images)
            return answers.to(self.dtype)

    def _fits(self, size: int, asked: int, images: Tensor) -> None:
        """Keep to the size of pass that memory holds. Raises ImageError where the caller asked for
        a larger one."""
        shape = "x".join(map(str, images.shape[1:]))
        what = f"passes of {asked} images of {shape} do not fit in memory"
        if self.batch_size is not None:
            raise ImageError(f"{what}: optimize(batch_size={size}) does")
        if size < self.largest:
            logger.warning("%s: passes of %d are computed", what, size)
        self.largest = size


def at_grid(trunk: ViT, grid: Grid, device: torch.device) -> ViT:
    """The same trunk with all that depends on the grid alone made already."""
    embed, positions = copy.copy(trunk.patch_embed), copy.copy(trunk.attn_position)
    assert isinstance(embed, CudaPatchEmbed)
    embed.rows(grid)
    if positions is not None:
        positions.per_block(grid, device, len(trunk.blocks))
    changed = {"patch_embed": embed, "attn_position": positions}
    return of_vit(with_children(trunk, {**trunk._modules, **changed}))


def of_vit(module: nn.Module) -> ViT:
    """A module that is known to be a ViT."""
    assert isinstance(module, ViT)
    return module


def called(trunk: ViT, method: str, dtype: torch.dtype) -> Function:
    """What is run and captured: pixels or levels (B, C, H, W) -> what the method gives."""
    through = getattr(trunk, method)

    def function(pixels: Tensor) -> Tensor:
        # Bytes stay bytes: the patch projection takes what they lie around away from them.
        return through(pixels if pixels.dtype == torch.uint8 else pixels.to(dtype))  # type: ignore[no-any-return]

    return function


class CompiledBlock(nn.Module):
    """A block that is called through a compiled function."""

    def __init__(self, block: nn.Module, step: types.FunctionType) -> None:
        super().__init__()
        self.block, self.step = block, step

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """As the block's."""
        return self.step(self.block, x, num_queries, attn_pos)  # type: ignore[no-any-return]


def with_compiled_blocks(trunk: ViT) -> ViT:
    """The same trunk with its blocks compiled: one compilation serves all that are alike. The last
    one, which may compute fewer tokens, would need a second for little: it is not, unless alone.

    What is compiled is a function with a code object of its own: to the compiler every use of one
    code object is the same, and after eight of them (recompile_limit) it gives up.
    """

    def step(
        block: nn.Module, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        return block(x, num_queries, attn_pos)  # type: ignore[no-any-return]

    own = types.FunctionType(step.__code__.replace(), globals(), "step")
    compiled = torch.compile(own, fullgraph=True, dynamic=False)
    every = list(trunk.blocks)
    alike = every[:-1] or every
    blocks = nn.ModuleList([CompiledBlock(b, compiled) for b in alike] + every[len(alike) :])  # type: ignore[arg-type]
    return of_vit(with_children(trunk, {**trunk._modules, "blocks": blocks}))
