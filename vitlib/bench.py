"""How fast vitlib runs a model on this machine, in every precision, beside the machine's own rate.

How data flows: the model is optimized once a precision; for each batch size the model as it was
loaded, its fast forms and the bare matrix products take turns, so that what else the machine does
meanwhile meets all of them alike. Nothing here knows of other libraries: benchmarks/ does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.errors import ConfigError, first_line
from vitlib.fast import FastViT, onednn_ops, optimize
from vitlib.fast.block import LastBlock
from vitlib.fast.cpu import PRECISIONS, Precision, this_machine
from vitlib.fast.int8_linears import Int8Linear
from vitlib.fast.linears import FastLinear
from vitlib.fast.model import explain_out_of_memory
from vitlib.fast.report import precision_support
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.vit import ViT

# The yardstick's product: eight images in the first linear of ViT-B/16's MLP.
M, K, N = 1576, 768, 3072
GEMM_GFLOP = 2 * M * K * N / 1e9
TURN_SECONDS = 0.25  # a turn is calls for so long, at least one
NOISE_PATCHES = 4  # down and across, of the one image to calibrate with where no photos are given
AS_LOADED, GEMM = "as loaded", "gemm "
Call = Callable[..., object]
_PRECISION: dict[str, Precision] = {name: name for name in PRECISIONS}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """One form of the model at one batch size; the times are of whole calls, batches of pixels."""

    precision: str  # or "as loaded": the model without optimize()
    batch_size: int
    images_per_second: float  # median over the turns
    p50_ms: float
    p99_ms: float
    gemm_share: float | None  # of the GEMM rate of its arithmetic; None: that was not measured
    times_as_loaded: float  # images a second over those of the model as loaded


@dataclass(frozen=True)
class Bench:
    """The answer of measure(); `as_dict` is what `vitlib bench --json` prints."""

    model: str
    image_size: tuple[int, int]
    gflop: float  # of one image: see flops()
    dtype: str  # of the weights as loaded
    device: str
    torch: str  # version
    threads: int
    rounds: int
    load_seconds: float | None
    optimize_seconds: Mapping[str, float]  # by precision
    arithmetic: Mapping[str, str]  # by precision: what serves it
    left_out: Mapping[str, str]  # precision -> why it was not measured
    # Of int8, how many of the blocks' linears run in 8 bits, and how many there are: those that
    # would move the answer too far do not, and which these are depends on what calibrated them.
    in_8_bits: tuple[int, int] | None
    calibrated: bool  # with photos or pixels that were given, not with noise
    gemm: Mapping[str, float]  # by arithmetic, GFLOP/s: median over all turns
    timings: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        found = asdict(self)
        found["image_size"] = list(self.image_size)
        found["gemm_shape"] = [M, K, N]
        found["timings"] = list(found["timings"])
        found["in_8_bits"] = self.in_8_bits and list(self.in_8_bits)
        return found


def flops(cfg: ViTConfig) -> int:
    """Multiplications and additions of one image at cfg.image_size, every token in every block.

    Nominal: those of the linears, the patch projection and attention's two products, whatever a
    faster form leaves out. ViT-B/16 at 224 has 35.13e9 (2010.11929, table 1, for its numbers).
    """
    patches = cfg.grid_size[0] * cfg.grid_size[1]
    t, d = patches + cfg.num_prefix_tokens, cfg.embed_dim
    embed = patches * cfg.in_channels * cfg.patch_size[0] * cfg.patch_size[1] * d
    mlp = (3 if cfg.activation == "swiglu" else 2) * d * cfg.mlp_dim  # of a token
    block = t * (4 * d * d + mlp) + 2 * t * t * d
    pool = 0
    if cfg.pool == "map":  # one query; keys and values of all tokens
        pool = 2 * t * d * d + 2 * d * d + 2 * t * d + mlp
    elif cfg.pool == "pooler":
        pool = d * cfg.pooler_dim
    pooled = 2 * d if cfg.pool == "cls+mean" else cfg.pooler_dim if cfg.pool == "pooler" else d
    head = cfg.num_features * cfg.num_classes * (2 if cfg.dist_head else 1)
    return 2 * (embed + cfg.depth * block + pool + pooled * cfg.projection_dim + head)


def random_model(size: str, device: torch.device | str | None = None) -> ViT:
    """A model of ViTConfig.named, 1000 classes, with random weights: timing needs no others.

    Raises ConfigError for a size or a device that there is not.
    """
    cfg = ViTConfig.named(size, num_classes=1000)
    model = ViT(cfg).eval()
    model.image_processor = ImageProcessor.from_profile("timm", "vit", cfg.image_size)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's, for what it has not got
        raise ConfigError(f"device={device} cannot be had: {first_line(error)}") from error


def measure(
    model: ViT,
    name: str,
    *,
    precisions: Sequence[Precision] | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 10,
    turn_seconds: float = TURN_SECONDS,
    calibrate: Iterable[ImageLike] | Tensor | None = None,
    load_seconds: float | None = None,
    progress: bool = False,
) -> Bench:
    """Time a model where it is, in eval mode, at its own image size.

    name, load_seconds: for the answer only. precisions: None takes all that the device can do, and
    says which it cannot. batch_sizes: images in a call. rounds: turns of each form, after one that
    does not count; turn_seconds: how long a turn lasts at least. calibrate: photos or pixels for
    int8, None makes noise. progress: a bar on stderr.

    Raises ConfigError for a number below 1, for a precision asked for that the device cannot do;
    ImageError for a photo to calibrate with that is none, and a batch that does not fit in memory.
    """
    device = next(model.parameters()).device
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"rounds={rounds}, batch_sizes={tuple(batch_sizes)}: expected 1 or more")
    if model.training or device.type == "meta":
        raise ConfigError("expected a model with weights, in eval mode: load() gives one")
    made = _forms(model, precisions, calibrate)
    forms = made.calls
    arithmetic = {form: _arithmetic(form, model) for form in forms}
    gemms = _gemms(device)
    timings: list[Timing] = []
    of_gemms: dict[str, list[float]] = {kind: [] for kind in gemms}  # a turn's GFLOP/s
    total = len(batch_sizes) * (rounds + 1) * (len(forms) + len(gemms))
    from tqdm import tqdm

    with tqdm(total=total, unit="turn", leave=False, disable=not progress) as bar:
        for batch_size in batch_sizes:
            pixels = _noise(model, batch_size)
            calls = {form: partial(run, pixels) for form, run in forms.items()}
            with explain_out_of_memory(pixels):
                turns = _in_turns(calls | gemms, rounds, turn_seconds, device, bar.update)
            rates = {kind: [GEMM_GFLOP / t for t in _means(turns[kind])] for kind in gemms}
            shown = {form: turns[form] for form in forms}
            gflop = {k: _median(r) for k, r in rates.items()}
            timings += _timings(shown, batch_size, flops(model.config) / 1e9, arithmetic, gflop)
            for kind, found in rates.items():
                of_gemms[kind] += found
    return Bench(
        model=name,
        image_size=model.config.image_size,
        gflop=flops(model.config) / 1e9,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=_device(device),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        rounds=rounds,
        load_seconds=load_seconds,
        optimize_seconds=made.seconds,
        arithmetic=arithmetic,
        left_out=made.left_out,
        in_8_bits=made.in_8_bits,
        calibrated=calibrate is not None,
        gemm={kind.removeprefix(GEMM): _median(found) for kind, found in of_gemms.items()},
        timings=tuple(timings),
    )


class _Forms(NamedTuple):
    """The model and its fast forms, by precision."""

    calls: dict[str, Call]
    seconds: dict[str, float]  # that optimize() took
    left_out: dict[str, str]  # precision -> why
    in_8_bits: tuple[int, int] | None


def _forms(
    model: ViT,
    precisions: Sequence[Precision] | None,
    calibrate: Iterable[ImageLike] | Tensor | None,
) -> _Forms:
    """Optimize for each precision; where none was asked for, those that cannot be had are told."""
    calls: dict[str, Call] = {AS_LOADED: model}
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    in_8_bits = None
    for precision in dict.fromkeys(PRECISIONS if precisions is None else precisions):
        int8 = precision == "int8"
        photos = (_little_noise(model) if calibrate is None else calibrate) if int8 else None
        start = time.perf_counter()
        try:
            calls[precision] = fast = optimize(model, precision, calibrate=photos)
        except ConfigError as error:
            if precisions is not None or (int8 and calibrate is not None):
                raise
            left_out[precision] = str(error)
            continue
        seconds[precision] = time.perf_counter() - start
        in_8_bits = _in_8_bits(fast) if int8 else in_8_bits
    return _Forms(calls, seconds, left_out, in_8_bits)


def _in_8_bits(fast: FastViT) -> tuple[int, int]:
    """Of the blocks' linears that run in a forward: those in 8 bits, and all."""
    linears: list[nn.Module] = []
    for block in fast.trunk.blocks:
        runs = (
            block.prefix_block if isinstance(block, LastBlock) else block
        )  # the head reads class tokens
        linears += [part for part in runs.modules() if isinstance(part, nn.Linear | FastLinear)]
    return sum(isinstance(linear, Int8Linear) for linear in linears), len(linears)


def _noise(model: ViT, count: int) -> Tensor:
    """Pixels of a normal distribution (count, C, H, W), always the same."""
    cfg, device = model.config, next(model.parameters()).device
    source = torch.Generator().manual_seed(0)
    return torch.randn(
        count, cfg.in_channels, *cfg.image_size, generator=source, dtype=torch.float32
    ).to(device)


def _little_noise(model: ViT) -> Tensor:
    """One small image (1, C, h, w) to calibrate with: what levels it gives costs no time."""
    p, q = model.config.patch_size
    return _noise(model, 1)[:, :, : NOISE_PATCHES * p, : NOISE_PATCHES * q]


def _arithmetic(form: str, model: ViT) -> str:
    """What the large linears of a form compute in; "" where the yardstick has no such thing."""
    if form == AS_LOADED:
        return next((n for n, d in _DTYPES.items() if d == next(model.parameters()).dtype), "")
    kind = next(model.parameters()).device.type
    if kind == "cpu":
        return precision_support(_PRECISION[form]).arithmetic
    if kind == "cuda" and form != "fp8":
        from vitlib.fast.cuda import cuda_plan

        return cuda_plan(_PRECISION[form], next(model.parameters()).device).arithmetic
    return form if kind == "cuda" else "fp32"  # elsewhere optimize() stays in float32


def _gemms(device: torch.device) -> dict[str, Call]:
    """The yardstick's product for each arithmetic that there is, under GEMM and its name.

    On a CPU with packed weights, through the operations that optimize() uses.
    """
    source = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, K, generator=source, dtype=torch.float32) for n in (M, N))
    found: dict[str, Call] = {}
    for name, dtype in _DTYPES.items():
        a, b = x.to(device, dtype), weight.to(device, dtype)
        if device.type == "cpu" and onednn_ops.has_packed_linear(dtype):
            found[GEMM + name] = partial(onednn_ops.linear, a, onednn_ops.pack(b), None)
        elif device.type != "cpu" or dtype == torch.float32:
            found[GEMM + name] = partial(F.linear, a, b)
    if device.type == "cpu" and onednn_ops.has_int8_linear():
        levels = (x * 40 + onednn_ops.UINT8_ZERO_POINT).clamp(0, 255).to(torch.uint8)
        packed = onednn_ops.pack_int8((weight * 40).clamp(-127, 127).to(torch.int8))
        scale, out = torch.full((N,), 1e-3, dtype=torch.float32), torch.bfloat16
        found[GEMM + "int8"] = partial(
            onednn_ops.linear_int8,
            levels,
            0.01,
            onednn_ops.UINT8_ZERO_POINT,
            packed,
            scale,
            None,
            out,
        )
    return found


def _in_turns(
    calls: Mapping[str, Call],
    rounds: int,
    turn_seconds: float,
    device: torch.device,
    tick: Callable[[int], object],
) -> dict[str, list[list[float]]]:
    """Each one's turns, each the seconds of its calls; the first round does not count.

    Every other round goes backwards, so that none always follows the same one.
    """
    taken: dict[str, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    for count in range(rounds + 1):
        for name in names[:: 1 if count % 2 else -1]:
            turn = _turn(calls[name], turn_seconds, device)
            taken[name] += [turn] if count else []
            tick(1)
    return taken


@torch.inference_mode()
def _turn(call: Call, turn_seconds: float, device: torch.device) -> list[float]:
    """One call after another for so long, at least one; the seconds of each."""
    taken: list[float] = []
    start = now = time.perf_counter()
    while not taken or now - start < turn_seconds:
        before = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        taken.append(now - before)
    return taken


def _timings(
    turns: Mapping[str, list[list[float]]],
    batch_size: int,
    gflop: float,
    arithmetic: Mapping[str, str],
    rates: Mapping[str, float],
) -> list[Timing]:
    """The turns of each form, and the GEMM rates of the same rounds -> what is told of them."""
    speeds = {form: _median(batch_size / t for t in _means(of)) for form, of in turns.items()}
    found = []
    for form, speed in speeds.items():
        milliseconds = [1000 * t for turn in turns[form] for t in turn]
        rate = rates.get(GEMM + arithmetic[form])
        found.append(
            Timing(
                precision=form,
                batch_size=batch_size,
                images_per_second=speed,
                p50_ms=float(np.percentile(milliseconds, 50)),
                p99_ms=float(np.percentile(milliseconds, 99)),
                gemm_share=None if rate is None else gflop * speed / rate,
                times_as_loaded=speed / speeds[AS_LOADED],
            )
        )
    return found


def _means(turns: list[list[float]]) -> list[float]:
    return [float(np.mean(turn)) for turn in turns]


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _device(device: torch.device) -> str:
    """In words, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    machine = this_machine()
    return f"{machine.model} ({machine.architecture}; {machine.features})"
