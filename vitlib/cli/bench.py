"""vitlib bench"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitlib.cli.info import columns
from vitlib.cli.options import (
    SourceOptions,
    on_terminal,
    photos_in,
    quiet,
    source_options,
    table,
    unlogged,
)
from vitlib.cli.printing import echo, echo_json

if TYPE_CHECKING:
    from vitlib.bench import Bench, Timing
    from vitlib.vit import ViT

# Of fast.machine, which `vitlib --help` does not load.
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")
SIZE = "B/16"


@click.command()
@click.option("--model", "-m", help="Hub id, folder or weights file. Default: random weights.")
@click.option("--size", help=f"Of a model with random weights, as in S/16.  [default: {SIZE}]")
@source_options
@click.option("--device", help="As torch names it. Default: CUDA where there is one.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="May be repeated. Default: all that the device can do.",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 8),
    show_default=True,
    help="Images in a call; may be repeated.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=10, show_default=True, help="Turns of each form."
)
@click.option(
    "--calibrate",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Photos to calibrate int8 with. Default: noise.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def bench(
    model: str | None,
    size: str | None,
    reading: SourceOptions,
    device: str | None,
    precisions: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    rounds: int,
    calibrate: Path | None,
    as_json: bool,
) -> None:
    """Time vitlib on this machine: every precision, and its GEMM rate.

    The model as it is loaded, its fast forms and bare matrix products (1576 x 768 x 3072, packed)
    take turns. Shown are the median of images a second, the latency of a call, the share of the
    GEMM rate of the same arithmetic (every multiply-add of the whole model counted), and how many
    times as fast as the model as loaded that is.
    """
    if model is not None and size is not None:
        raise click.UsageError("--size is of a model with random weights: leave it or --model out")
    if calibrate is not None and precisions and "int8" not in precisions:
        raise click.UsageError("--calibrate is for int8: leave it out, or ask for int8 too")
    from vitlib.bench import measure

    quiet()
    name = model or f"ViT-{size or SIZE}, random weights"
    with unlogged():
        built, seconds = made(model, size, device, reading)
        found = measure(
            built,
            name,
            precisions=precisions or None,  # type: ignore[arg-type]
            batch_sizes=tuple(dict.fromkeys(batch_sizes)),
            rounds=rounds,
            calibrate=None if calibrate is None else photos_in(calibrate, "--calibrate"),
            load_seconds=seconds,
            progress=on_terminal(),
        )
    if as_json:
        echo_json(found.as_dict())
        return
    table(rows(found))
    echo()
    columns([HEAD, *(cells(timing, found) for timing in found.timings)])


def made(
    model: str | None,
    size: str | None,
    device: str | None,
    reading: SourceOptions,
) -> tuple[ViT, float]:
    """The model to time, and the seconds that took, imports not counted."""
    import torch

    from vitlib.bench import fresh
    from vitlib.weights import load

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    built = load(model, **reading, device=device) if model else fresh(size or SIZE, device)
    return built, time.perf_counter() - start


def rows(found: Bench) -> list[tuple[str, str]]:
    """What was measured and where, as (what, value)."""
    size = "{}x{}".format(*found.image_size)
    rates = (f"{name} {rate:.0f}" for name, rate in found.gemm.items())
    ready = (f"{name} {seconds:.1f} s" for name, seconds in found.optimize_seconds.items())
    told = [
        ("model", f"{found.model}: {found.gflop:.2f} GFLOP an image of {size}"),
        ("device", found.device),
        ("torch", f"{found.torch}, {found.threads} thread{'s' * (found.threads > 1)}"),
        ("loaded in", f"{found.load_seconds:.2f} s" if found.load_seconds is not None else "-"),
        ("optimized in", ", ".join(ready) or "-"),
        ("GEMM GFLOP/s", ", ".join(rates)),
    ]
    if found.in_8_bits is not None:
        count, total = found.in_8_bits
        by = "photos" if found.calibrated else "noise: photos may choose others"
        told.append(("in 8 bits", f"{count} of {total} linears of the blocks, chosen by {by}"))
    return told + [("left out", f"{name}: {why}") for name, why in found.left_out.items()]


HEAD = ["batch", "precision", "img/s", "p50 ms", "p99 ms", "of GEMM", "x as loaded"]


def cells(timing: Timing, found: Bench) -> list[str]:
    """A line of the timings."""
    name, runs_in = timing.precision, found.arithmetic[timing.precision]
    if name not in PRECISIONS:
        name = f"{name} ({found.dtype})"
    elif runs_in != name:
        name = f"{name} (runs in {runs_in})"
    share = "-" if timing.gemm_share is None else f"{timing.gemm_share:.0%}"
    numbers = (timing.images_per_second, timing.p50_ms, timing.p99_ms)
    told = [str(timing.batch_size), name, *(f"{number:.1f}" for number in numbers)]
    return [*told, share, f"{timing.times_as_loaded:.2f}"]
