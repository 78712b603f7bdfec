"""ONNX files under a Predictor: vitlib's own, damaged ones, and those of another exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fixtures.exported import BOTH, tiny_predictor
from vitlib import Predictor, VitlibError
from vitlib.checks import verify
from vitlib.checks.compare import list_demo_photos

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")
pytestmark = pytest.mark.export

LABELS = ("ant", "bee", "cat", "dog", "eel")
PHOTOS = list_demo_photos()


class ChannelsLast(nn.Module):
    """A model of images with channels last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(images.permute(0, 3, 1, 2))


class TwoInputs(nn.Module):
    """A model of two images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> Any:
        return self.model(first) + self.model(second)


@pytest.fixture(scope="module")
def model() -> Predictor:
    torch.manual_seed(0)
    return tiny_predictor(labels=LABELS)


def write_foreign(module: nn.Module, path: Path, *shapes: tuple[int, ...]) -> Path:
    """Write a file by torch's exporter alone, with a fixed batch."""
    images = tuple(torch.zeros(shape) for shape in shapes)
    torch.onnx.export(module, images, path, dynamo=True, external_data=False, verbose=False)
    return path


@pytest.fixture(scope="module")
def own(model: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vitlib.export import ExportSettings, export_model

    folder = tmp_path_factory.mktemp("own")
    return export_model(model, folder, "onnx", ExportSettings(outputs=BOTH)).path


@pytest.mark.filterwarnings("ignore")
def test_own_file_answers_like_its_model(model: Predictor, own: Path, tmp_path: Path) -> None:
    file = Predictor.load(own)
    assert file.labels == LABELS
    np.testing.assert_allclose(
        file.probabilities(PHOTOS, batch_size=4), model.probabilities(PHOTOS), atol=2e-6
    )
    np.testing.assert_allclose(file.embed(PHOTOS), model.embed(PHOTOS), atol=1e-5)
    model.save(tmp_path / "checkpoint")
    assert verify(own, against=tmp_path / "checkpoint").verdict == "equal"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_file_is_one_line(own: Path, tmp_path: Path, damage: str) -> None:
    data, path = own.read_bytes(), tmp_path / "bad.onnx"
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(VitlibError) as caught:
        Predictor.load(path)
    assert "cannot open it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_metadata_that_is_not_vitlibs_is_one_line(own: Path, tmp_path: Path) -> None:
    for text in ("{", "[]", '{"format_version": 1}', "9" * 10_000):
        graph = onnx.load(own)
        next(item for item in graph.metadata_props if item.key == "vitlib").value = text
        onnx.save(graph, tmp_path / "edited.onnx")
        with pytest.raises(VitlibError, match="export the model again") as caught:
            Predictor.load(tmp_path / "edited.onnx")
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_foreign_classifier(model: Predictor, tmp_path: Path) -> None:
    path = write_foreign(model.model, tmp_path / "foreign.onnx", (1, 3, 32, 32))  # type: ignore[arg-type]
    with pytest.raises(VitlibError, match="--preprocess FOLDER, --labels FILE"):
        Predictor.load(path)
    file = Predictor.load(path, image_processor=model.image_processor, labels=LABELS)
    np.testing.assert_allclose(file.probabilities(PHOTOS), model.probabilities(PHOTOS), atol=2e-6)
    model.save(tmp_path / "checkpoint")
    assert verify(path, against=tmp_path / "checkpoint").verdict == "equal"


@pytest.mark.filterwarnings("ignore")
def test_foreign_file_of_another_input_is_refused(model: Predictor, tmp_path: Path) -> None:
    net: Any = model.model
    refused = [
        (write_foreign(ChannelsLast(net), tmp_path / "last.onnx", (1, 32, 32, 3)), "channels last"),
        (write_foreign(TwoInputs(net), tmp_path / "two.onnx", *[(1, 3, 32, 32)] * 2), "2 inputs"),
    ]
    for path, words in refused:
        with pytest.raises(VitlibError, match=words) as caught:
            Predictor.load(path, image_processor=model.image_processor, labels=LABELS)
        assert "\n" not in str(caught.value)
