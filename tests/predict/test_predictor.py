"""Tests of Predictor: labels, embeddings and attention of images, and errors."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures import references
from vitlib import ImageProcessor, Prediction, Predictor, ViT, ViTConfig, load, optimize, save
from vitlib.errors import CheckpointError, ConfigError, ImageError
from vitlib.image.prefetch import map_batches


def make_predictor(**changes: object) -> Predictor:
    fields = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = ViT(ViTConfig(**fields | {"num_classes": 4, "labels": tuple("abcd")} | changes))
    torch.nn.init.normal_(model.head.weight) if model.num_classes else None
    return Predictor(model, ImageProcessor(size=(16, 16)))


def make_photos(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(count)]


def test_classify_photo_of_cats(deit_tiny: Path, two_cats: Path) -> None:
    vit = Predictor.load(deit_tiny, device="cpu")
    [best] = vit.classify(two_cats, top_k=3)
    assert [p.index for p in best] == [281, 282, 285]
    assert best[0] == Prediction("tabby, tabby cat", best[0].score, 281)
    assert best[0].score == pytest.approx(0.362, abs=1e-3)
    probabilities = vit.probabilities([two_cats])
    assert probabilities.shape == (1, 1000)
    assert probabilities.dtype == np.float32
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert probabilities[0, 281] == pytest.approx(best[0].score)
    assert vit.embed(two_cats).shape == (1, 192)


def test_embed_gives_the_input_of_the_head() -> None:
    for changes in ({}, {"pool": "cls+mean"}, {"pool": "mean"}, {"num_classes": 0, "labels": ()}):
        vit = make_predictor(**changes)
        images = make_photos(3)
        vectors = torch.from_numpy(vit.embed(images))
        with torch.inference_mode():
            expected = vit.model(vit.image_processor(images))
            assert torch.allclose(vit.model.head(vectors), expected, atol=1e-5)


def test_attention_of_images() -> None:
    vit = make_predictor()
    images = make_photos(3)
    results = vit.attention(images, batch_size=2)
    assert [maps.grid for maps in results if maps] == [(2, 2)] * 3
    with torch.inference_mode():
        expected = vit.model.attention(vit.image_processor(images))
    for index, maps in enumerate(results):
        assert maps is not None
        assert maps.probabilities.dtype == np.float32
        assert maps.probabilities.shape == (2, 2, 5, 5)
        for actual, reference in zip(maps.probabilities, expected, strict=True):
            assert actual == pytest.approx(reference[index].numpy(), abs=1e-6)
    vit.image_processor = vit.image_processor.with_image_size("keep", (8, 8))
    tall, bad, wide = vit.attention(
        [make_photos(1)[0].transpose(1, 0, 2), b"no", make_photos(1)[0]],
        [-1],
        "prefix",
        on_error="none",
    )
    assert bad is None
    assert (tall.grid, wide.grid) == ((3, 2), (2, 3))  # type: ignore[union-attr]
    assert wide.probabilities.shape == (1, 2, 1, 7)  # type: ignore[union-attr]
    vit.model = vit.fast()
    with pytest.raises(ConfigError, match="an optimized model, which keeps no attention"):
        vit.attention(images)


def test_probabilities_by_task() -> None:
    images = make_photos(2)
    single_label = make_predictor()
    assert single_label.probabilities(images).sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    many = make_predictor(problem_type="multi_label_classification")
    with torch.inference_mode():
        logits = many.model(many.image_processor(images))
    assert many.probabilities(images) == pytest.approx(logits.sigmoid().numpy(), abs=1e-6)
    assert many.multi_label
    single_class = make_predictor(num_classes=1, labels=("yes",))
    assert single_class.probabilities(images).max() < 1


def test_classify_with_top_k_and_threshold() -> None:
    vit = make_predictor()
    [all_of_them] = vit.classify(make_photos(1), top_k=99)
    assert len(all_of_them) == 4
    scores = [p.score for p in all_of_them]
    assert scores == sorted(scores, reverse=True)
    [over] = vit.classify(make_photos(1), threshold=scores[1])
    assert over == all_of_them[:2]
    assert vit.classify(make_photos(1), threshold=1.0) == [[]]


def test_labels_without_names() -> None:
    assert make_predictor(labels=()).labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_order_does_not_depend_on_batch_size(batch_size: int) -> None:
    vit = make_predictor()
    images = make_photos(7)
    expected = np.concatenate([vit.probabilities(image) for image in images])
    scores = vit.probabilities(iter(images), batch_size=batch_size)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(scores, vit.probabilities(images, batch_size=batch_size))


def test_images_of_several_sizes() -> None:
    vit = make_predictor()
    vit.image_processor = ImageProcessor()
    images = [np.zeros(shape, np.uint8) for shape in ((16, 16, 3), (16, 24, 3), (16, 16, 3))]
    assert vit.embed(images).shape == (3, 16)


def test_no_images_give_empty_results() -> None:
    vit = make_predictor()
    assert vit.classify([]) == []
    assert vit.probabilities([]).shape == (0, 4)
    assert vit.embed([]).shape == (0, 16)


def test_bad_image_raises_or_gives_none(photo: Path) -> None:
    vit = make_predictor()
    images = [photo, "nope.jpg", photo, b"x"]
    with pytest.raises(ImageError, match=r"image 1: 'nope\.jpg' is not there"):
        vit.classify(images)
    with pytest.raises(ImageError, match=r"^'nope\.jpg' is not there"):
        vit.classify("nope.jpg")
    predictions = vit.classify(images, on_error="none")
    assert [row is None for row in predictions] == [False, True, False, True]
    assert predictions[0] == predictions[2]
    vectors = vit.embed(images, on_error="none")
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True, False, True]
    errors: list[tuple[int, str]] = []
    vit.embed(images, on_error=lambda index, error: errors.append((index, str(error))))
    assert [index for index, _ in errors] == [1, 3]
    assert "nope.jpg" in errors[0][1]


def test_weights_that_are_not_finite_raise(tmp_path: Path) -> None:
    vit = make_predictor()
    with torch.no_grad():
        vit.model.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    for call in (
        lambda: vit.classify(make_photos(1)),
        lambda: vit.classify(make_photos(2), on_error="none"),
        lambda: vit.probabilities(make_photos(3), batch_size=2),
        lambda: vit.embed(make_photos(1)[0]),
        lambda: vit.save(tmp_path / "out"),
        lambda: save(vit.model, tmp_path / "out", layout="timm"),
        lambda: vit.fast().save(tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"NaN or infinite values in: .*blocks\.0\."):
            call()
    assert not (tmp_path / "out").exists()


def test_scores_that_are_not_finite_are_an_error_of_the_image() -> None:
    vit = make_predictor()
    vit.image_processor = ImageProcessor(
        size=(16, 16), rescale_factor=3e36
    )  # times 255 is infinite
    images = [np.zeros((20, 30, 3), np.uint8), make_photos(1)[0], np.zeros((20, 30, 3), np.uint8)]
    with pytest.raises(ImageError, match="image 1: the model gives numbers that are not finite"):
        vit.classify(images, batch_size=2)
    with pytest.raises(ImageError, match=r"^the model gives numbers that are not finite"):
        vit.embed(images[1])
    for batch_size in (1, 2, 16):
        predictions = vit.classify(images, batch_size=batch_size, on_error="none")
        assert [row is None for row in predictions] == [False, True, False]
    failed: list[int] = []
    rows = vit.embed(images, on_error=lambda index, _: failed.append(index))
    assert failed == [1]
    assert np.isnan(rows).all(axis=1).tolist() == [False, True, False]


def test_images_are_read_ahead_by_two_batches_at_most() -> None:
    """At most two batches of a long list are taken ahead of the model."""
    vit = make_predictor()
    taken, most = 0, 0

    def endless() -> object:
        nonlocal taken
        for _ in range(60):
            taken += 1
            yield make_photos(1)[0]

    engine = vit.engine()
    rows = map_batches(
        endless(), engine.preprocess, engine.vectors, engine.device, 4, "raise", False
    )
    for done, _ in enumerate(rows):
        most = max(most, taken - done)
    assert taken == 60
    assert most <= 3 * 4 + 1


def test_images_are_decoded_by_threads() -> None:
    vit = make_predictor()
    names = set()
    real = ImageProcessor.to_float

    def pixels(self: ImageProcessor, image: object) -> torch.Tensor:
        names.add(threading.current_thread().name)
        return real(self, image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageProcessor, "to_float", pixels)
        vit.embed(make_photos(4))
    assert all(name.startswith("vitlib-decode") for name in names)
    assert not [t for t in threading.enumerate() if t.name.startswith("vitlib-decode")]


def test_predictor_rejects_arguments() -> None:
    vit = make_predictor()
    for call, message in (
        (lambda: vit.classify([], top_k=0), "top_k=0"),
        (lambda: vit.classify([], top_k=1.5), r"top_k=1\.5: expected a whole number, 1 or more"),
        (lambda: vit.classify([], top_k=True), "top_k=True"),
        (lambda: vit.classify([], threshold=2), "threshold=2: expected a number from 0 to 1"),
        (lambda: vit.classify([], threshold="a"), "threshold='a'"),
        (lambda: vit.classify([], threshold=float("nan")), "threshold=nan"),
        (lambda: vit.classify([], batch_size=0), "batch_size=0"),
        (lambda: vit.embed([], batch_size=1.5), r"batch_size=1\.5: expected a whole number"),
        (lambda: vit.classify([], on_error="skip"), "on_error='skip'"),
        (lambda: make_predictor(num_classes=0, labels=()).classify([]), "no head to classify with"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(ConfigError, match="gives 1 channels, the model takes 3"):
        Predictor(vit.model, ImageProcessor(in_channels=1))
    for images in (None, 3, {"a": 1}):
        with pytest.raises(ImageError, match=r"^images=.*: expected a path, .* or a list of them"):
            vit.classify(images)
        with pytest.raises(ImageError, match=r"^images=.*: expected a path, .* or a list of them"):
            vit.image_processor(images)
    with pytest.raises(ImageError, match="no images: expected one or more"):
        vit.image_processor([])
    with pytest.raises(ImageError, match="a list: expected a path"):
        vit.image_processor.to_float([])


def test_predictor_takes_preprocessing_of_the_model(tmp_path: Path, photo: Path) -> None:
    vit = make_predictor()
    for arguments in ({}, {"image_processor": None}):
        with pytest.raises(ConfigError, match=r"expected a vitlib\.ImageProcessor, got none"):
            Predictor(vit.model, **arguments)
    with pytest.raises(
        ConfigError, match=r"got a dict.*give ImageProcessor\(size=\.\.\., \.\.\.\)"
    ):
        Predictor(vit.model, {"size": 16})
    vit.save(tmp_path)
    for model in (load(tmp_path), optimize(load(tmp_path))):
        again = Predictor(model)
        assert again.image_processor == vit.image_processor
        assert again.classify(photo)[0][0].label == vit.classify(photo)[0][0].label


def test_classify_open_files(photo: Path) -> None:
    vit = make_predictor()
    expected = vit.classify(photo)
    with photo.open("rb") as file:
        file.read(10)  # images are read from the start of a file, as Pillow does
        assert vit.classify(file) == expected
        both = iter([io.BytesIO(photo.read_bytes()), file])
        assert vit.classify(both, batch_size=1) == expected * 2
        assert not file.closed
    with pytest.raises(ImageError, match=r"an open file .* cannot be read: .*closed file"):
        vit.classify(file)
    with photo.open(encoding="latin-1") as text, pytest.raises(ImageError, match="open it as 'rb'"):
        vit.classify(text)
    with pytest.raises(ImageError, match="is not an image"):
        vit.classify(io.BytesIO(b"no image"))
    with pytest.raises(ImageError, match=r"image 1: .* is empty"):
        vit.classify([photo, io.BytesIO()])
    assert vit.classify([io.BytesIO(b"x"), photo], batch_size=1, on_error="none") == [
        None,
        *expected,
    ]


def test_save_and_load(tmp_path: Path, photo: Path) -> None:
    vit = make_predictor(problem_type="multi_label_classification")
    vit.save(tmp_path)
    again = Predictor.load(tmp_path, device="cpu")
    assert again.image_processor == vit.image_processor
    assert again.model.config == vit.model.config
    assert again.classify(photo) == vit.classify(photo)


def test_load_without_preprocessing(tmp_path: Path, photo: Path) -> None:
    references.save_model("vit", tmp_path)
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json"):
        Predictor.load(tmp_path)
    processor = ImageProcessor(size=(32, 32))
    vit = Predictor.load(tmp_path, image_processor=processor, device="cpu")
    assert len(vit.classify(photo)[0]) == 5


def test_load_with_one_channel(deit_tiny: Path, two_cats: Path) -> None:
    """A gray photo gets nearly the same scores from the model of one channel as from that of three.

    The channels of this checkpoint are normalised differently, and their mean is assumed.
    """
    gray = Image.open(two_cats).convert("L")
    three = Predictor.load(deit_tiny, device="cpu").classify(gray)[0]
    single = Predictor.load(deit_tiny, in_channels=1, device="cpu").classify(gray)[0]
    assert single[0].label == three[0].label
    assert single[0].score == pytest.approx(three[0].score, abs=0.1)
