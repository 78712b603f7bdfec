"""Test that every tensor lies on the device, on a GPU without memory and on other devices."""

from __future__ import annotations

import threading
import types
from collections import Counter
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import vitlib
from fixtures.fake_gpu import (
    CPU,
    FAMILIES,
    GPU,
    RecordedCuda,
    fake_mode,
    move_to_fake_gpu,
    optimize_on_cpu,
    small,
)
from vitlib.adapters.lora import LoraLinear
from vitlib.batch.autotune import best_batch_size
from vitlib.batch.engines import local, ray_data
from vitlib.cli import vitlib_command
from vitlib.errors import ConfigError, ImageError, ServeError
from vitlib.fast import auto_precision, cuda, cuda_runner
from vitlib.fast.block import extract_weights
from vitlib.image.prefetch import stack
from vitlib.predict.engine import InferenceEngine
from vitlib.serve import run
from vitlib.serve.core import Core
from vitlib.serve.dispatcher import Dispatcher
from vitlib.serve.metrics import ServerMetrics
from vitlib.serve.settings import Limits, Settings
from vitlib.system.torch_state import float64_device

METHODS = ("forward", "embed", "forward_features")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_lies_on_the_gpu(
    family: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, model = fake_mode(monkeypatch), small(**FAMILIES[family])
    with mode, torch.no_grad():
        quick = cuda.optimize_cuda(move_to_fake_gpu(model), precision, None, GPU)
        assert isinstance(quick, cuda.CudaViT)
        assert {t.device for t in quick.state_dict().values()} == {GPU}
        for grid in ((4, 4), (6, 4)):
            shape = (2, 3, 8 * grid[0], 8 * grid[1])
            for trunk, dtype in ((quick.trunk, torch.float32), (quick.uint8_trunk, torch.uint8)):
                assert trunk is not None
                for method in METHODS:
                    run = cuda.bind_method(
                        cuda.copy_for_grid(trunk, grid, GPU), method, quick.runner.dtype
                    )
                    assert run(torch.empty(shape, dtype=dtype, device=GPU)).device == GPU


@pytest.mark.parametrize("there", ["cpu", "cuda:0"])
@pytest.mark.parametrize("family", ["vit", "distilled", "relative"])
def test_server_computes_on_the_gpu(
    family: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InferenceEngine runs from images to scores on a recorded torch.cuda."""
    recorded, mode = RecordedCuda(monkeypatch), fake_mode(monkeypatch)
    model = small(**FAMILIES[family])
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    pinned: list[bool] = []
    empty = torch.empty

    def empty_here(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    with mode, torch.no_grad():
        quick = cuda.optimize_cuda(move_to_fake_gpu(model), "bf16", None, GPU)
        engine = InferenceEngine(quick, model.image_processor, "single_label_classification")  # type: ignore[arg-type]
        assert engine.device == GPU
        levels = torch.empty(3, 3, 32, 32, dtype=torch.uint8, device=there)
        monkeypatch.setattr(torch, "empty", empty_here)
        for _ in range(3):  # as it is, captured, replayed
            assert engine.scores(levels).shape == (3, 5)
            assert engine.vectors(levels).shape == (3, 64)
            scores, vectors = engine.scores_and_vectors(levels)
            assert (scores.device.type, vectors.device.type) == ("cpu", "cpu")
        many = torch.empty(300, 3, 32, 32, dtype=torch.uint8, device=there)
        assert engine.scores(many).shape == (300, 5)
    assert recorded.log.count("replay") >= 2
    assert any(pinned) == (there == "cpu")


def test_images_are_stacked_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stacked batch is a new tensor: it is pinned at once, not copied again to be pinned."""
    images = [torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8) for _ in range(3)]
    pinned: list[bool] = []
    empty = torch.empty

    def empty_here(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty_here)
    assert torch.equal(stack(images, CPU), torch.stack(images))
    assert not any(pinned)
    pinned.clear()
    assert torch.equal(stack(images, GPU), torch.stack(images))
    assert pinned == [True]
    quick = optimize_on_cpu(small(), "bf16")
    uploaded: list[int] = []
    monkeypatch.setattr(Tensor, "is_pinned", lambda _: True)
    monkeypatch.setattr(
        cuda_runner.BatchRunner, "upload", lambda _, x: (uploaded.append(len(x)), x)[1]
    )
    engine = InferenceEngine(quick, small().image_processor, "single_label_classification")  # type: ignore[arg-type]
    engine.scores(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert uploaded == [2]
    # The caller's own pinned pixels may be written over while they are copied: they are staged.
    quick(torch.zeros(2, 3, 32, 32))
    assert uploaded == [2]
    # A GPU without room for a batch has it for a micro-batch, which is copied when it is computed.
    monkeypatch.setattr(cuda_runner.BatchRunner, "upload", lambda *_: _raise_out_of_memory())
    assert engine.scores(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape[0] == 2


def test_labels_and_embeddings_share_one_forward_on_a_gpu() -> None:
    model, requests = small(), []
    optimized = optimize_on_cpu(model, "bf16")

    def record(name: str) -> None:
        method = getattr(optimized, name)

        def call(images: Tensor) -> Tensor:
            requests.append(name.removesuffix("_uint8"))
            return method(images)  # type: ignore[no-any-return]

        object.__setattr__(optimized, name, call)

    for name in ("forward_uint8", "embed_uint8"):
        record(name)
    engine = InferenceEngine(optimized, model.image_processor, "single_label_classification")  # type: ignore[arg-type]
    levels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    scores, vectors = engine.scores_and_vectors(levels)
    assert requests == ["embed"]
    assert torch.allclose(scores, engine.scores(levels), atol=1e-6)
    assert torch.equal(vectors, engine.vectors(levels))


def test_warm_up_runs_every_batch_size_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU captures a size at its second batch, which would delay that request."""
    predictor = vitlib.Predictor(small(), small().image_processor)  # type: ignore[arg-type]
    core = Core(predictor, max_pixels=10**6)
    computed: list[tuple[str, int]] = []
    real = Core.answer

    def answer(self: Core, kind: Any, images: Any) -> Any:
        computed.append((kind, len(images)))
        return real(self, kind, images)

    monkeypatch.setattr(Core, "answer", answer)
    core.warm_up(20)
    assert computed == []  # on a CPU there is nothing to capture
    monkeypatch.setattr(InferenceEngine, "device", property(lambda _: GPU))
    monkeypatch.setattr("vitlib.serve.core.stack", lambda images, _: torch.stack(list(images)))
    core.warm_up(20)
    assert Counter(computed) == {
        (kind, size): 2 for kind in ("classify", "embed", "attend") for size in (1, 2, 4, 8, 16, 20)
    }


def test_engine_warms_up_the_model_of_each_device() -> None:
    warmed: list[tuple[str, int, str]] = []

    class Warm(Core):
        def __init__(self, name: str) -> None:
            model = small()
            super().__init__(vitlib.Predictor(model, model.image_processor), max_pixels=10**6)  # type: ignore[arg-type]
            self.name = name

        def warm_up(self, largest: int) -> None:
            warmed.append((self.name, largest, threading.current_thread().name))

    limits = Limits(max_batch=24)
    engine = Dispatcher(
        [lambda: Warm("cuda:0"), lambda: Warm("cuda:1")], Settings(limits=limits), ServerMetrics()
    )
    engine.close()
    assert {(name, largest) for name, largest, _ in warmed} == {("cuda:0", 24), ("cuda:1", 24)}
    assert len({thread for _, _, thread in warmed}) == 2  # each in the thread that computes with it


def test_batch_size_search_halves_when_memory_ends() -> None:
    quick = optimize_on_cpu(small(depth=1), "bf16")
    engine = InferenceEngine(quick, small().image_processor, "single_label_classification")  # type: ignore[arg-type]
    assert best_batch_size(engine) == 1024
    real, tried = quick.runner._run, []

    def run(key: Any, function: Any, images: Tensor, *rest: Any) -> Tensor:
        tried.append(len(images))
        if len(images) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(key, function, images, *rest)

    quick.runner._run = run  # type: ignore[method-assign]
    assert best_batch_size(engine) == 64
    quick.runner._run = lambda *_: _raise_out_of_memory()  # type: ignore[method-assign]
    with pytest.raises(ImageError, match="one image of 3x32x32 does not fit in memory"):
        best_batch_size(engine)


def _raise_out_of_memory() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_micro_batch_that_does_not_fit_is_halved(caplog: pytest.LogCaptureFixture) -> None:
    model, images = small(depth=1), torch.randn(64, 3, 32, 32)
    for batch_size in (None, 64):
        quick = optimize_on_cpu(model, "fp32", batch_size)
        expected = optimize_on_cpu(model, "fp32")(images)
        real = quick.runner._run

        def run(
            key: Any, function: Any, images: Tensor, sizes: tuple[int, ...], tokens: int,
            real: Any = real,
        ) -> Tensor:  # fmt: skip
            return (
                _raise_out_of_memory()
                if max(sizes) > 16
                else real(key, function, images, sizes, tokens)
            )

        quick.runner._run = run  # type: ignore[method-assign]
        if batch_size:
            with pytest.raises(
                ImageError, match=r"batches of 64 images of 3x32x32 .*: optimize\(batch_size=16\)"
            ):
                quick(images)
            with torch.no_grad():  # the remedy
                assert torch.allclose(
                    optimize_on_cpu(model, "fp32", 16)(images), expected, atol=1e-5
                )
        else:
            for _ in range(2):
                assert torch.allclose(quick(images), expected, atol=1e-5)
    assert len(caplog.records) == 1
    assert "do not fit in memory: 15 images are computed at a time" in caplog.text


def test_gpu_gets_the_next_batch_while_one_computes() -> None:
    """With one thread, the GPU would wait while its results are read."""
    together = threading.Barrier(2)

    class Worker:
        engine = types.SimpleNamespace(device=GPU)

        def decode(self, item: int) -> int:
            return item

        def compute_items(self, batch: list[int], images: list[int]) -> int:
            together.wait(5)  # raises where a single thread computes
            assert images == batch
            return sum(batch)

    batches = [[i, i + 1] for i in range(0, 20, 2)]
    assert list(local.run_local(Worker(), batches)) == [sum(b) for b in batches]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "precision", "text"),
    [
        (3, "bf16", "workers=3: each takes a GPU, and this cluster has 2"),
        (None, "int8", "use bf16"),
    ],
)
def test_cluster_without_the_precision_is_refused(
    count: int | None, precision: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would wait for such actors forever."""
    ended: list[int] = []
    ray = types.SimpleNamespace(
        cluster_resources=lambda: {"GPU": 2.0, "CPU": 8.0}, shutdown=lambda: ended.append(1)
    )
    monkeypatch.setattr(ray_data, "_connect", lambda _: ray)
    with pytest.raises(ConfigError, match=text):
        list(
            ray_data.run_on_ray(
                _raise_out_of_memory,
                _raise_out_of_memory,
                [],
                address="x",
                count=count,
                precision=precision,
            )
        )
    assert ended


def test_several_processes_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    listened: list[Any] = []

    def listen(*address: Any) -> Any:
        listened.append(address)
        raise ServeError("enough")

    monkeypatch.setattr(run, "count_gpus", lambda: 1)
    monkeypatch.setattr(run, "bind", listen)
    command = ["serve", "--model", "demo", "--workers", "2"]
    refused = CliRunner().invoke(vitlib_command, command)
    assert isinstance(refused.exception, ConfigError)
    assert "2 processes on one GPU: give --device cuda:0 without --workers" in str(
        refused.exception
    )
    assert not listened
    for remedy in ([*command, "--device", "cpu"], [*command[:-2], "--device", "cuda:0"]):
        CliRunner().invoke(vitlib_command, remedy)
    assert len(listened) == 2


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")],
)
def test_predictor_on_a_gpu_has_the_precision_of_its_weights(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, model = fake_mode(monkeypatch), small().to(dtype)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with mode:
        predictor = vitlib.Predictor(move_to_fake_gpu(model), model.image_processor)  # type: ignore[arg-type]
        fast = predictor.fast()
    assert isinstance(fast, cuda.CudaViT)
    assert fast.precision == precision
    gains = "precision bf16 is several times as fast" in predictor.precision_note
    assert gains == (precision == "fp32")


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), "bf16"), ((7, 5), "fp16")])
def test_auto_precision_tries_what_the_gpu_has(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, model = fake_mode(monkeypatch, capability), small()
    with mode:
        move_to_fake_gpu(model)
    precisions = [p for p in ("int8", "bf16", "fp16", "fp8") if auto_precision.is_faster(model, p)]
    assert precisions == [precision]


# --- devices that are neither a CPU nor CUDA (MPS, XPU) -------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_extracted_on_their_device(family: str) -> None:
    """A factor that is a tensor on the CPU cannot multiply weights on another device."""
    block = extract_weights(small(**FAMILIES[family]).blocks[0].to("meta"))
    assert {w.weight.device.type for w in block.linears.values()} == {"meta"}


def test_float64_is_computed_on_a_device_that_has_it() -> None:
    """MPS has no float64: a LoRA run would fail after its training."""
    assert float64_device(torch.device("mps")) == float64_device(torch.device("xpu")) == CPU
    assert float64_device(GPU) == GPU
    base = nn.Linear(8, 6)
    update = LoraLinear(base, 2, 4, torch.Generator().manual_seed(0))
    nn.init.normal_(update.up)
    x = torch.randn(3, 8)
    expected = update(x)
    assert torch.allclose(update.merge()(x), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_optimize_on_another_device(family: str) -> None:
    model = small(**FAMILIES[family]).to("meta")
    quick = vitlib.optimize(model)
    with torch.no_grad():
        answers = quick(torch.empty(2, 3, 32, 32, device="meta"))
        assert answers.shape == model(torch.empty(2, 3, 32, 32, device="meta")).shape
        levels = torch.empty(2, 3, 32, 32, dtype=torch.uint8, device="meta")
        assert quick.forward_uint8(levels).device.type == "meta"
