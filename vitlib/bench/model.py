"""Speed of a model on this machine in every precision, relative to the machine's own GEMM rate.

How data flows: the model is optimized once for each precision, and may be compiled as well. For
each batch size, the model as loaded, its other forms and bare matrix products take turns, so that
other load on the machine affects all of them alike. Comparisons with other libraries are in
benchmarks/.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.bench.turns import (
    AS_LOADED,
    COMPILED,
    GEMM,
    TURN_SECONDS,
    Bench,
    Call,
    K,
    M,
    N,
    Timing,
    describe_device,
    mean_seconds,
    median,
    summarise_turns,
    time_turns,
)
from vitlib.config import ViTConfig
from vitlib.errors import ConfigError, check_int
from vitlib.fast import FastViT, onednn_ops, optimize
from vitlib.fast.block import LastBlock
from vitlib.fast.cpu import PRECISIONS, Precision
from vitlib.fast.flops import flops
from vitlib.fast.int8_linears import Int8Linear
from vitlib.fast.linears import FastLinear
from vitlib.fast.report import precision_support
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.predict.optimized_model import compile_optimized, count_programs
from vitlib.system.memory import explain_out_of_memory
from vitlib.system.torch_state import unavailable
from vitlib.vit import ViT

GEMM_GFLOP = 2 * M * K * N / 1e9
NOISE_PATCHES = 4  # sides of the image that calibrates int8 without photos
_PRECISION: dict[str, Precision] = {name: name for name in PRECISIONS}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    compile: bool = False,  # noqa: A002
    load_seconds: float | None = None,
    threads: Sequence[int] = (),
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
        compile: True also times each precision compiled, as compile= of vitlib.optimize.
        load_seconds: Time to load the model, for the result.
        threads: Numbers of CPU threads, each timed; none means torch's own number.
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
    counts = check_threads(threads, device)
    if model.training or device.type == "meta":
        raise ConfigError("expected a model with weights, in eval mode: load() gives one")
    optimized = _forms(model, precisions, calibrate, compile)
    forms = optimized.calls
    arithmetic = {form: _arithmetic(form, model) for form in forms}
    gemms = _gemms(device)
    timings: list[Timing] = []
    gemm_rates: dict[str, list[float]] = {kind: [] for kind in gemms}  # GFLOP/s of each turn
    total = len(batch_sizes) * len(counts) * (rounds + 1) * (len(forms) + len(gemms))
    from tqdm import tqdm

    with tqdm(total=total, unit="turn", leave=False, disable=not progress) as bar:
        for batch_size in batch_sizes:
            pixels = _noise(model, batch_size)
            calls = {form: partial(run, pixels) for form, run in forms.items()} | gemms
            # A compiled form compiles in its first turn, which does not count.
            with explain_out_of_memory(pixels):
                turns = time_on_threads(calls, counts, rounds, turn_seconds, device, bar.update)
            for count in counts:
                rates = {k: [GEMM_GFLOP / t for t in mean_seconds(turns[count, k])] for k in gemms}
                shown = {form: turns[count, form] for form in forms}
                gflop = {kind: median(values) for kind, values in rates.items()}
                timings += summarise_turns(
                    shown, batch_size, flops(model.config) / 1e9, arithmetic, gflop, count
                )
                for kind, values in rates.items() if count == max(counts) else ():
                    gemm_rates[kind] += values
    return Bench(
        model=name,
        image_size=model.config.image_size,
        gflop=flops(model.config) / 1e9,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=describe_device(device),
        torch=torch.__version__,
        threads=counts,
        rounds=rounds,
        load_seconds=load_seconds,
        optimize_seconds=optimized.seconds,
        arithmetic=arithmetic,
        left_out=optimized.left_out,
        in_8_bits=optimized.in_8_bits,
        calibrated=calibrate is not None,
        compiled=_count_programs(forms),
        gemm={kind.removeprefix(GEMM): median(rates) for kind, rates in gemm_rates.items()},
        timings=tuple(timings),
    )


def check_threads(threads: Sequence[int], device: torch.device) -> tuple[int, ...]:
    """Check numbers of threads.

    Args:
        threads: The numbers; none means torch's own.
        device: Device of the model.

    Returns:
        Each number once.

    Raises:
        ConfigError: A number is below 1, or the model is not on a CPU.
    """
    counts = tuple(dict.fromkeys(check_int("threads", count, at_least=1) for count in threads))
    if counts and device.type != "cpu":
        raise ConfigError(
            f"threads={counts} on {device}: expected a model on the CPU, or no threads"
        )
    return counts or (torch.get_num_threads(),)


def time_on_threads(
    calls: Mapping[str, Call],
    threads: Sequence[int],
    rounds: int,
    turn_seconds: float,
    device: torch.device,
    tick: Callable[[int], object],
) -> dict[tuple[int, str], list[list[float]]]:
    """Time calls in turns, each with every number of threads.

    Args:
        calls: Calls by name, of one batch size: other load on the machine affects all alike.
        threads: Numbers of threads. The process's own is set back.
        rounds: As in time_turns.
        turn_seconds: As in time_turns.
        device: As in time_turns.
        tick: As in time_turns.

    Returns:
        Seconds of each call in each turn, by number of threads and name.
    """

    def run(count: int, call: Call) -> None:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        call()

    keys = {f"{count} {name}": (count, name) for count in threads for name in calls}
    on_threads = {key: partial(run, count, calls[name]) for key, (count, name) in keys.items()}
    before = torch.get_num_threads()
    try:
        turns = time_turns(on_threads, rounds, turn_seconds, device, tick)
    finally:
        torch.set_num_threads(before)
    return {keys[key]: seconds for key, seconds in turns.items()}


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
    compile: bool,  # noqa: A002
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
        if compile:
            calls[precision + COMPILED] = compile_optimized(fast, model)
        in_8_bits = _in_8_bits(fast) if int8 else in_8_bits
    return _Forms(calls, seconds, left_out, in_8_bits)


def _count_programs(forms: Mapping[str, Call]) -> dict[str, tuple[int, int]]:
    """Count the compiled programs of each precision: those that are used, and all."""
    counts = {form: count_programs(call) for form, call in forms.items()}
    return {form.removesuffix(COMPILED): n for form, n in counts.items() if n is not None}


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
    form = form.removesuffix(COMPILED)
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
