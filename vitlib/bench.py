"""Speed of a model on this machine in every precision, relative to the machine's own GEMM rate.

How data flows: the model is optimized once for each precision. For each batch size, the model as
loaded, its optimized forms and bare matrix products take turns, so that other load on the machine
affects all of them alike. Comparisons with other libraries are in benchmarks/.
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
from vitlib.errors import ConfigError
from vitlib.fast import FastViT, onednn_ops, optimize
from vitlib.fast.block import LastBlock
from vitlib.fast.cpu import PRECISIONS, Precision, this_machine
from vitlib.fast.flops import flops
from vitlib.fast.int8_linears import Int8Linear
from vitlib.fast.linears import FastLinear
from vitlib.fast.model import explain_out_of_memory
from vitlib.fast.report import precision_support
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.system.torch_state import unavailable
from vitlib.vit import ViT

M, K, N = 1576, 768, 3072  # the reference GEMM: eight images in ViT-B/16's first MLP linear
GEMM_GFLOP = 2 * M * K * N / 1e9
TURN_SECONDS = 0.25  # length of a turn; it has at least one call
NOISE_PATCHES = 4  # sides of the image that calibrates int8 without photos
AS_LOADED, GEMM = "as loaded", "gemm "
Call = Callable[..., object]
_PRECISION: dict[str, Precision] = {name: name for name in PRECISIONS}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """Speed of one form of the model at one batch size; times are of whole calls.

    Attributes:
        precision: Precision, or "as loaded" for the model without optimize().
        batch_size: Images in a call.
        images_per_second: Median over the turns.
        p50_ms: Median milliseconds of a call.
        p99_ms: 99th percentile of the milliseconds of a call.
        gemm_share: Share of the GEMM rate of its arithmetic; None where there is no rate.
        times_as_loaded: Images a second, divided by those of the model as loaded.
    """

    precision: str
    batch_size: int
    images_per_second: float
    p50_ms: float
    p99_ms: float
    gemm_share: float | None
    times_as_loaded: float


@dataclass(frozen=True)
class Bench:
    """Result of measure(); `as_dict` is what `vitlib bench --json` prints.

    Attributes:
        model: Name of the model.
        image_size: Pixels (height, width).
        gflop: Operations of one image in 1e9, see flops().
        dtype: Dtype of the weights as loaded.
        device: Name of the device.
        torch: Version of torch.
        threads: CPU threads.
        rounds: Turns of each form.
        load_seconds: Time to load the model, or None.
        optimize_seconds: Time of optimize(), by precision.
        arithmetic: What the large linears compute in, by form.
        left_out: Reason why a precision was not measured, by precision.
        in_8_bits: Linears of the blocks that int8 runs in 8 bits, and all of them; which ones
            depends on the calibration. None without int8.
        calibrated: int8 was calibrated with the caller's images, not with noise.
        gemm: GFLOP/s of the reference GEMM, by arithmetic; median over all turns.
        timings: Speed of each form at each batch size.
    """

    model: str
    image_size: tuple[int, int]
    gflop: float
    dtype: str
    device: str
    torch: str
    threads: int
    rounds: int
    load_seconds: float | None
    optimize_seconds: Mapping[str, float]
    arithmetic: Mapping[str, str]
    left_out: Mapping[str, str]
    in_8_bits: tuple[int, int] | None
    calibrated: bool
    gemm: Mapping[str, float]
    timings: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """Convert to types of JSON, with the shape of the reference GEMM."""
        result = asdict(self) | {"gemm_shape": [M, K, N]}
        tuples = {name: value for name, value in result.items() if isinstance(value, tuple)}
        return result | {name: list(value) for name, value in tuples.items()}


def random_model(
    size: str, device: torch.device | str | None = None, image_size: tuple[int, int] = (224, 224)
) -> ViT:
    """Build a model in eval mode with random weights: speed does not depend on them.

    Args:
        size: Size for ViTConfig.named, as in "B/16".
        device: Device of the model; None means the CPU.
        image_size: Pixels (height, width).

    Raises:
        ConfigError: There is no such size or device.
    """
    model = ViT(ViTConfig.named(size, num_classes=1000, image_size=image_size)).eval()
    model.image_processor = ImageProcessor.from_profile("timm", "vit", model.config.image_size)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's errors for devices it lacks
        raise unavailable(device) from error


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
    """Time a model on its device, at its own image size.

    Args:
        model: A ViT in eval mode.
        name: Name of the model, for the result.
        precisions: Precisions to measure; None takes all that the device supports.
        batch_sizes: Images in a call, each 1 or more.
        rounds: Turns of each form, after one that does not count.
        turn_seconds: Least length of a turn.
        calibrate: Photos or pixels that calibrate int8; None takes noise.
        load_seconds: Time to load the model, for the result.
        progress: Show a bar on stderr.

    Returns:
        Speeds of every form, and of the reference GEMM.

    Raises:
        ConfigError: A number is below 1, the model is in training mode, or the device does not
            support a chosen precision.
        ImageError: A photo cannot be decoded, or a batch does not fit in memory.
    """
    device = next(model.parameters()).device
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"rounds={rounds}, batch_sizes={tuple(batch_sizes)}: expected 1 or more")
    if model.training or device.type == "meta":
        raise ConfigError("expected a model with weights, in eval mode: load() gives one")
    optimized = _forms(model, precisions, calibrate)
    forms = optimized.calls
    arithmetic = {form: _arithmetic(form, model) for form in forms}
    gemms = _gemms(device)
    timings: list[Timing] = []
    gemm_rates: dict[str, list[float]] = {kind: [] for kind in gemms}  # GFLOP/s of each turn
    total = len(batch_sizes) * (rounds + 1) * (len(forms) + len(gemms))
    from tqdm import tqdm

    with tqdm(total=total, unit="turn", leave=False, disable=not progress) as bar:
        for batch_size in batch_sizes:
            pixels = _noise(model, batch_size)
            calls = {form: partial(run, pixels) for form, run in forms.items()}
            # Forms and GEMMs of a batch size together: other load on the machine affects all alike.
            with explain_out_of_memory(pixels):
                turns = _in_turns(calls | gemms, rounds, turn_seconds, device, bar.update)
            rates = {kind: [GEMM_GFLOP / t for t in _means(turns[kind])] for kind in gemms}
            shown = {form: turns[form] for form in forms}
            gflop = {k: _median(r) for k, r in rates.items()}
            timings += _timings(shown, batch_size, flops(model.config) / 1e9, arithmetic, gflop)
            for kind, values in rates.items():
                gemm_rates[kind] += values
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
        optimize_seconds=optimized.seconds,
        arithmetic=arithmetic,
        left_out=optimized.left_out,
        in_8_bits=optimized.in_8_bits,
        calibrated=calibrate is not None,
        gemm={kind.removeprefix(GEMM): _median(rates) for kind, rates in gemm_rates.items()},
        timings=tuple(timings),
    )


class _Forms(NamedTuple):
    """The model and its optimized forms, all by the name of the form."""

    calls: dict[str, Call]
    seconds: dict[str, float]  # that optimize() took
    left_out: dict[str, str]  # reasons
    in_8_bits: tuple[int, int] | None


def _forms(
    model: ViT,
    precisions: Sequence[Precision] | None,
    calibrate: Iterable[ImageLike] | Tensor | None,
) -> _Forms:
    """Optimize for each precision; without a choice, unsupported ones are left out."""
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
    """Count the blocks' linears that a forward runs: those in 8 bits, and all."""
    linears: list[nn.Module] = []
    for block in fast.trunk.blocks:
        # After the last block the head reads prefix tokens alone.
        runs = block.prefix_block if isinstance(block, LastBlock) else block
        linears += [part for part in runs.modules() if isinstance(part, nn.Linear | FastLinear)]
    return sum(isinstance(linear, Int8Linear) for linear in linears), len(linears)


def _noise(model: ViT, count: int) -> Tensor:
    """Draw normal pixels (count, C, H, W), the same each time."""
    cfg, device = model.config, next(model.parameters()).device
    source = torch.Generator().manual_seed(0)
    return torch.randn(
        count, cfg.in_channels, *cfg.image_size, generator=source, dtype=torch.float32
    ).to(device)


def _little_noise(model: ViT) -> Tensor:
    """Draw one small image (1, C, h, w) for calibration: speed does not depend on its result."""
    p, q = model.config.patch_size
    return _noise(model, 1)[:, :, : NOISE_PATCHES * p, : NOISE_PATCHES * q]


def _arithmetic(form: str, model: ViT) -> str:
    """Return the arithmetic of a form's large linears; "" where no GEMM is measured in it."""
    if form == AS_LOADED:
        return next((n for n, d in _DTYPES.items() if d == next(model.parameters()).dtype), "")
    kind = next(model.parameters()).device.type
    if kind == "cpu":
        return precision_support(_PRECISION[form]).arithmetic
    if kind == "cuda" and form != "fp8":
        from vitlib.fast.cuda import cuda_plan

        return cuda_plan(_PRECISION[form], next(model.parameters()).device).arithmetic
    # Elsewhere optimize() stays in float32.
    return form if kind == "cuda" else "fp32"


def _gemms(device: torch.device) -> dict[str, Call]:
    """Build the reference GEMM of each arithmetic, on a CPU of the operations of optimize()."""
    source = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, K, generator=source, dtype=torch.float32) for n in (M, N))
    gemms: dict[str, Call] = {}
    for name, dtype in _DTYPES.items():
        a, b = x.to(device, dtype), weight.to(device, dtype)
        if device.type == "cpu" and onednn_ops.has_packed_linear(dtype):
            gemms[GEMM + name] = partial(onednn_ops.linear, a, onednn_ops.pack(b), None)
        elif device.type != "cpu" or dtype == torch.float32:
            gemms[GEMM + name] = partial(F.linear, a, b)
    if device.type == "cpu" and onednn_ops.has_int8_linear():
        # Values that spread over the range of 8 bits, as calibrated activations do.
        levels = (x * 40 + onednn_ops.UINT8_ZERO_POINT).clamp(0, 255).to(torch.uint8)
        packed = onednn_ops.pack_int8((weight * 40).clamp(-127, 127).to(torch.int8))
        scale, out = torch.full((N,), 1e-3, dtype=torch.float32), torch.bfloat16
        gemms[GEMM + "int8"] = partial(
            onednn_ops.linear_int8,
            levels,
            0.01,
            onednn_ops.UINT8_ZERO_POINT,
            packed,
            scale,
            None,
            out,
        )
    return gemms


def _in_turns(
    calls: Mapping[str, Call],
    rounds: int,
    turn_seconds: float,
    device: torch.device,
    tick: Callable[[int], object],
) -> dict[str, list[list[float]]]:
    """Time calls in turns, and return the seconds of each call in each turn.

    The first round does not count. Every other one runs backwards: no call always follows another.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    for count in range(rounds + 1):
        for name in names[:: 1 if count % 2 else -1]:
            turn = _turn(calls[name], turn_seconds, device)
            seconds[name] += [turn] if count else []
            tick(1)
    return seconds


@torch.inference_mode()
def _turn(call: Call, turn_seconds: float, device: torch.device) -> list[float]:
    """Call repeatedly for a time, at least once, and return the seconds of each call."""
    seconds: list[float] = []
    start = now = time.perf_counter()
    while not seconds or now - start < turn_seconds:
        before = time.perf_counter()
        call()
        if device.type != "cpu":  # a call only queues kernels
            torch.accelerator.synchronize()
        now = time.perf_counter()
        seconds.append(now - before)
    return seconds


def _timings(
    turns: Mapping[str, list[list[float]]],
    batch_size: int,
    gflop: float,
    arithmetic: Mapping[str, str],
    rates: Mapping[str, float],
) -> list[Timing]:
    """Summarise the turns of each form relative to the GEMM rates of the same rounds."""
    speeds = {form: _median(batch_size / t for t in _means(timed)) for form, timed in turns.items()}
    timings = []
    for form, speed in speeds.items():
        milliseconds = [1000 * t for turn in turns[form] for t in turn]
        rate = rates.get(GEMM + arithmetic[form])
        timings.append(
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
    return timings


def _means(turns: list[list[float]]) -> list[float]:
    return [float(np.mean(turn)) for turn in turns]


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _device(device: torch.device) -> str:
    """Describe a device for readers."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    machine = this_machine()
    return f"{machine.model} ({machine.architecture}; {machine.features})"
