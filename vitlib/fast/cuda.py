"""optimize() on a GPU: bfloat16 or float32, pinned attention, CUDA graphs, torch.compile, fp8.

How data flows: a batch is cut into sizes that the machine already knows (plan). Pixels go to the
device as they are, levels as bytes, and are normalised there, in the patch projection. For few
images launching the kernels costs more than running them: a size is captured as one graph. Large
passes are compiled. A model with parts of the user's own runs on the fast parts as it is called,
without either. Everything here but graphs, compiling and pinning also runs on a CPU, where it is
tested.

The last block computes only the tokens that are read. Its K and V are not absorbed as on a CPU
(attention.py): that saves 1.4 % of ViT-B/16's arithmetic, and at batch 1 adds four kernels to about
130.

Shapes: as in vitlib/encoder.py; P prefix tokens, N patches, M rows of a linear's input.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitlib.encoder import AttentionPool, Block
from vitlib.errors import ConfigError
from vitlib.fast import attention
from vitlib.fast.block import BlockWeights, FastBlock, Norm, gather, plain
from vitlib.fast.linears import FastLinear, Weights
from vitlib.fast.machine import Precision, Route
from vitlib.fast.model import FastViT, naming_memory
from vitlib.fast.parts import (
    Levels,
    Projection,
    as_they_are,
    meaning,
    rebuilt,
    stock,
    with_children,
)
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPositions
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")

Grid = tuple[int, int]
Made = TypeVar("Made")
Function = Callable[[Tensor], Tensor]  # (B, C, H, W) pixels or levels -> (B, ...)

ON = ("cuda",)  # what pins, captures and compiles
BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # sizes of batch that are captured
GRAPH_TOKENS = 64 * 256  # in a batch: above, kernels outlast their launches
TILE = 128  # images: then the rows of every linear are a multiple of its tiles' 128
PASS_TOKENS = 64 * 1024  # in a large pass, as far as TILE allows: ViT-B/16 at 224 takes 256 images
LAUNCHING = 6  # what a pass costs beside its arithmetic, in images of ViT-B/16 at 224 on an H200
REMEMBERED = 64  # sizes and grids that are held; the longest unused goes
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest number of E4M3
CUDNN_TOKENS = 512  # below, cuDNN's plans cost more at start than they save

_FLASH, _EFFICIENT, _CUDNN, _MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
# The first that takes the shape serves it. Flash takes neither float32 nor a bias; cuDNN's masks
# have given NaN (pytorch#196678), and it fails at odd numbers of tokens (#169849, #171627).
BACKENDS = {
    "float32": [_EFFICIENT, _MATH],
    "bias": [_EFFICIENT, _MATH],
    "long": [_CUDNN, _FLASH, _EFFICIENT, _MATH],
    "other": [_FLASH, _EFFICIENT, _MATH],
}


def optimize_cuda(
    model: ViT, precision: Precision, batch_size: int | None, device: torch.device
) -> FastViT:
    """What optimize() gives on a GPU; build.py has checked the arguments. The model is only read.

    Raises ConfigError for a precision that the GPU has not.
    """
    device = known(device)
    way = route(precision, device)
    dtype = way.attention_dtype
    runner = Runner(device, dtype, compiles=device.type == "cuda" and dtype == torch.bfloat16)
    own, given = tuple(as_they_are(model)), model.norm.weight.dtype
    if own and model.norm.weight.device != device:
        raise ConfigError(f"the model has parts of its own: model.to({str(device)!r}) it first")
    if own and given != torch.float32:  # they take what the model's dtype is
        logger.warning("not sped up: %s weights, and parts of its own", given)
        return CudaViT(model, None, precision, given, batch_size, own, runner)
    with torch.inference_mode(False), torch.no_grad():
        parts = Parts(way, device, precision == "fp8", torch.float32 if own else dtype)
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


def route(precision: Precision, device: torch.device) -> Route:
    """What serves a precision on a GPU. Raises ConfigError where nothing does."""
    if precision == "int8":
        raise ConfigError("int8 is for CPUs: use bf16 on a GPU, or fp8 where it has that")
    float32 = Route("fp32", False, "fused", torch.float32, "cuBLAS in float32, not TF32")
    bfloat16 = Route("bf16", False, "fused", torch.bfloat16, "cuBLAS in bfloat16")
    if precision == "fp32" or device.type != "cuda":
        return float32 if precision == "fp32" else bfloat16
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
    if capability < (8, 0):
        logger.warning("bf16 is not used: float32 serves it, as %s has no bfloat16", name)
        return float32
    return bfloat16


class Parts(NamedTuple):
    """Makes the fast counterparts of stock parts, on a device."""

    way: Route
    device: torch.device
    fp8: bool
    stream: torch.dtype  # of tokens between parts: float32 where some are the user's own

    def fast(self, path: str, module: nn.Module) -> nn.Module | None:  # noqa: ARG002
        """A stock part -> its counterpart; None where only its children have one."""
        if isinstance(module, Block):
            return CudaBlock(self.moved(gather(module)), self.way, self.fp8, self.stream)
        if isinstance(module, PatchEmbed):
            return self.embed(module, None)
        if isinstance(module, AttentionPositions):
            return CudaPositions(self.copied(module), self.stream)
        if isinstance(module, AttentionPool):
            return CudaPool(self.copied(module), self.way.attention_dtype)
        if isinstance(module, nn.LayerNorm):
            norm = self.copied(module)
            norm.__class__ = Float32Norm
            return norm
        if isinstance(module, nn.Linear):  # a head: exact, as it is little and gives the answer
            return FastLinear(self.held(plain(module)))
        return None if any(module.children()) else self.copied(module)

    def copied(self, module: nn.Module) -> nn.Module:
        """A module on the device, float32."""
        return copy.deepcopy(module).requires_grad_(False).to(self.device, torch.float32)

    def held(self, weights: Weights) -> Weights:
        """A linear's numbers on the device; copies, so that training the model goes on alone."""
        bias = None if weights.bias is None else weights.bias.to(self.device, copy=True)
        return Weights(weights.weight.to(self.device, copy=True), bias)

    def moved(self, block: BlockWeights) -> BlockWeights:
        """A block's numbers on the device, its norms in the dtype they are computed in."""
        to = self.device, self.way.attention_dtype
        first, second = (
            Norm(n.weight.to(*to, copy=True), n.bias.to(*to, copy=True), n.eps) for n in block.norms
        )
        linears = {name: self.held(weights) for name, weights in block.linears.items()}
        return BlockWeights(
            (first, second), linears, block.num_heads, block.activation, block.rotary
        )

    def embed(self, module: PatchEmbed, levels: Levels | None) -> PatchEmbed:
        """The counterpart of a PatchEmbed, for pixels, or for the levels they are made of."""
        weights, centre = folded(module.proj, levels)
        kernel = module.proj.weight.shape
        linear = FastLinear(self.held(weights), self.way.attention_dtype)
        fast = with_children(module, {"proj": Projection(linear, kernel)})
        tokens = {
            n: None if t is None else t.to(self.device, copy=True)
            for n, t in fast._parameters.items()
        }
        fast.__dict__["_parameters"] = tokens
        fast.__class__ = CudaPatchEmbed
        assert isinstance(fast, CudaPatchEmbed)
        fast.stream, fast.made = self.stream, None
        fast.centre = None if centre is None else centre.to(self.device, linear.dtype)
        return fast


def folded(conv: nn.Conv2d, levels: Levels | None) -> tuple[Weights, Tensor | None]:
    """A patch projection -> its weights (D, C * p * q), and what to take from levels, (C, 1, 1).

    The whole number next to a channel's mean is taken away first: in bfloat16, which holds whole
    numbers up to 256, that is exact, and what is rounded afterwards is then small.
    """
    weight = conv.weight.detach().double()
    bias = None if conv.bias is None else conv.bias.detach().double()
    centre = None
    if levels is not None:
        to = weight.new_tensor
        factor, offset = to(levels.factor), to(levels.offset)
        whole = (-offset / factor).round().clamp(0, 255)
        shift = (weight.sum(dim=(2, 3)) * (offset + factor * whole)).sum(dim=1)
        bias = shift if bias is None else bias + shift
        weight, centre = weight * factor[:, None, None], whole[:, None, None]
    return Weights(weight.flatten(1).float(), None if bias is None else bias.float()), centre


class CudaPatchEmbed(PatchEmbed):
    """A PatchEmbed made by Parts: what does not depend on the pixels is made once a grid."""

    stream: torch.dtype
    centre: Tensor | None
    made: tuple[Grid, Tensor | None, Tensor | None] | None

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels or levels, as floats -> (B, T, D)."""
        _, prefix, places = self.rows(self.patch_grid(images))
        if self.centre is not None:
            images = images - self.centre
        x = self.proj(images).flatten(2).transpose(1, 2).to(self.stream)
        if places is not None:
            x = x + places
        return x if prefix is None else torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)

    def rows(self, grid: Grid) -> tuple[Grid, Tensor | None, Tensor | None]:
        """(h, w) -> the same, the prefix tokens where they stand (1, P, D), positions (1, N, D)."""
        if self.made is None or self.made[0] != grid:
            first = (self.cls_token, self.dist_token)
            tokens: list[Tensor] = [token for token in first if token is not None]
            places = None
            if self.pos_embed is not None:
                class_places, places = self.positions(grid)
                places = places.to(self.stream)
                if self.num_class_rows:
                    tokens = [torch.cat(tokens, dim=1) + class_places]
            if self.reg_token is not None:
                tokens.append(self.reg_token)
            prefix = torch.cat(tokens, dim=1).to(self.stream) if tokens else None
            self.made = grid, prefix, places
        return self.made


class CudaPositions(AttentionPositions):
    """What another module says of where tokens lie, as the kernels take it, once a grid."""

    def __init__(self, of: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(of, AttentionPositions)
        self.of, self.dtype = of, dtype
        self.made: tuple[Grid, list[Tensor]] | None = None

    def for_blocks(self, grid: Grid, device: torch.device) -> list[Tensor]:
        """(h, w) -> as the other's, but always a list, and a bias in this dtype."""
        if self.made is None or self.made[0] != grid:
            found = self.of.for_blocks(grid, device)
            self.made = grid, [w if w.dim() == 3 else aligned(w.to(self.dtype)) for w in found]
        return self.made[1]


def aligned(bias: Tensor) -> Tensor:
    """(1, H, T, T) -> the same numbers, each row beginning at a multiple of 8.

    Where they do not, torch's memory-efficient attention copies the bias at every call.
    """
    rows = bias.new_zeros(*bias.shape[:-1], -(-bias.shape[-1] // 8) * 8)
    rows[..., : bias.shape[-1]] = bias
    return rows[..., : bias.shape[-1]]


class Float32Norm(nn.LayerNorm):
    """A LayerNorm that computes and gives float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return super().forward(x.float())


class CudaPool(nn.Module):
    """An AttentionPool in a dtype of its own; what its token asks is known before any image is."""

    def __init__(self, pool: nn.Module, dtype: torch.dtype) -> None:
        """pool: a copy that is this one's, float32."""
        super().__init__()
        assert isinstance(pool, AttentionPool)
        self.dtype = dtype
        self.asked = (pool.split(pool.q(pool.probe)) * pool.head_dim**-0.5).to(dtype)
        self.pool = pool.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, D)."""
        pool, x = self.pool, x.to(self.dtype)
        q = self.asked.repeat(len(x), 1, 1, 1)
        x = pool.out(pinned(q, pool.split(pool.k(x)), pool.split(pool.v(x)), None))[:, 0]
        return x + pool.mlp(pool.norm(x))  # type: ignore[no-any-return]


class CudaBlock(FastBlock):
    """Stands where a Block stood, with all of it in one dtype, the residual stream too."""

    def __init__(self, weights: BlockWeights, way: Route, fp8: bool, stream: torch.dtype) -> None:
        super().__init__(weights, way, lone=False)
        self.dtype, self.stream = way.attention_dtype, stream
        self.gather = pinned
        for name, of in weights.linears.items():
            if fp8 and not any(side % 16 for side in of.weight.shape):  # which the product asks for
                setattr(self, name, Fp8Linear(of, self.dtype))

    def forward(self, x: Tensor, keep: int | None = None, where: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, Q, D), as Block's."""
        x = x.to(self.dtype)
        gathered = self.attend(self.qkv(self.normed(x, self.norm1)), keep, where)
        x = x[:, :keep] + self.out(gathered)
        return self.mlp(self.normed(x, self.norm2), x).to(self.stream)


def pinned(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """attention.fused by the table's kernel: scaled (B, H, Q, K) and so on -> (B, Q, D)."""
    if q.device.type not in ON:
        return attention.fused(q, k, v, bias)
    with sdpa_kernel(
        backends(q.dtype, q.shape[2], k.shape[2], bias is not None), set_priority=True
    ):
        return attention.fused(q, k, v, bias)


def backends(dtype: torch.dtype, queries: int, tokens: int, bias: bool) -> list[SDPBackend]:
    """The row of BACKENDS that serves Q queries of T tokens."""
    if dtype == torch.float32:
        return BACKENDS["float32"]
    if bias:
        return BACKENDS["bias"]
    long = tokens >= CUDNN_TOKENS and tokens % 2 == 0 and queries == tokens
    return BACKENDS["long" if long else "other"]


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

    def save(self, folder: str | os.PathLike[str]) -> None:  # noqa: ARG002
        """Raises ConfigError: the checkpoint itself is as small, and becomes this in moments."""
        raise ConfigError(
            "a model optimized for a GPU is not saved: save the model it was made from, with "
            "vitlib.save, and optimize it where it runs"
        )

    def _run(self, trunk: ViT, method: str, images: Tensor) -> Tensor:
        """(B, C, H, W) through a method of a trunk -> (B, ...)."""
        runner = self.runner
        if self.as_they_are:  # the user's own parts see each batch as it came
            with naming_memory(images):
                images = images.to(runner.device)
            return super()._run(trunk, method, images)
        if images.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "an optimized model has no gradients: use the model it was made from, or detach() "
                "the pixels"
            )
        on_levels, seen = trunk is self.on_levels, images
        if on_levels:  # their dtype was checked; their shape is left to check
            seen = torch.empty(images.shape, device="meta")
        grid = trunk.patch_embed.patch_grid(seen)
        tokens = self.config.num_prefix_tokens + grid[0] * grid[1]
        sizes = plan(len(images), self.batch_size or pass_size(tokens))

        def function() -> Function:
            return called(at_grid(trunk, grid, runner.device), method, runner.dtype)

        # Nothing kept from here may be inference mode's: it could not be written to outside.
        with torch.inference_mode(False), torch.no_grad(), naming_memory(images):
            given = runner.run((on_levels, method, grid), function, images, sizes, tokens)
            return given.to(self.dtype)


def at_grid(trunk: ViT, grid: Grid, device: torch.device) -> ViT:
    """The same trunk with all that depends on the grid alone made already."""
    embed, positions = copy.copy(trunk.patch_embed), copy.copy(trunk.positions)
    assert isinstance(embed, CudaPatchEmbed)
    embed.rows(grid)
    if positions is not None:
        positions.for_blocks(grid, device)
    changed = {"patch_embed": embed, "positions": positions}
    return of_vit(with_children(trunk, {**trunk._modules, **changed}))


def of_vit(module: nn.Module) -> ViT:
    """A module that is known to be a ViT."""
    assert isinstance(module, ViT)
    return module


def called(trunk: ViT, method: str, dtype: torch.dtype) -> Function:
    """What is run, captured, compiled: pixels or levels (B, C, H, W) -> what the method gives."""
    through = getattr(trunk, method)

    def function(pixels: Tensor) -> Tensor:
        return through(pixels.to(dtype))  # type: ignore[no-any-return]

    return function


class Fp8Linear(FastLinear):
    """A linear in 8-bit floats: a scale for each token and one for each row of the weights."""

    def hold(self, weights: Weights) -> Tensor:
        """(N, K) E4M3; the scales beside it."""
        held, self.scale = quantised(weights.plain())
        return held

    def weights(self) -> Weights:
        """What it was made of, as far as it is known."""
        return Weights(self.held.float() * self.scale, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        levels, scale = quantised(x.reshape(-1, self.in_features))
        y = product(levels, scale, self.held, self.scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> the same in E4M3, and what each row is to be multiplied by, (M, 1) float32."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """(M, K), (M, 1), (N, K), (N, 1), bias (N,) bfloat16 -> (M, N) bfloat16."""
    if x.is_cuda:
        return torch._scaled_mm(
            x, weight.t(), scale_a=x_scale, scale_b=scale.t(), bias=bias,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
    y = F.linear(x.float() * x_scale, weight.float() * scale)
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


@lru_cache(maxsize=8)
def has_fp8(device: torch.device) -> bool:
    """Whether the private product is there, and equals its own definition."""
    x = torch.sin(torch.arange(50 * 64, dtype=torch.float32) * 0.7).reshape(50, 64)
    sample = *quantised(x), *quantised(x[:32] * 3), x[0, :32].to(torch.bfloat16)
    try:
        found = product(*(t.to(device) for t in sample)).float().cpu()
    except (RuntimeError, TypeError, AttributeError, ValueError):  # absent, or not for this GPU
        return False
    exact = product(*sample).float()
    return bool((found - exact).abs().max() <= 2e-2 * exact.abs().max())


def pass_size(tokens: int) -> int:
    """Tokens an image -> images in a large pass, a multiple of TILE."""
    return TILE * max(1, PASS_TOKENS // (tokens * TILE))


@lru_cache(maxsize=1024)
def plan(count: int, largest: int) -> tuple[int, ...]:
    """Images in a batch and in the largest pass -> the sizes of its passes; the last is filled up.

    Only few different sizes come out, as each is captured or compiled once.
    """
    sizes = (*(s for s in (*BUCKETS, TILE) if s < largest), largest)
    whole, rest = divmod(count, largest)
    return (largest,) * whole + (_rest(rest, sizes) if rest or not whole else ())


def _rest(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes for less than the largest of them: one pass filled up, or several, as is quicker."""
    filled = next(size for size in sizes if size >= count)
    below = [size for size in sizes if size < count]
    if not below:
        return (filled,)
    several = below[-1], *_rest(count - below[-1], sizes)
    return min((filled,), several, key=lambda them: sum(them) + LAUNCHING * len(them))


class Runner:
    """Runs batches through functions, each size its own way.

    One batch at a time: all graphs share their memory, and each has one place for its pixels.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, compiles: bool) -> None:
        """dtype: that pixels are taken in; compiles: whether large passes are compiled."""
        self.device, self.dtype = device, dtype
        self.compiles, self.captures = compiles, device.type == "cuda"
        self.lock = threading.Lock()
        self.functions: OrderedDict[Hashable, Function] = OrderedDict()
        self.ways: OrderedDict[Hashable, Way] = OrderedDict()
        self.pool: Any = None
        self.done: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[Runner], tuple[torch.device, torch.dtype, bool]]:
        """A copy has captured nothing yet."""
        return Runner, (self.device, self.dtype, self.compiles)

    def run(
        self,
        key: Hashable,
        function: Callable[[], Function],
        images: Tensor,
        sizes: tuple[int, ...],
        tokens: int,
    ) -> Tensor:
        """(B, C, H, W) pixels or levels, anywhere -> (B, ...), in memory that is the caller's.

        function: makes what the key stands for; sizes: of the passes; tokens: of an image.
        """
        with self.lock:
            if self.device.type != "cuda":
                return self._run(key, function, images, sizes, tokens)
            with torch.cuda.device(self.device):
                if self.done is not None:  # the last batch may have been another stream's
                    torch.cuda.current_stream().wait_event(self.done)
                given = self._run(key, function, images, sizes, tokens)
                self.done = self.done or torch.cuda.Event()  # type: ignore[no-untyped-call]
                self.done.record()
                return given

    def _run(
        self,
        key: Hashable,
        function: Callable[[], Function],
        images: Tensor,
        sizes: tuple[int, ...],
        tokens: int,
    ) -> Tensor:
        shape, dtype = images.shape[1:], images.dtype if is_levels(images) else self.dtype

        def new() -> Way:
            pixels = torch.zeros((size, *shape), dtype=dtype, device=self.device)
            return self._way(remembered(self.functions, key, function), pixels, tokens)

        given, start = [], 0
        for size in sizes:
            way = remembered(self.ways, (key, size), new)
            given.append(way(images[start : start + size]))
            start += size
        return given[0] if len(given) == 1 else torch.cat(given)

    def _way(self, function: Function, pixels: Tensor, tokens: int) -> Way:
        """What runs batches of the shape and dtype of (B, C, H, W)."""
        size = len(pixels)
        if size <= BUCKETS[-1] and size * tokens <= GRAPH_TOKENS:
            return Captured(function, pixels, self)
        if size >= TILE and self.compiles:
            function = self._compiled(function, pixels)
        return Way(function, pixels)

    def _compiled(self, function: Function, pixels: Tensor) -> Function:
        """The function compiled for these pixels; itself where that cannot be done."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, which the caller cannot act on
                fast: Function = torch.compile(function, fullgraph=True, dynamic=False)
                fast(pixels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no Triton, a limit: it runs without
            self.compiles = False
            why = f"{type(error).__name__}: {error}".split("\n")[0]
            logger.warning("torch.compile is not used, and large batches are slower: %s", why)
            return function
        return fast


def is_levels(images: Tensor) -> bool:
    """Whether they are bytes, which go to the device as they are."""
    return images.dtype == torch.uint8


def remembered(held: OrderedDict[Hashable, Made], key: Hashable, make: Callable[[], Made]) -> Made:
    """What is held under a key, made if it is not there; of REMEMBERED the longest unused goes."""
    if key not in held:
        held[key] = make()
        if len(held) > REMEMBERED:
            held.popitem(last=False)
    held.move_to_end(key)
    return held[key]


class Way:
    """A function for one size of batch."""

    def __init__(self, function: Function, pixels: Tensor) -> None:
        """pixels: (B, C, H, W) on the device, that a batch has the shape and dtype of."""
        self.function, self.like = function, pixels.to("meta")
        self.device = pixels.device

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), or fewer images -> as many (B, ...)."""
        if len(images) == len(self.like) and images.device == self.device:
            pixels = images.to(self.like.dtype).contiguous()
        else:
            pixels = torch.zeros_like(self.like, device=self.device)
            put(images, pixels)
        return self.function(pixels)[: len(images)]


class Captured(Way):
    """The same as one CUDA graph, in which no kernel waits for Python.

    Captured at the second batch, as that takes four runs: a size that comes once is run as it is.
    """

    def __init__(self, function: Function, pixels: Tensor, runner: Runner) -> None:
        super().__init__(function, pixels)
        self.pixels, self.runner = pixels, runner
        self.batches = 0
        self.graph: tuple[Callable[[], object], Tensor] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), or fewer images -> as many (B, ...), copied out of the graph's memory."""
        put(images, self.pixels)
        self.batches += 1
        if self.batches == 2 and self.runner.captures:
            self.graph = self.captured()
        if self.graph is None:
            return self.function(self.pixels)[: len(images)]
        replay, given = self.graph
        replay()
        return given[: len(images)].clone()

    def captured(self) -> tuple[Callable[[], object], Tensor] | None:
        """What replays, and where its answer lies; None where it cannot be captured."""
        try:
            return capture(self.function, self.pixels, self.runner)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.runner.captures = False
            logger.warning("CUDA graphs are not used: %s", str(error).split("\n")[0])
            return None


def put(images: Tensor, pixels: Tensor) -> None:
    """(b, C, H, W) -> the first b of (B, C, H, W), in their dtype, without waiting for the copy.

    From the CPU that takes pinned memory, and the caller's may be written to meanwhile: ours, which
    torch keeps until the copy is done. bfloat16 is made there, as it is half as much to copy.
    """
    if pixels.is_cuda and not images.is_cuda:
        held = torch.empty(images.shape, dtype=pixels.dtype, pin_memory=True)
        images = held.copy_(images)
    pixels[: len(images)].copy_(images, non_blocking=True)


def capture(
    function: Function, pixels: Tensor, runner: Runner
) -> tuple[Callable[[], object], Tensor]:
    """A function of static pixels -> what replays it, and its static answer (B, ...)."""
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    here = torch.cuda.current_stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(2):  # plans and workspaces are made by running, which a capture forbids
            function(pixels)
    here.wait_stream(side)
    runner.pool = runner.pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    # Other threads may decode and copy meanwhile: only this one's calls are the capture's.
    with torch.cuda.graph(graph, pool=runner.pool, capture_error_mode="thread_local"):
        given = function(pixels)
    return graph.replay, given
