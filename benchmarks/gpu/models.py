"""Whole models: vitlib in every precision, transformers and timm; alone and in turns."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from prepare import spare_torchvision
from setting import SHARED, photos_of
from torch import Tensor

import vitlib
from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.timing import MIB, Call, measure, peaks, profile, reset_peaks, seconds_of
from vitlib import ImageProcessor, ViT
from vitlib.bench import flops
from vitlib.fast.cpu import Precision
from vitlib.fast.cuda import CudaViT, optimize_cuda

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "fp8")
FP32_BATCHES = 3  # of the sizes: the largest one takes seconds a call in float32
TURN_CALLS = 5


class Side(NamedTuple):
    """A library's model, as its documentation runs it on a GPU."""

    name: str
    call: Call  # pixels (B, C, H, W) on the device -> logits
    model: Any


def prepare(experiment: Experiment) -> None:
    """Write the checkpoint that all sides read, in two layouts, and the logits of float64."""
    config = experiment.sizes.config
    torch.manual_seed(0)
    model = ViT(config).eval().requires_grad_(False)
    rule = ImageProcessor(size=config.image_size, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    for layout in ("hf", "timm"):
        vitlib.save(model, experiment.work / layout, layout=layout, image_processor=rule)
    exact = model.double()(probe(experiment).double())
    torch.save(exact, experiment.work / "exact.pt")
    parameters = sum(p.numel() for p in model.parameters())
    experiment.record("prepare", parameters=parameters, gflop=round(flops(config) / 1e9, 2))


def probe(experiment: Experiment) -> Tensor:
    """Return the eight images whose logits are compared with those of float64."""
    shape = 8, 3, *experiment.sizes.config.image_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


# --- sides ----------------------------------------------------------------------------------------


def optimized(
    experiment: Experiment, precision: Any, batch_size: int | None = None, *, compiles: bool = False
) -> CudaViT:
    """Return the prepared checkpoint as optimize() gives it on a GPU; in a dry run, on the CPU."""
    if experiment.is_dry:
        model = vitlib.load(experiment.work / "hf")
        fast = optimize_cuda(model, precision, batch_size, experiment.device, compiles)
    else:
        model = vitlib.load(experiment.work / "hf", device=experiment.device)
        fast = vitlib.optimize(model, precision, batch_size=batch_size, compile=compiles)
    assert isinstance(fast, CudaViT)
    return fast


def side_of(experiment: Experiment, name: str) -> Side | None:
    """Return a side by its name, as in "timm bf16 compiled"; None where it is not installed."""
    library, precision, *options = name.split()
    if library == "vitlib":
        fast = optimized(experiment, precision)
        return Side(name, fast, fast)
    if not experiment.has(library, name):
        return None
    spare_torchvision()
    dtype = DTYPES[precision]
    make = {"transformers": transformers_model, "timm": timm_model}[library]
    model, call = make(experiment, dtype, compiled="compiled" in options)
    return Side(name, call, model)


def transformers_model(
    experiment: Experiment, dtype: torch.dtype, *, compiled: bool
) -> tuple[Any, Call]:
    """Return transformers' model with SDPA, its default, and how it is called."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = transformers.ViTForImageClassification.from_pretrained
    model = load(experiment.work / "hf", dtype=dtype, attn_implementation="sdpa")
    model = model.to(experiment.device).eval()
    run = compile_model(experiment, model) if compiled else model
    return model, lambda pixels: run(pixel_values=pixels.to(dtype)).logits


def timm_model(experiment: Experiment, dtype: torch.dtype, *, compiled: bool) -> tuple[Any, Call]:
    """Return timm's model in channels_last, as its own benchmark runs it, and how it is called."""
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    config = experiment.sizes.config
    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=config.num_classes,
    )
    model.load_state_dict(load_file(experiment.work / "timm" / "model.safetensors"))
    layout = torch.channels_last
    model = model.to(experiment.device, dtype).eval().to(memory_format=layout)
    run = compile_model(experiment, model) if compiled else model
    return model, lambda pixels: run(pixels.to(dtype).contiguous(memory_format=layout))


def compile_model(experiment: Experiment, model: Any) -> Any:
    """Return a model compiled by torch.compile; in a dry run as it is, as compiling takes long."""
    return model if experiment.is_dry else torch.compile(model, dynamic=False)


# --- measurements ---------------------------------------------------------------------------------


def inputs_of(experiment: Experiment, batch: int, kind: str) -> list[Tensor]:
    """Return some batches: "pixels" or "levels" on the device, or levels on the CPU.

    Args:
        experiment: The run.
        batch: Images in each.
        kind: "pixels", "levels", "levels from the CPU" or "levels from pinned memory".
    """
    shape = batch, 3, *experiment.sizes.config.image_size
    count = 4 if batch < 512 else 2
    if kind == "pixels":
        return [torch.randn(shape, device=experiment.device) for _ in range(count)]
    levels = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(count)]
    if kind == "levels":
        return [batch.to(experiment.device) for batch in levels]
    pins = kind == "levels from pinned memory" and not experiment.is_dry
    return [batch.pin_memory() if pins else batch for batch in levels]


def bench(
    experiment: Experiment,
    side: str,
    call: Call,
    batches: Sequence[int],
    kind: str = "pixels",
    profiled: Sequence[int] = (),
) -> None:
    """Measure a side at some batch sizes, and record each.

    Args:
        experiment: The run.
        side: Its name in the results.
        call: What is measured.
        batches: Images in a batch.
        kind: Of inputs_of().
        profiled: The batch sizes whose kernels are listed too.
    """
    gflop = flops(experiment.sizes.config) / 1e9
    for batch in batches:
        with experiment.attempt("models", side=side, batch=batch, input=kind):
            inputs = inputs_of(experiment, batch, kind)
            with torch.inference_mode():
                found = measure(experiment, call, inputs)
                rate = 1e3 * batch / found["queued_ms"]
                experiment.record(
                    "models",
                    side=side,
                    batch=batch,
                    input=kind,
                    img_s=round(rate, 1),
                    tflops=round(rate * gflop / 1e3, 1),
                    **found,
                )
                if batch in profiled:
                    profile(experiment, side, batch, lambda inputs=inputs: call(inputs[0]))
            del inputs
        clear(experiment)


def clear(experiment: Experiment) -> None:
    """Give memory that nothing uses back to the GPU."""
    gc.collect()
    if experiment.on_gpu:
        torch.cuda.empty_cache()


def compare(experiment: Experiment, side: str, call: Callable[[Tensor], Any]) -> None:
    """Record how far a side's logits are from those of float64."""
    with experiment.attempt("accuracy", side=side), torch.inference_mode():
        exact = torch.load(experiment.work / "exact.pt")
        found = call(probe(experiment).to(experiment.device)).double().cpu()
        experiment.record("accuracy", side=side, images=len(exact), **errors_of(found, exact))


def errors_of(logits: Tensor, exact: Tensor) -> dict[str, float]:
    """Return the errors of logits (B, num_classes) against exact ones, and equal best classes."""
    difference = logits - exact
    return {
        "largest_relative": float(difference.abs().max() / exact.abs().max()),
        "rms": float(difference.square().mean().sqrt()),
        "same_class": float((logits.argmax(1) == exact.argmax(1)).double().mean()),
    }


# --- parts ----------------------------------------------------------------------------------------


def measure_vitlib(experiment: Experiment, precision: str) -> None:
    """Measure vitlib in a precision, from pixels and levels on the device and from the CPU."""
    batches, side = experiment.sizes.batches, f"vitlib {precision}"
    fast: list[CudaViT] = []
    seconds = seconds_of(experiment, lambda: fast.append(optimized(experiment, precision)))
    experiment.record("optimize", side=side, load_and_optimize_s=round(seconds, 2))
    model = fast[0]
    compare(experiment, side, model)
    batches = batches[:FP32_BATCHES] if precision == "fp32" else batches
    ends = (batches[0], batches[-1])
    bench(experiment, side, model.forward_uint8, batches, "levels", profiled=ends)
    bench(experiment, side, model, batches, "pixels")
    if precision == "bf16":
        some = batches[0], batches[2], batches[-1]
        bench(experiment, side, model.forward_uint8, some, "levels from the CPU")
        kind = "levels from pinned memory"
        bench(experiment, side, lambda x: model.forward_uint8(model.upload(x)), some, kind)
    runner = model.runner
    experiment.record("graphs", side=side, captured=runner.num_graphs, failed=runner.num_failures)


def measure_peer(experiment: Experiment, name: str) -> None:
    """Measure a side of another library from pixels on the device."""
    side = side_of(experiment, name)
    if side is None:
        return
    compare(experiment, name, side.call)
    batches = experiment.sizes.batches
    compiled = name.endswith("compiled")  # once for each size, some ten seconds
    sizes = (batches[0], batches[-1]) if compiled else batches
    bench(experiment, name, side.call, sizes, profiled=(batches[0], batches[-1]))


def compile_ahead(experiment: Experiment, name: str) -> None:
    """Compile a side for the batch sizes that are measured later, so that the cache has it."""
    side = side_of(experiment, name)
    if side is None:
        return
    with torch.inference_mode():
        for batch in (experiment.sizes.batches[-1], experiment.sizes.batches[0]):
            pixels = inputs_of(experiment, batch, "pixels")[0]
            seconds = seconds_of(experiment, partial(side.call, pixels))
            experiment.record("compiling", side=name, batch=batch, seconds=round(seconds, 1))


def measure_in_turns(experiment: Experiment, names: Sequence[str]) -> None:
    """Measure sides in turns, so that what changes the card's clock changes all of them.

    Args:
        experiment: The run.
        names: Of the sides; ratios are against the first.
    """
    sides = [side for name in names if (side := side_of(experiment, name)) is not None]
    for batch in (experiment.sizes.batches[-1], experiment.sizes.batches[0]):
        pixels = inputs_of(experiment, batch, "pixels")[0]
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        with torch.inference_mode():
            for side in sides:
                for _ in range(3):
                    side.call(pixels)
            for _ in range(experiment.sizes.rounds):
                for name, call, _ in sides:
                    work = partial(call, pixels)
                    turn = [seconds_of(experiment, work) for _ in range(TURN_CALLS)]
                    times[name].append(1e3 * statistics.median(turn))
        for name, own in times.items():
            ratios = [a / b for a, b in zip(own, times[names[0]], strict=True)]
            experiment.record(
                "turns",
                side=name,
                batch=batch,
                ms=round(statistics.median(own), 4),
                times_vitlib=round(statistics.median(ratios), 3),
            )


def measure_memory(experiment: Experiment, name: str) -> None:
    """Measure the peak memory of a side at the largest batch, in a process of its own."""
    side = side_of(experiment, name)
    if side is None:
        return
    batch = experiment.sizes.batches[-1]
    pixels = inputs_of(experiment, batch, "pixels")[0]
    clear(experiment)
    reset_peaks(experiment)
    with torch.inference_mode():
        for _ in range(3):
            side.call(pixels)
    pixels_mib = round(pixels.numel() * pixels.element_size() / MIB)
    experiment.record("memory", side=name, batch=batch, pixels_mib=pixels_mib, **peaks(experiment))


def measure_agreement(experiment: Experiment) -> None:
    """Compare each precision with float64 on a real model and real photos, where they are there."""
    folder = SHARED / "models" / "deit-tiny-patch16-224"
    photos = photos_of("fridge_multilabel")[: 2 if experiment.is_dry else 128]
    if not folder.is_dir() or not photos:
        why = "no DeiT-tiny or photos: set VITLIB_SHARED to the folder that holds them"
        experiment.record("left out", what="agreement on real photos", why=why)
        return
    model = vitlib.load(folder, device=experiment.device)
    assert isinstance(model.image_processor, ImageProcessor)
    pixels = model.image_processor(photos).to(experiment.device)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(pixels.double())
    for precision in PRECISIONS:
        side = f"vitlib {precision}"
        with experiment.attempt("agreement", side=side), torch.inference_mode():
            fast = optimize_cuda(model, precision, None, experiment.device)
            found = errors_of(fast(pixels).double(), exact)
            experiment.record("agreement", side=side, photos=len(photos), **found)
