"""Models that torch traces, exports or compiles take batches of any size, as the model does.

The exporters to ONNX run where onnx, onnxscript and onnxruntime are installed: the development
environment has none of them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitlib
from fixtures.families import FAMILIES, pixels, tiny

Run = Callable[[Tensor], Tensor]
BATCHES = (1, 2, 5)
TWO = torch.export.Dim.DYNAMIC
everyone = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def no_words_of_torch() -> Iterator[None]:
    """Ignore deprecation warnings: torch.jit is deprecated, and torch.export calls such code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", ".*legacy TorchScript-based ONNX export")
        yield


def equals(run: Run, model: nn.Module, bound: float = 0.0) -> None:
    """Return True if both give equal results for every batch, and images of a batch differ."""
    with torch.no_grad():
        for count in BATCHES:
            images = pixels(count)
            exact, result = model(images), run(images)
            assert result.shape == exact.shape
            assert (result - exact).abs().max() <= bound * exact.abs().max(), count
        assert not torch.equal(exact[0], exact[1])


def trace(model: nn.Module, images: Tensor) -> Run:
    """A trace; a batch or an iteration that it takes for a constant is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        # The size of the images is one, which another test is about.
        warnings.filterwarnings("ignore", ".*to a Python boolean", torch.jit.TracerWarning)
        return torch.jit.trace(model, images)  # type: ignore[no-any-return]


@everyone
def test_trace_of_one_image_takes_any_batch(family: str) -> None:
    model = tiny(family)
    equals(trace(model, pixels(1)), model)


@everyone
def test_export_takes_any_batch(family: str) -> None:
    model = tiny(family)
    equals(torch.export.export(model, (pixels(2),), dynamic_shapes=({0: TWO},)).module(), model)


def test_compiled_model_takes_any_batch() -> None:
    torch._dynamo.reset()
    model = tiny("siglip_map")
    equals(torch.compile(model, backend="eager", fullgraph=True, dynamic=True), model)


class Method(nn.Module):
    """Another method of a model as a forward."""

    def __init__(self, model: vitlib.ViT, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, images: Tensor) -> Tensor:
        result = getattr(self.model, self.method)(images)
        return result[-1] if isinstance(result, list) else result  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["forward_intermediates", "attention"])
def test_other_methods_take_any_batch(method: str) -> None:
    model = Method(tiny("dinov2_registers"), method)
    equals(trace(model, pixels(1)), model)
    equals(torch.export.export(model, (pixels(2),), dynamic_shapes=({0: TWO},)).module(), model)


@pytest.mark.parametrize(
    ("family", "size"),
    [(name, (32, 32)) for name in FAMILIES]
    + [
        (name, (48, 32))
        for name in ("vit", "dinov2", "dinov3", "naflexvit", "beit", "beit_timm", "radio")
    ],
)
def test_trace_of_another_grid_is_right_or_refused(family: str, size: tuple[int, int]) -> None:
    """Images of 16x64 and 64x16 pixels have as many patches as those of 32x32."""
    model = tiny(family)
    with warnings.catch_warnings():  # the constants may be the image's sides
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(model, pixels(1, *size))
    answered = 0
    for height, width in ((32, 32), (16, 64), (64, 16), (48, 32), (24, 64), (48, 48)):
        images = pixels(2, height, width)
        with torch.no_grad():
            exact = model(images)
            try:
                result = traced(images)
            except RuntimeError:
                assert (height, width) != size
                continue
        assert (result - exact).abs().max() <= 1e-6 * exact.abs().max(), (height, width)
        answered += 1
    assert answered >= 1


def test_trace_in_training_drops_in_any_batch() -> None:
    model = tiny("vit", depth=2, drop_path=0.5, dropout=0.1).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*to a Python boolean", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, pixels(1), check_trace=False)
    assert traced(pixels(5)).shape == (5, 5)


def session(file: bytes | str) -> Run:
    import onnxruntime

    opened = onnxruntime.InferenceSession(file)
    name = opened.get_inputs()[0].name
    return lambda images: torch.from_numpy(opened.run(None, {name: images.numpy()})[0])


@pytest.mark.onnx
@everyone
def test_onnx_of_torchscript_takes_any_batch(family: str) -> None:
    model, file = tiny(family), io.BytesIO()
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["images"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        torch.onnx.export(model, (pixels(1),), file, dynamo=False, dynamic_axes=axes, **names)
    equals(session(file.getvalue()), model, 2e-6)


@pytest.mark.onnx
@everyone
def test_onnx_of_export_takes_any_batch(family: str, tmp_path: Path) -> None:
    model, file = tiny(family), str(tmp_path / "model.onnx")
    torch.onnx.export(
        model, (pixels(2),), file, dynamo=True, dynamic_shapes=({0: TWO},), verbose=False
    )
    equals(session(file), model, 2e-6)
