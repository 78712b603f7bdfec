"""Every tensor on the device: on a GPU that has no memory, and on devices that are no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu import FAMILIES, GPU, RecordedCuda, fake_mode, kept_on_gpu, optimized, small
from torch import Tensor

import vitlib
from vitlib.fast import cuda
from vitlib.fast.block import gather
from vitlib.ready import Ready

METHODS = ("forward", "embed", "forward_features")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_lies_on_the_gpu(
    family: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, model = fake_mode(monkeypatch), small(**FAMILIES[family])
    with mode, torch.no_grad():
        quick = cuda.optimize_cuda(kept_on_gpu(model), precision, None, GPU)
        assert isinstance(quick, cuda.CudaViT)
        assert {t.device for t in quick.state_dict().values()} == {GPU}
        for grid in ((4, 4), (6, 4)):
            shape = (2, 3, 8 * grid[0], 8 * grid[1])
            for trunk, dtype in ((quick.trunk, torch.float32), (quick.on_levels, torch.uint8)):
                assert trunk is not None
                for method in METHODS:
                    run = cuda.called(cuda.at_grid(trunk, grid, GPU), method, quick.runner.dtype)
                    assert run(torch.empty(shape, dtype=dtype, device=GPU)).device == GPU


@pytest.mark.parametrize("there", ["cpu", "cuda:0"])
@pytest.mark.parametrize("family", ["vit", "distilled", "relative"])
def test_what_a_server_computes_with(
    family: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ready's whole way, with the streams and graphs of a stand-in."""
    recorded, mode = RecordedCuda(monkeypatch), fake_mode(monkeypatch)
    model = small(**FAMILIES[family])
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    pinned: list[bool] = []
    empty = torch.empty

    def empty_here(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    with mode, torch.no_grad():
        quick = cuda.optimize_cuda(kept_on_gpu(model), "bf16", None, GPU)
        ready = Ready(quick, model.image_processor, "single_label_classification")  # type: ignore[arg-type]
        assert ready.device == GPU
        levels = torch.empty(3, 3, 32, 32, dtype=torch.uint8, device=there)
        monkeypatch.setattr(torch, "empty", empty_here)
        for _ in range(3):  # as it is, captured, replayed
            assert ready.scores(levels).shape == (3, 5)
            assert ready.vectors(levels).shape == (3, 64)
            scores, vectors = ready.scores_and_vectors(levels)
            assert (scores.device.type, vectors.device.type) == ("cpu", "cpu")
        many = torch.empty(300, 3, 32, 32, dtype=torch.uint8, device=there)
        assert ready.scores(many).shape == (300, 5)
    assert recorded.log.count("replay") >= 2
    assert any(pinned) == (there == "cpu")


def test_labels_and_vectors_of_a_gpu_are_one_pass() -> None:
    model, asked = small(), []

    class OnGpu(Ready):
        device = property(lambda _: GPU)  # type: ignore[assignment]

        def _rows(self, what: str, images: Tensor) -> Tensor:
            asked.append(what)
            return super()._rows(what, images)

    ready = OnGpu(optimized(model, "bf16"), model.image_processor, "single_label_classification")  # type: ignore[arg-type]
    levels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    scores, vectors = ready.scores_and_vectors(levels)
    assert asked == ["embed"]
    assert torch.allclose(scores, ready.scores(levels), atol=1e-6)
    assert torch.equal(vectors, ready.vectors(levels))


# --- devices that are neither a CPU nor CUDA (MPS, XPU) -------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_gathered_where_they_are(family: str) -> None:
    """A factor that is a tensor on the CPU cannot multiply weights that lie elsewhere."""
    block = gather(small(**FAMILIES[family]).blocks[0].to("meta"))
    assert {w.weight.device.type for w in block.linears.values()} == {"meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_optimize_on_another_device(family: str) -> None:
    model = small(**FAMILIES[family]).to("meta")
    quick = vitlib.optimize(model)
    with torch.no_grad():
        answers = quick(torch.empty(2, 3, 32, 32, device="meta"))
        assert answers.shape == model(torch.empty(2, 3, 32, 32, device="meta")).shape
        levels = torch.empty(2, 3, 32, 32, dtype=torch.uint8, device="meta")
        assert quick.forward_levels(levels).device.type == "meta"
