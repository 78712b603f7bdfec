"""Test vitlib on a GPU, in minutes; fast/test_cuda_*.py run the same code without one."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vitlib
from fixtures.fake_gpu import FAMILIES, normalise, small
from fixtures.references import distance, randomise
from vitlib import ImageProcessor, Predictor, ViT, ViTConfig
from vitlib.fast import cuda, cuda_attention, cuda_runner, row_ops
from vitlib.fast.quantized_rows import FP8

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def base() -> ViT:
    torch.manual_seed(0)
    model = randomise(ViT(ViTConfig.named("S/16", num_classes=1000))).requires_grad_(False)
    model.image_processor = ImageProcessor(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return model.cuda()


def on_gpu(
    model: ViT, precision: Any = "fp32", batch_size: int | None = None, **options: Any
) -> cuda.CudaViT:
    actual = vitlib.optimize(model, precision, batch_size=batch_size, device="cuda", **options)
    assert isinstance(actual, cuda.CudaViT)
    return actual


def has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_fp32_equals_the_model(name: str) -> None:
    model = small(**FAMILIES[name])
    quick = on_gpu(model)
    levels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    images = normalise(levels)
    with torch.no_grad():
        exact, tokens = model.double()(images.double()), model.forward_features(images.double())
    for _ in range(3):  # as it is, captured, replayed
        assert distance(quick(images).cpu().double(), exact) <= 1e-5
        assert distance(quick(images.cuda()).cpu().double(), exact) <= 1e-5
        assert distance(quick.forward_uint8(levels).cpu().double(), exact) <= 1e-5
        assert distance(quick.forward_uint8(levels.cuda()).cpu().double(), exact) <= 1e-5
        assert distance(quick.forward_features(images).cpu().double(), tokens) <= 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_positions_of_the_user_are_near_the_model(precision: str) -> None:
    """Their rows of 17 elements are not aligned as the kernel takes them."""
    model = small(**FAMILIES["relative"])
    assert model.attn_position is not None
    model.attn_position.__class__ = type("OwnBias", (type(model.attn_position),), {})
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
    quick = on_gpu(copy.deepcopy(model).cuda(), precision)
    assert quick.unoptimized_modules
    bound = 1e-5 if precision == "fp32" else 0.05
    assert distance(quick(images).cpu(), exact) <= bound


@pytest.mark.parametrize("name", FAMILIES)
def test_narrow_precisions_are_near_the_model(name: str) -> None:
    model = small(**FAMILIES[name])
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
    bounds = {"bf16": 0.05, "fp16": 0.01, **({"fp8": 0.25} if has_fp8() else {})}
    for precision, bound in bounds.items():
        quick = on_gpu(copy.deepcopy(model).cuda(), precision)
        for _ in range(3):
            assert distance(quick(images).cpu(), exact) <= bound, precision


def test_unoptimized_model_is_exact_on_a_gpu(base: ViT) -> None:
    """By default torch convolves in TF32, with an error of 1e-3."""
    images = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        exact = copy.deepcopy(base).cpu().double()(images.double())
        assert distance(base(images.cuda()).cpu().double(), exact) <= 1e-5


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_tf32_is_not_used(base: ViT, allowed: Any) -> None:
    images = torch.randn(4, 3, 224, 224, device="cuda")
    expected = on_gpu(base)(images)
    torch.set_float32_matmul_precision(allowed)
    try:
        quick = on_gpu(base)
        for _ in range(3):
            assert torch.equal(quick(images), expected)
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(quick(images), expected)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(quick(images), expected)


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("precision", "bound", "same"), [("bf16", 0.05, 0.95), ("fp8", 0.15, 0.8)])
def test_few_bits_keep_the_predictions(
    precision: str, bound: float, same: float, compiles: bool, deit_tiny: Path,
    fridge_photos: list[Path],
) -> None:  # fmt: skip
    if precision == "fp8" and not has_fp8():
        pytest.skip("this GPU has no 8-bit floats")
    model = vitlib.load(deit_tiny)
    assert isinstance(model.image_processor, ImageProcessor)
    images = model.image_processor(fridge_photos[:128])
    with torch.no_grad():
        exact = model(images)
    quick = on_gpu(model, precision, batch_size=128, compile=compiles)
    batches = torch.cat([quick(part) for part in images.split(16)])
    for answer in (quick(images).cpu(), batches.cpu()):
        assert distance(answer, exact) <= bound
        assert (answer.argmax(1) == exact.argmax(1)).float().mean() >= same
    assert quick.runner.compiles == compiles, "it was not compiled"
    assert quick.runner.captures, "it was not captured"


# --- kernels --------------------------------------------------------------------------------------


def on_both(name: str, *arguments: Any) -> tuple[Any, Any]:
    """Return the result of an operation on the GPU and of its definition on the CPU."""
    there = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    return getattr(torch.ops.vitlib, name)(*there), getattr(torch.ops.vitlib, name)(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize("width", [48, 768, 1536])
def test_kernels_equal_their_definitions(dtype: torch.dtype, width: int) -> None:
    if dtype == FP8 and not has_fp8():
        pytest.skip("this GPU has no 8-bit floats")
    kernels = row_ops.find_triton_kernels(torch.device("cuda", 0))
    assert kernels is not None, "Triton is not there, or fails: plain operations serve"
    inputs = torch.float32 if dtype == FP8 else dtype
    x, y = (torch.randn(6, 5, width).to(inputs) for _ in range(2))
    gain, offset, extra = torch.randn(3, width)
    for arguments in (
        ("norm_rows", x, None, gain, offset, 1e-6, None, dtype),
        ("norm_rows", x, y, gain, offset, 1e-6, extra, dtype),
        ("norm_rows", x[:, :1], y[:, :1], gain, offset, 1e-6, None, dtype),
        ("norm_rows", x, y, gain, None, 1e-6, extra, dtype, "rms"),
        *(("activate_rows", x, a, g, dtype) for a in ("gelu", "silu") for g in (False, True)),
    ):
        near(*on_both(*arguments), dtype)


def near(actual: Any, exact: Any, dtype: torch.dtype) -> None:
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 0.07)
    for a, b in zip(actual, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.numel():
            assert distance(a.cpu().float(), b.float()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotation_and_gelu_equal_their_definitions(dtype: torch.dtype) -> None:
    qkv, table = torch.randn(2, 7, 3 * 128).to(dtype), torch.randn(2, 4, 64)
    near(*on_both("rotate", qkv, table, 2), dtype)
    x, weight, bias = torch.randn(65, 96), torch.randn(256, 96) / 10, torch.randn(256)
    if dtype != torch.float32:
        actual, exact = on_both("linear_gelu", x.to(dtype), weight.to(dtype), bias.to(dtype))
        near([actual], [exact], dtype)


@pytest.mark.parametrize("tokens", [1, 50, 197, 261, 577, 1370])
@pytest.mark.parametrize("queries", ["one", "all"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_kernels_equal_the_definition(
    dtype: torch.dtype, has_bias: bool, queries: str, tokens: int
) -> None:
    if dtype == torch.bfloat16 and not cuda_attention.has_bfloat16(GPU):
        pytest.skip("this GPU has no bfloat16, which optimize() replaces by float16 there")
    gpu = cuda_attention.get_gpu(torch.device("cuda", 0))
    q, k, v = torch.randn(3, 2, 4, tokens, 64, device="cuda").to(dtype)
    q = q[:, :, : 1 if queries == "one" else tokens] / 8
    bias = torch.randn(1, 4, tokens, tokens, device="cuda").to(dtype) if has_bias else None
    bias = None if bias is None else cuda_attention.align_bias(bias)[:, :, : q.shape[2]]
    scores = q.double() @ k.double().transpose(2, 3)
    exact = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    exact = (exact @ v.double()).transpose(1, 2).flatten(2)
    actual = cuda_attention.attend(q, k, v, bias, gpu)
    assert distance(actual.double(), exact) <= (2e-5 if dtype == torch.float32 else 2e-2)


# --- graphs ---------------------------------------------------------------------------------------


def test_graphs_give_the_same_outputs(base: ViT) -> None:
    images = torch.randn(70, 3, 224, 224, device="cuda")
    for precision in ("fp32", "bf16", "fp16"):
        with_graphs, without = on_gpu(base, precision), on_gpu(base, precision)
        without.runner.captures = False
        for count in (1, 3, 70):
            expected = without(images[:count])
            answers = [with_graphs(images[:count]) for _ in range(3)]
            assert with_graphs.runner.captures, "a capture failed"
            assert all(torch.equal(answer, expected) for answer in answers), (precision, count)
        assert with_graphs.runner.num_graphs
        streams = [torch.cuda.Stream() for _ in range(2)]
        for stream in streams:
            with torch.cuda.stream(stream):
                answers.append(with_graphs(images))
        torch.cuda.synchronize()
        assert all(torch.equal(answer, expected) for answer in answers)


def test_pixels_may_be_overwritten_after_the_call(base: ViT) -> None:
    quick, images = on_gpu(base, "bf16"), torch.randn(200, 3, 224, 224)
    for device in (lambda x: x, Tensor.pin_memory):
        for count in (2, 200):
            expected = quick(images[:count])
            inputs = device(images[:count].clone())
            for _ in range(3):
                answer = quick(inputs)
                inputs.zero_()
                assert torch.equal(answer, expected)
                inputs.copy_(images[:count])


def test_threads_and_models_run_at_once(base: ViT) -> None:
    images = torch.randn(8, 3, 224, 224, device="cuda")
    models = [on_gpu(base, p) for p in ("fp32", "bf16", "bf16")]
    expected = [on_gpu(base, p)(images) for p in ("fp32", "bf16", "bf16")]
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not torch.equal(models[number](images), expected[number]):
                    wrong.append(number)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1, 2, 0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_deleted_model_frees_its_memory(base: ViT) -> None:
    """Graphs of one stream share the workspaces of its products (pytorch#193402)."""
    images = torch.randn(4, 3, 224, 224, device="cuda")
    memory_before = on_gpu(base, "bf16")
    expected = [memory_before(images) for _ in range(3)][-1]
    for _ in range(5):
        dropped = on_gpu(base, "bf16")
        for _ in range(3):
            dropped(images)
        del dropped
        gc.collect()
        torch.cuda.empty_cache()
        torch.randn(64, 2**20, device="cuda")  # takes what was freed
        assert torch.equal(memory_before(images), expected)


def test_least_recently_used_graph_is_dropped(base: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner, "CACHE_SIZE", 2)
    quick = on_gpu(base, "bf16")
    expected = {n: on_gpu(base, "bf16")(torch.ones(n, 3, 224, 224)) for n in (1, 2, 4)}
    for _ in range(3):
        for count, answer in expected.items():
            for _ in range(2):
                assert torch.equal(quick(torch.ones(count, 3, 224, 224)), answer)
    assert len(quick.runner.functions_by_size) == 2


def test_failed_capture_changes_no_output(
    base: ViT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.randn(2, 3, 224, 224, device="cuda")
    quick, real = on_gpu(base, "bf16"), cuda_runner.capture_graph
    expected = quick(images)
    here = torch.cuda.current_stream()

    def fails(function: Callable[[Tensor], Tensor], pixels: Tensor, runner: Any) -> Any:
        def waits(x: Tensor) -> Tensor:
            answer = function(x)
            answer.sum().item()  # which a capture forbids
            return answer

        return real(waits, pixels, runner)

    monkeypatch.setattr(cuda_runner, "capture_graph", fails)
    for _ in range(3):
        assert torch.equal(quick(images), expected)
    assert torch.cuda.current_stream() == here
    assert "CUDA graphs are not used" in caplog.text
    monkeypatch.setattr(cuda_runner, "capture_graph", real)
    torch.cuda.empty_cache()  # raises while torch's allocator is in a capture
    answers = [quick(images[:1]) for _ in range(3)]
    assert quick.runner.num_graphs == 1
    assert torch.equal(answers[0], answers[2])


def test_model_inside_a_graph_of_the_callers(base: ViT) -> None:
    images = torch.randn(2, 3, 224, 224, device="cuda")
    quick = on_gpu(base, "bf16")
    expected = [quick(images) for _ in range(3)][-1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = quick(images)
    graph.replay()
    assert distance(answer.float(), expected.float()) <= 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_same_outputs(base: ViT) -> None:
    images = torch.randn(4, 3, 224, 224)
    models = [vitlib.optimize(base, "bf16", device=f"cuda:{n}") for n in (0, 1)]
    expected = models[0](images).cpu()
    for scale in (1.0, 2.0):
        expected = models[0](images * scale).cpu()
        for _ in range(3):
            actual = models[1](images * scale)
            assert actual.device == torch.device("cuda", 1)
            assert torch.equal(actual.cpu(), expected)  # not the first answer again


# --- the services ---------------------------------------------------------------------------------


def test_predictor_on_a_gpu(deit_tiny: Path, fridge_photos: list[Path]) -> None:
    photos = fridge_photos[:40]
    expected = Predictor.load(deit_tiny, device="cpu")
    for precision, bound in ((None, 1e-4), ("bf16", 0.05)):
        quick = Predictor.load(deit_tiny, precision=precision)  # type: ignore[arg-type]
        assert quick.fast().device.type == "cuda"
        for count in (1, 40):
            actual, exact = (
                quick.probabilities(photos[:count]),
                expected.probabilities(photos[:count]),
            )
            assert abs(actual - exact).max() <= bound
    first = quick.classify(photos[0])[0]
    assert first is not None
    assert first[0].label == expected.classify(photos[0])[0][0].label  # type: ignore[index]
    assert quick.embed(photos[:3]).shape == (3, 192)
    assert quick.attention(photos[:1])[0].probabilities.shape[1:] == (3, 197, 197)  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_finetune_runs_some_steps(precision: str, tmp_path: Path) -> None:
    from vitlib.train import finetune
    from vitlib.train.config import TrainConfig
    from vitlib.train.log import read_events

    if precision == "bf16" and not cuda_attention.has_bfloat16(GPU):
        pytest.skip("this GPU has no bfloat16, which training refuses there")
    for label, level in (("dark", 60), ("light", 190)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(12):
            shade = Image.new("RGB", (24, 20), (level + index, level, level - index))
            shade.save(tmp_path / "photos" / label / f"{index:02}.png")
    model = small(num_classes=2)
    vitlib.save(model, tmp_path / "source", image_processor=model.image_processor)  # type: ignore[arg-type]
    losses = {}
    for device, kind in (("cuda", precision), ("cpu", "fp32")):
        streams = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "precision": kind}
        config = TrainConfig.from_dict({**streams, "learning_rate": 1e-4, "augment": "none"})
        done = finetune(
            tmp_path / "photos",
            tmp_path / "source",
            tmp_path / device,
            config=config,
            device=device,
        )
        events = read_events(done.out / "metrics.jsonl")
        losses[device] = [e["loss"] for e in events if e["event"] == "train"]
    bound = 1e-3 if precision == "fp32" else 0.1
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=bound, abs=bound)
