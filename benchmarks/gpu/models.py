"""Whole models: vitlib in every precision, transformers and timm; alone and interleaved."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from prepare import skip_torchvision_ops
from setting import SHARED, list_photos
from torch import Tensor

import vitlib
from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.timing import (
    MIB,
    Call,
    measure,
    measure_seconds,
    peak_memory,
    record_kernels,
    reset_peaks,
)
from vitlib import ImageProcessor, ViT
from vitlib.bench import flops
from vitlib.fast import cuda_attention, row_ops
from vitlib.fast.cpu import Precision
from vitlib.fast.cuda import CudaViT, optimize_cuda
from vitlib.fast.fp8 import has_fp8

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "fp8")
NUM_FP32_BATCHES = 3  # a float32 call of the largest batch takes seconds
CALLS_PER_TURN = 5


class Side(NamedTuple):
    """A library's model, set up as its documentation says for a GPU.

    Attributes:
        name: Library, precision and options, as in "timm bf16 compiled".
        call: Maps pixels (B, C, H, W) on the device to logits.
        model: The model.
    """

    name: str
    call: Call
    model: Any


def prepare_checkpoint(experiment: Experiment) -> None:
    """Save the checkpoint of all sides in two layouts, and the logits in float64."""
    config = experiment.sizes.config
    torch.manual_seed(0)
    model = ViT(config).eval().requires_grad_(False)
    processor = ImageProcessor(size=config.image_size, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    for layout in ("hf", "timm"):
        vitlib.save(model, experiment.work / layout, layout=layout, image_processor=processor)
    exact = model.double()(probe_images(experiment).double())
    torch.save(exact, experiment.work / "exact.pt")
    parameters = sum(p.numel() for p in model.parameters())
    experiment.record("prepare", parameters=parameters, gflop=round(flops(config) / 1e9, 2))


def probe_images(experiment: Experiment) -> Tensor:
    """Return the eight images for comparisons of logits with float64."""
    shape = 8, 3, *experiment.sizes.config.image_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


# --- sides ----------------------------------------------------------------------------------------


def optimize_checkpoint(
    experiment: Experiment, precision: Any, batch_size: int | None = None, *, compiles: bool = False
) -> CudaViT:
    """Load the checkpoint and optimize it for the GPU; in a dry run, for the CPU."""
    if experiment.is_dry:
        model = vitlib.load(experiment.work / "hf")
        fast = optimize_cuda(model, precision, batch_size, experiment.device, compiles)
    else:
        model = vitlib.load(experiment.work / "hf", device=experiment.device)
        fast = vitlib.optimize(model, precision, batch_size=batch_size, compile=compiles)
    assert isinstance(fast, CudaViT)
    return fast


def load_side(experiment: Experiment, name: str) -> Side | None:
    """Load a side by name, as in "timm bf16 compiled"; None if it is not installed."""
    library, precision, *options = name.split()
    if library == "vitlib":
        fast = optimize_checkpoint(experiment, precision)
        return Side(name, fast, fast)
    if not experiment.has(library, name):
        return None
    skip_torchvision_ops()
    dtype = DTYPES[precision]
    make = {"transformers": transformers_model, "timm": timm_model}[library]
    model, call = make(experiment, dtype, is_compiled="compiled" in options)
    return Side(name, call, model)


def transformers_model(
    experiment: Experiment, dtype: torch.dtype, *, is_compiled: bool
) -> tuple[Any, Call]:
    """Load transformers' model with SDPA, its default; return it and its call."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = transformers.ViTForImageClassification.from_pretrained
    model = load(experiment.work / "hf", dtype=dtype, attn_implementation="sdpa")
    model = model.to(experiment.device).eval()
    run = compile_model(experiment, model) if is_compiled else model
    return model, lambda pixels: run(pixel_values=pixels.to(dtype)).logits


def timm_model(
    experiment: Experiment, dtype: torch.dtype, *, is_compiled: bool
) -> tuple[Any, Call]:
    """Load timm's model in channels_last, as timm's benchmark does; return it and its call."""
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
    run = compile_model(experiment, model) if is_compiled else model
    return model, lambda pixels: run(pixels.to(dtype).contiguous(memory_format=layout))


def compile_model(experiment: Experiment, model: Any) -> Any:
    """Compile a model with torch.compile; in a dry run, return it unchanged."""
    return model if experiment.is_dry else torch.compile(model, dynamic=False)


# --- measurements ---------------------------------------------------------------------------------


def make_inputs(experiment: Experiment, batch: int, input_kind: str) -> list[Tensor]:
    """Make random batches: float pixels on the device, or uint8 images on the device or the CPU.

    Args:
        experiment: The run.
        batch: Images in each.
        input_kind: "pixels", "uint8", "uint8 from the CPU" or "uint8 from pinned memory".
    """
    shape = batch, 3, *experiment.sizes.config.image_size
    num_batches = 4 if batch < 512 else 2
    if input_kind == "pixels":
        return [torch.randn(shape, device=experiment.device) for _ in range(num_batches)]
    images = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(num_batches)]
    if input_kind == "uint8":
        return [batch.to(experiment.device) for batch in images]
    is_pinned = input_kind == "uint8 from pinned memory" and not experiment.is_dry
    return [batch.pin_memory() if is_pinned else batch for batch in images]


def measure_batches(
    experiment: Experiment,
    side: str,
    call: Call,
    batches: Sequence[int],
    input_kind: str = "pixels",
    profiled_batches: Sequence[int] = (),
) -> None:
    """Measure a side at some batch sizes, and record each.

    Args:
        experiment: The run.
        side: Name in the results.
        call: Function to measure.
        batches: Images in a batch.
        input_kind: Kind of make_inputs().
        profiled_batches: Batch sizes whose kernels are also recorded.
    """
    gflop = flops(experiment.sizes.config) / 1e9
    for batch in batches:
        with experiment.attempt("models", side=side, batch=batch, input=input_kind):
            inputs = make_inputs(experiment, batch, input_kind)
            with torch.inference_mode():
                timing = measure(experiment, call, inputs)
                rate = 1e3 * batch / timing["queued_ms"]
                experiment.record(
                    "models",
                    side=side,
                    batch=batch,
                    input=input_kind,
                    img_s=round(rate, 1),
                    tflops=round(rate * gflop / 1e3, 1),
                    **timing,
                )
                if batch in profiled_batches:
                    record_kernels(experiment, side, batch, lambda inputs=inputs: call(inputs[0]))
            del inputs
        free_memory(experiment)


def free_memory(experiment: Experiment) -> None:
    """Return unused memory to the GPU."""
    gc.collect()
    if experiment.on_gpu:
        torch.cuda.empty_cache()


def measure_accuracy(experiment: Experiment, side: str, call: Callable[[Tensor], Any]) -> None:
    """Record the errors of a side's logits against float64."""
    with experiment.attempt("accuracy", side=side), torch.inference_mode():
        exact = torch.load(experiment.work / "exact.pt")
        logits = call(probe_images(experiment).to(experiment.device)).double().cpu()
        experiment.record("accuracy", side=side, images=len(exact), **logit_errors(logits, exact))


def logit_errors(logits: Tensor, exact: Tensor) -> dict[str, float]:
    """Return the errors of logits (B, num_classes) against exact ones.

    Returns:
        Largest error over the largest logit, RMS error, and share of equal best classes.
    """
    difference = logits - exact
    return {
        "largest_relative": float(difference.abs().max() / exact.abs().max()),
        "rms": float(difference.square().mean().sqrt()),
        "same_class": float((logits.argmax(1) == exact.argmax(1)).double().mean()),
    }


# --- parts ----------------------------------------------------------------------------------------


def measure_vitlib(experiment: Experiment, precision: str) -> None:
    """Measure vitlib in a precision, with float and uint8 images, also from the CPU."""
    batches, side = experiment.sizes.batches, f"vitlib {precision}"
    fast: list[CudaViT] = []
    seconds = measure_seconds(
        experiment, lambda: fast.append(optimize_checkpoint(experiment, precision))
    )
    experiment.record(
        "optimize", side=side, load_and_optimize_s=round(seconds, 2), **serving_kernels(experiment)
    )
    model = fast[0]
    measure_accuracy(experiment, side, model)
    batches = batches[:NUM_FP32_BATCHES] if precision == "fp32" else batches
    profiled_batches = (batches[0], batches[-1])
    measure_batches(
        experiment, side, model.forward_uint8, batches, "uint8", profiled_batches=profiled_batches
    )
    measure_batches(experiment, side, model, batches, "pixels")
    if precision == "bf16":
        upload_batches = batches[0], batches[2], batches[-1]
        measure_batches(experiment, side, model.forward_uint8, upload_batches, "uint8 from the CPU")
        input_kind = "uint8 from pinned memory"
        measure_batches(
            experiment,
            side,
            lambda x: model.forward_uint8(model.upload(x)),
            upload_batches,
            input_kind,
        )
    runner = model.runner
    experiment.record("graphs", side=side, captured=runner.num_graphs, failed=runner.num_failures)


def serving_kernels(experiment: Experiment) -> dict[str, object]:
    """Return which optional kernels of this GPU serve; nothing on a CPU."""
    if not experiment.on_gpu:
        return {}
    device = experiment.device
    gpu = cuda_attention.get_gpu(device)
    return {
        "triton": row_ops.find_triton_kernels(device) is not None,
        "fp8_product": has_fp8(device),
        "cudnn": gpu.cudnn,
        "wrong_attention": sorted(gpu.wrong),
    }


def measure_peer(experiment: Experiment, name: str) -> None:
    """Measure a side of another library with float images on the device."""
    side = load_side(experiment, name)
    if side is None:
        return
    measure_accuracy(experiment, name, side.call)
    batches = experiment.sizes.batches
    is_compiled = name.endswith("compiled")  # compiling takes about ten seconds for each size
    sizes = (batches[0], batches[-1]) if is_compiled else batches
    measure_batches(experiment, name, side.call, sizes, profiled_batches=(batches[0], batches[-1]))


def compile_ahead(experiment: Experiment, name: str) -> None:
    """Compile a side for the batch sizes that are measured later, to fill the cache."""
    side = load_side(experiment, name)
    if side is None:
        return
    with torch.inference_mode():
        for batch in (experiment.sizes.batches[-1], experiment.sizes.batches[0]):
            pixels = make_inputs(experiment, batch, "pixels")[0]
            seconds = measure_seconds(experiment, partial(side.call, pixels))
            experiment.record("compiling", side=name, batch=batch, seconds=round(seconds, 1))


def measure_interleaved(experiment: Experiment, names: Sequence[str]) -> None:
    """Time several sides in turns, so that a change of the GPU's clock affects all of them.

    Args:
        experiment: The run.
        names: Names of the sides; ratios are against the first.
    """
    sides = [side for name in names if (side := load_side(experiment, name)) is not None]
    for batch in (experiment.sizes.batches[-1], experiment.sizes.batches[0]):
        pixels = make_inputs(experiment, batch, "pixels")[0]
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        with torch.inference_mode():
            for side in sides:
                for _ in range(3):
                    side.call(pixels)
            for _ in range(experiment.sizes.rounds):
                for name, call, _ in sides:
                    run_batch = partial(call, pixels)
                    turn = [measure_seconds(experiment, run_batch) for _ in range(CALLS_PER_TURN)]
                    times[name].append(1e3 * statistics.median(turn))
        for name, side_times in times.items():
            ratios = [a / b for a, b in zip(side_times, times[names[0]], strict=True)]
            experiment.record(
                "turns",
                side=name,
                batch=batch,
                ms=round(statistics.median(side_times), 4),
                times_vitlib=round(statistics.median(ratios), 3),
            )


def measure_memory(experiment: Experiment, name: str) -> None:
    """Measure the peak memory of a side at the largest batch size, in its own process."""
    side = load_side(experiment, name)
    if side is None:
        return
    batch = experiment.sizes.batches[-1]
    pixels = make_inputs(experiment, batch, "pixels")[0]
    free_memory(experiment)
    reset_peaks(experiment)
    with torch.inference_mode():
        for _ in range(3):
            side.call(pixels)
    pixels_mib = round(pixels.numel() * pixels.element_size() / MIB)
    experiment.record(
        "memory", side=name, batch=batch, pixels_mib=pixels_mib, **peak_memory(experiment)
    )


def measure_agreement(experiment: Experiment) -> None:
    """Compare each precision with float64 on DeiT-tiny and real photos, if present."""
    folder = SHARED / "models" / "deit-tiny-patch16-224"
    photos = list_photos("fridge_multilabel")[: 2 if experiment.is_dry else 128]
    if not folder.is_dir() or not photos:
        why = "DeiT-tiny or the photos are absent: set VITLIB_SHARED to their folder"
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
            errors = logit_errors(fast(pixels).double(), exact)
            experiment.record("agreement", side=side, photos=len(photos), **errors)
