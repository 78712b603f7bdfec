"""The verb `vitlib bench`: time vitlib on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitlib.cli.compiling import check_compile, compile_option, print_compiling
from vitlib.cli.exported import is_exported
from vitlib.cli.options import (
    SourceOptions,
    device_option,
    json_option,
    source_options,
    subject_option,
)
from vitlib.cli.photos import list_photos
from vitlib.cli.predictors import logs_muted, mute_libraries
from vitlib.cli.printing import echo, echo_json, is_terminal, print_columns, print_table
from vitlib.cli.values import ImageSize, Size
from vitlib.cli.verb import Verb, positional_arguments
from vitlib.errors import count_noun

if TYPE_CHECKING:
    from vitlib.bench import Bench, Timing
    from vitlib.vit import ViT

# A copy of the precisions of vitlib.fast, which `vitlib --help` must not import.
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")
SIZE = "B/16"


@click.command(
    cls=Verb,
    examples=(
        "vitlib bench demo --rounds 3",
        "vitlib bench --size S/16 --precision fp32 --precision int8 --batch-size 1 --rounds 1",
    ),
)
@positional_arguments("[MODEL]")
@subject_option
@click.option(
    "--size",
    metavar="SIZE",
    help=f"Size of a model with random weights, such as S/16, without MODEL.  [default: {SIZE}]",
)
@click.option(
    "--image-size",
    type=ImageSize(),
    metavar="N|HxW",
    help="Pixels that the model gets: N or HxW. Default: the checkpoint's.",
)
@source_options
@device_option
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Precision to time; may be repeated. Default: every one that the device has.",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1),
    metavar="N",
    multiple=True,
    default=(1, 8),
    show_default=True,
    help="Images per call; may be repeated.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    multiple=True,
    help="CPU threads; may be repeated, to see how speed grows with them. Default: torch's own.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    metavar="N",
    default=10,
    show_default=True,
    help="Repetitions of each timing.",
)
@click.option(
    "--calibrate",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Photos to calibrate int8 with. Default: noise.",
)
@compile_option(
    "Each precision has two rows then; the half minute a row that it takes is not timed."
)
@json_option
def bench(
    model: str | None,
    size: str | None,
    image_size: Size | None,
    reading: SourceOptions,
    device: str | None,
    precisions: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    threads: tuple[int, ...],
    rounds: int,
    calibrate: Path | None,
    compile: bool,  # noqa: A002
    as_json: bool,
) -> None:
    """Time vitlib on this machine: every precision, and its GEMM rate.

    The model as loaded, its optimized forms and matrix products alone (1576 x 768 x 3072, packed)
    are timed in turn. The table shows the median of images per second, the latency of a call, the
    share of the GEMM rate of the same arithmetic (every multiply-add of the model counted), and the
    speed relative to the model as loaded.

    An exported file (.onnx, .pt2, .xml) is timed in its own runtime, as it is.
    """
    if model is not None and size is not None:
        raise click.UsageError("--size is for a model with random weights: leave it or MODEL out")
    if image_size == "keep":
        raise click.UsageError("--image-size keep is for photos, and bench has none: give N or HxW")
    if calibrate is not None and precisions and "int8" not in precisions:
        raise click.UsageError("--calibrate is for int8: leave it out, or add --precision int8")
    if compile:
        check_compile(model or "")
        print_compiling("for each precision and batch size, half a minute each")
    from vitlib.bench import measure

    mute_libraries()
    if model is not None and is_exported(model):
        if precisions or calibrate is not None:
            raise click.UsageError(
                "an exported file has one precision: leave --precision and --calibrate out"
            )
        if threads:
            raise click.UsageError(
                "an exported file keeps the threads that its runtime starts: leave --threads out, "
                "or set OMP_NUM_THREADS"
            )
        _print(_measure_file(model, batch_sizes, image_size, rounds), as_json)
        return
    name = model or f"ViT-{size or SIZE}, random weights"
    with logs_muted():
        net, seconds = _load(model, size, device, image_size, reading)
        result = measure(
            net,
            name,
            precisions=precisions or None,  # type: ignore[arg-type]
            batch_sizes=tuple(dict.fromkeys(batch_sizes)),
            rounds=rounds,
            calibrate=None if calibrate is None else list_photos(calibrate, "--calibrate"),
            compile=compile,
            load_seconds=seconds,
            threads=threads,
            progress=is_terminal(),
        )
    _print(result, as_json)


def _print(result: Bench, as_json: bool) -> None:
    """Print the result."""
    if as_json:
        echo_json(result.as_dict())
        return
    print_table(_rows(result))
    echo()
    rows = [HEAD, *(_cells(timing, result) for timing in result.timings)]
    if len(result.threads) > 1:
        scaling = [["threads", f"x {count_noun(result.threads[0], 'thread')}"]]
        scaling += [_scaling(timing, result) for timing in result.timings]
        rows = [
            [row[0], more[0], *row[1:], more[1]] for row, more in zip(rows, scaling, strict=True)
        ]
    print_columns(rows)


def _measure_file(
    model: str, batch_sizes: tuple[int, ...], image_size: tuple[int, int] | None, rounds: int
) -> Bench:
    """Time an exported file; the seconds to open it do not count imports."""
    from vitlib.bench import measure_file
    from vitlib.predict.runtimes import open_file

    start = time.perf_counter()
    runtime = open_file(model)
    return measure_file(
        runtime,
        model,
        batch_sizes=tuple(dict.fromkeys(batch_sizes)),
        image_size=image_size,
        rounds=rounds,
        load_seconds=time.perf_counter() - start,
        progress=is_terminal(),
    )


def _load(
    model: str | None,
    size: str | None,
    device: str | None,
    image_size: tuple[int, int] | None,
    reading: SourceOptions,
) -> tuple[ViT, float]:
    """Load the model to time; the seconds do not count imports."""
    import torch

    from vitlib.bench import random_model
    from vitlib.weights import load

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    if model is None:
        net = random_model(size or SIZE, device, image_size=image_size or (224, 224))
    else:
        net = load(model, **reading, device=device, image_size=image_size)
    return net, time.perf_counter() - start


def _rows(result: Bench) -> list[tuple[str, str]]:
    """List model, device and settings as (name, value)."""
    size = "{}x{}".format(*result.image_size)
    operations = "" if result.gflop is None else f" {result.gflop:.2f} GFLOP"
    rates = (f"{name} {rate:.0f}" for name, rate in result.gemm.items())
    ready = (f"{name} {seconds:.1f} s" for name, seconds in result.optimize_seconds.items())
    rows = [
        ("model", f"{result.model}:{operations} an image of {size}"),
        ("device", result.device),
        (
            "torch" if operations else "runtime",
            f"{result.torch}, {_list_threads(result.threads)}",
        ),
        ("loaded in", f"{result.load_seconds:.2f} s" if result.load_seconds is not None else "-"),
        ("optimized in", ", ".join(ready) or "-"),
        ("GEMM GFLOP/s", ", ".join(rates) or "-"),
    ]
    if result.in_8_bits is not None:
        count, total = result.in_8_bits
        by = "photos" if result.calibrated else "noise: photos may choose others"
        rows.append(("in 8 bits", f"{count} of {total} linears of the blocks, chosen by {by}"))
    if result.compiled:
        used = (f"{name} {used} of {total}" for name, (used, total) in result.compiled.items())
        rows.append(("compiled", f"{', '.join(used)} programs are faster, and used"))
    return rows + [("left out", f"{name}: {why}") for name, why in result.left_out.items()]


def _list_threads(threads: tuple[int, ...]) -> str:
    """Describe numbers of threads, "2 threads" or "1, 2, 4 threads"."""
    *others, last = threads
    return "".join(f"{count}, " for count in others) + count_noun(last, "thread")


HEAD = ["batch", "precision", "img/s", "p50 ms", "p99 ms", "of GEMM", "x as loaded"]


def _scaling(timing: Timing, result: Bench) -> list[str]:
    """Format the threads of a row, and its speed relative to the first number of threads."""
    first = next(
        other.images_per_second
        for other in result.timings
        if (other.batch_size, other.precision) == (timing.batch_size, timing.precision)
    )
    return [str(timing.threads), f"{timing.images_per_second / first:.2f}"]


def _cells(timing: Timing, result: Bench) -> list[str]:
    """Format a row of the timings."""
    name, runs_in = timing.precision, result.arithmetic[timing.precision]
    precision = name.removesuffix(" compiled")
    if precision not in PRECISIONS:
        name = f"{name} ({result.dtype})"
    elif runs_in != precision:
        name = f"{name} (runs in {runs_in})"
    share = "-" if timing.gemm_share is None else f"{timing.gemm_share:.0%}"
    numbers = (timing.images_per_second, timing.p50_ms, timing.p99_ms)
    row = [str(timing.batch_size), name, *(f"{number:.1f}" for number in numbers)]
    return [*row, share, f"{timing.times_as_loaded:.2f}"]
