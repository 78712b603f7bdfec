"""Exported files under a Predictor: the model's answers, and one line for what a file cannot do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixtures.exported import (
    PROCESSOR,
    foreign_runtime,
    tiny_predictor,
    write_pt2,
)
from vitlib import ImageProcessor, Predictor, VitlibError
from vitlib.batch.options import WorkerFactory
from vitlib.checks.compare import list_demo_photos
from vitlib.errors import CheckpointError, ConfigError, ImageError, SourceError
from vitlib.predict.calibration import Calibration
from vitlib.predict.exported_model import ExportedModel
from vitlib.predict.label_file import read_labels
from vitlib.serve.core import Core

LABELS = ("ant", "bee", "cat", "dog", "eel")
PHOTOS = list_demo_photos()
SMALL = ImageProcessor(size=(8, 8), rescale_factor=None)


@pytest.fixture(scope="module")
def model() -> Predictor:
    torch.manual_seed(0)
    return tiny_predictor(labels=LABELS)


@pytest.fixture(scope="module")
def both(model: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of logits and embeddings."""
    return write_pt2(tmp_path_factory.mktemp("both") / "both.pt2", model)


@pytest.fixture(scope="module")
def logits(model: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of logits alone, which takes normalised pixels."""
    path = tmp_path_factory.mktemp("logits") / "logits.pt2"
    return write_pt2(path, model, outputs=("logits",), input="float")


def test_a_file_answers_like_its_model(model: Predictor, both: Path, logits: Path) -> None:
    for path in (both, logits):
        file = Predictor.load(path)
        assert (file.labels, file.task) == (LABELS, model.task)
        assert file.image_processor == model.image_processor
        scores = file.probabilities(PHOTOS, batch_size=3)
        np.testing.assert_allclose(scores, model.probabilities(PHOTOS), atol=2e-6)
        labels = [[p.label for p in row] for row in file.classify(PHOTOS, top_k=2)]
        assert labels == [[p.label for p in row] for row in model.classify(PHOTOS, top_k=2)]
    vectors = Predictor.load(both).embed(PHOTOS)
    np.testing.assert_allclose(vectors, model.embed(PHOTOS), atol=1e-5)


def test_scores_and_vectors_are_one_run(model: Predictor, both: Path) -> None:
    file = Predictor.load(both)
    assert isinstance(file.model, ExportedModel)
    runs = []
    runtime = file.model.runtime

    def run(pixels: Any) -> Any:
        runs.append(pixels.dtype)
        return runtime.run(pixels)

    file.model.runtime = replace(runtime, run=run)
    engine = file.engine()
    pixels = torch.stack([engine.preprocess(photo) for photo in PHOTOS])
    scores, vectors = engine.scores_and_vectors(pixels)
    assert runs == [np.uint8]
    np.testing.assert_allclose(scores, model.probabilities(PHOTOS), atol=2e-6)
    np.testing.assert_allclose(vectors, model.embed(PHOTOS), atol=1e-5)


def test_preprocessing_is_pickled_without_the_file(both: Path) -> None:
    engine = Predictor.load(both).engine()
    read = pickle.loads(pickle.dumps(engine.preprocessor()))
    assert torch.equal(read(PHOTOS[0]), engine.preprocess(PHOTOS[0]))


def test_predictor_of_a_file_is_copied_and_pickled(both: Path) -> None:
    file = Predictor.load(both, labels=["a", "b", "c", "d", "e"])
    expected = file.probabilities(PHOTOS[:2])
    for other in (copy.deepcopy(file), pickle.loads(pickle.dumps(file))):
        assert other.labels == file.labels
        assert np.array_equal(other.probabilities(PHOTOS[:2]), expected)


def load(path: Path, **options: Any) -> Callable[[], object]:
    return lambda: Predictor.load(path, **options)


def test_one_line_for_what_a_file_cannot_do(both: Path, logits: Path, tmp_path: Path) -> None:
    file, deep = Predictor.load(logits), np.zeros((32, 32, 3), np.uint16) + 300
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: file.embed(PHOTOS), "export the checkpoint with --outputs logits,embedding"),
        (lambda: file.attention(PHOTOS), "load the checkpoint it was made from"),
        (lambda: file.save(tmp_path / "out"), "copy the file"),
        (load(both, precision="int8"), "computes in fp32 precision"),
        (load(both, num_classes=3), "leave num_classes= out"),
        (load(both, image_size=64), "takes images of 32x32, the preprocessing gives 64x64"),
        (load(both, device="cuda"), "leave device= (--device) out"),
        (load(both, labels=["one"]), "1 labels for num_classes=5"),
        (
            load(both, image_processor=replace(PROCESSOR, image_mean=(0.5, 0.5, 0.5))),
            "--input float",
        ),
        (load(tmp_path / "no.onnx"), "no such file"),
        (lambda: Predictor.load(both).classify(deep), "deeper than 8 bits"),
    ]
    for call, words in refused:
        with pytest.raises(VitlibError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    Predictor.load(both, image_size=32, precision="fp32", device="cpu")
    assert file.classify(deep)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_file_is_one_line(both: Path, tmp_path: Path, damage: str) -> None:
    data = both.read_bytes()
    path = tmp_path / "bad.pt2"
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(CheckpointError) as caught:
        Predictor.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metadata_that_lies_is_found(model: Predictor, tmp_path: Path) -> None:
    path = write_pt2(
        tmp_path / "lies.pt2",
        model,
        lambda info: replace(info, num_classes=7, labels=(), outputs=("logits", "tokens")),
    )
    file = Predictor.load(path)
    with pytest.raises(CheckpointError, match="its metadata states 7"):
        file.classify(PHOTOS)


def test_calibration_beside_the_file_is_applied(both: Path, logits: Path) -> None:
    weights = (0.5, 0.4)
    calibration = Calibration(LABELS, False, 2.0, None, "set", 9, (1,) * 5, weights)
    before = Predictor.load(both).probabilities(PHOTOS)
    stored = calibration.store(both)
    try:
        file = Predictor.load(both)
        assert file.calibration is not None
        after = file.probabilities(PHOTOS)
        expected = torch.from_numpy(before).log().div(2).softmax(1)
        np.testing.assert_allclose(after, expected, atol=1e-6)
        assert Predictor.load(both, calibrated=False).calibration is None
    finally:
        stored.unlink()
    assert Predictor.load(logits).calibration is None


def test_server_has_the_results_of_the_file(both: Path, logits: Path) -> None:
    cores = [Core(Predictor.load(path), max_pixels=10**6) for path in (both, logits)]
    assert [core.kinds for core in cores] == [("classify", "embed"), ("classify",)]
    data = PHOTOS[0].read_bytes()
    rows = cores[0].answer("classify", [cores[0].preprocess(data, "classify")] * 5)
    assert rows[4].tolist() == rows[0].tolist()
    assert cores[0].parallel.num_threads == 1
    with pytest.raises(ConfigError, match="cannot embed"):
        cores[1].answer("embed", [cores[1].preprocess(data, "embed")])


def test_worker_of_another_process_opens_a_copy(both: Path, tmp_path: Path) -> None:
    from vitlib.batch.options import make_worker_factory

    settings: Any = type("Settings", (), {"precision": "fp32", "task": "both", "top_k": None})
    factory = make_worker_factory(Predictor.load(both), settings, tmp_path)
    worker = pickle.loads(pickle.dumps(factory))(0)
    assert isinstance(factory, WorkerFactory)
    assert worker.engine.model.runtime.path != both
    assert worker.engine.model.config.labels == LABELS


# Files of other exporters.


def test_foreign_file_answers_by_the_callers_facts() -> None:
    runtime, inputs = foreign_runtime()
    file = Predictor(ExportedModel(runtime, SMALL, ["low", "high"]))
    images = [np.full((8, 8, 3), level, np.uint8) for level in (1, 2, 3)]
    rows = file.probabilities(images)
    expected = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]).softmax(1)
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert file.labels == ("low", "high")
    assert [array.shape for array in inputs] == [(1, 3, 8, 8), (3, 3, 8, 8)]
    with pytest.raises(ConfigError, match="it gives logits: export"):
        file.embed(images)


def test_fixed_batch_is_filled() -> None:
    runtime, inputs = foreign_runtime((2, 3, 8, 8), dtype="uint8")
    model = ExportedModel(runtime, SMALL, ["low", "high"])
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8)
    assert model(images).tolist() == [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
    assert [array.shape[0] for array in inputs] == [2, 2, 2]
    with pytest.raises(ImageError, match=r"torch.float32: other.onnx takes uint8"):
        model(images.float())
    with pytest.raises(ImageError, match="3 channels and 8x8 pixels"):
        model(images[:, :, :4])


@pytest.mark.parametrize(
    ("changes", "labels", "words"),
    [
        ({}, None, "--preprocess FOLDER, --labels FILE"),
        ({}, ["one"], "gives 2 logits, and there are 1 labels"),
        ({"shape": (None, 8, 8, 3)}, ["a", "b"], "channels last"),
        ({"shape": (None, 192)}, ["a", "b"], "takes an input of ?x192"),
        ({"shape": (None, 4, 8, 8)}, ["a", "b"], "expected images x 3 channels"),
        ({"outputs": ("a", "b")}, ["a", "b"], "expected a single one"),
    ],
)
def test_foreign_file_that_does_not_fit(
    changes: dict[str, Any], labels: list[str] | None, words: str
) -> None:
    runtime, _ = foreign_runtime(**changes)
    with pytest.raises(VitlibError) as caught:
        ExportedModel(runtime, SMALL, labels)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_runtime_that_fails_is_one_line() -> None:
    runtime, _ = foreign_runtime()

    def run(pixels: Any) -> Any:
        raise RuntimeError(f"no kernel\nfor {pixels.shape}")

    model = ExportedModel(runtime, SMALL, ["a", "b"])
    model.runtime = replace(runtime, run=run)
    with pytest.raises(ImageError, match=r"does not compute pixels of 1x3x8x8: no kernel$"):
        model(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "text", ["ant\nbee\n", '["ant", "bee"]', '{"0": "ant", "1": "bee"}',
             '{"id2label": {"0": "ant", "1": "bee"}, "x": 1}'],
)  # fmt: skip
def test_labels_of_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(text)
    assert read_labels(path) == ("ant", "bee")


@pytest.mark.parametrize("text", ["", "ant\n\nbee", "[1", '{"1": "bee"}', "[[1], [2]]"])
def test_labels_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(SourceError, match="expected a"):
        read_labels(path)
    with pytest.raises(SourceError, match="cannot be read"):
        read_labels(tmp_path / "none")
