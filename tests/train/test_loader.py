"""Pixels of the training loader: the same in any batch, thread and process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.training_batches import (
    ALL_AUGMENTS,
    CROPPED,
    FLOATS,
    GRAY,
    MEAN,
    RULE,
    STD,
    make_plan,
    read_batches,
)
from vitlib import ImageProcessor
from vitlib.errors import ConfigError, DataError, ImageError
from vitlib.image.decode import decode
from vitlib.train.augment import Augment
from vitlib.train.loader.loader import PhotoLoader
from vitlib.train.loader.photos import mean_color
from vitlib.train.mix import draw_pairs, mix_photos
from vitlib.train.sampler import BatchPlan

pytestmark = pytest.mark.usefixtures("no_leftovers")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "rule", [RULE, CROPPED, FLOATS, GRAY], ids=["size", "crop", "float", "gray"]
)
def test_batches_without_augmentation_equal_processor(
    paths: list[Path], rule: ImageProcessor, workers: int
) -> None:
    expected = rule(paths)
    order = [3, 0, 11, 5, 4, 7, 6, 1, 9]
    for augment in (None, Augment.none()):
        with PhotoLoader(paths, rule, augment, workers=workers, cache="memory") as loader:
            for epoch in range(2):  # read, and from the cache
                plans = [make_plan(epoch, order[:4]), make_plan(epoch, order[4:])]
                batches = list(loader.batches(plans))
                assert [batch.samples for batch in batches] == [tuple(order[:4]), tuple(order[4:])]
                assert all(batch.pixels.dtype == torch.float32 for batch in batches)
                assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected[order])
                assert loader.num_cached == 9


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rule", [CROPPED, FLOATS])
def test_evaluation_batches_equal_processor(
    paths: list[Path], rule: ImageProcessor, workers: int
) -> None:
    expected = rule(paths)
    with PhotoLoader(paths, rule, ALL_AUGMENTS, workers=workers) as loader:
        for _ in range(2):
            batches = list(loader.evaluation_batches(5))
            assert [batch.samples for batch in batches] == [
                (0, 1, 2, 3, 4),
                (5, 6, 7, 8, 9),
                (10, 11),
            ]
            assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected)
        some = list(loader.evaluation_batches(2, np.array([7, 2, 5])))
        assert torch.equal(torch.cat([batch.pixels for batch in some]), expected[[7, 2, 5]])
        assert list(loader.evaluation_batches(2, [])) == []
        assert len(loader) == 12
        with pytest.raises(ConfigError, match="batch_size=0"):
            loader.evaluation_batches(0)


@pytest.mark.parametrize(
    "rule", [RULE, CROPPED, FLOATS, GRAY], ids=["size", "crop", "float", "gray"]
)
def test_sample_pixels_do_not_depend_on_batch_or_worker(
    paths: list[Path], rule: ImageProcessor
) -> None:
    """Batch, position, order, processes, cache and earlier reads make no difference."""
    whole = make_plan(2, range(12), ALL_AUGMENTS, step=9)
    parts = [
        BatchPlan(
            2,
            9,
            *(
                field[start:end]
                for field in (whole.samples, whole.partners, whole.weights, whole.boxes)
            ),
        )
        for start, end in pairwise((0, 1, 6, 6, 12))
    ]  # one of them empty
    other = [make_plan(epoch, [5, 1, 0, 8], ALL_AUGMENTS, step=epoch) for epoch in range(2)]
    [expected] = read_batches(PhotoLoader(paths, rule, ALL_AUGMENTS, seed=1, cache="none"), [whole])
    assert expected.pixels.shape == (12, rule.in_channels, 32, 32)
    assert expected.plan == whole
    for workers in (0, 1, 2):
        for cache in ("none", "memory", "auto"):
            loader = PhotoLoader(paths, rule, ALL_AUGMENTS, seed=1, workers=workers, cache=cache)
            actual = read_batches(loader, [*other, *parts[::-1], whole])
            assert [len(batch.pixels) for batch in actual] == [4, 4, 6, 0, 5, 1, 12]
            assert torch.equal(torch.cat([b.pixels for b in actual[5:1:-1]]), expected.pixels)
            assert torch.equal(actual[6].pixels, expected.pixels)


def test_augmentation_differs_by_epoch_seed_and_sample(paths: list[Path]) -> None:
    augment = Augment()
    same = [paths[0]] * 3
    pixels = []
    for seed in (0, 1):
        loader = PhotoLoader(same, RULE, augment, seed=seed)
        pixels += [
            b.pixels for b in read_batches(loader, [make_plan(0, range(3)), make_plan(1, range(3))])
        ]
    rows = torch.cat(pixels)
    assert len({row.numpy().tobytes() for row in rows}) == len(rows) == 12


def test_two_ranks_read_halves_of_a_batch(paths: list[Path]) -> None:
    """Each draws the pairs of the whole step and takes its half, with partners of both."""
    order, size = [8, 3, 1, 10, 4, 9, 0, 2], RULE.size
    assert size is not None
    [whole] = read_batches(
        PhotoLoader(paths, RULE, ALL_AUGMENTS, seed=1), [make_plan(1, order, ALL_AUGMENTS, step=4)]
    )
    halves = []
    for rank in range(2):
        pairs = draw_pairs(ALL_AUGMENTS, 1, 4, len(order), size)
        mine = slice(4 * rank, 4 * rank + 4)
        partners = tuple(order[index] for index in pairs.partners[mine])
        assert set(partners) - set(order[mine])
        half = BatchPlan(1, 4, tuple(order[mine]), partners, pairs.weights[mine], pairs.boxes[mine])
        halves += read_batches(PhotoLoader(paths, RULE, ALL_AUGMENTS, seed=1, workers=rank), [half])
    assert torch.equal(torch.cat([half.pixels for half in halves]), whole.pixels)


def test_mixed_partners_are_augmented_as_samples(paths: list[Path]) -> None:
    weights, boxes = (0.3, 0.75, 1.0, 1 - 40 / 1024), (None, None, None, (2, 20, 10, 25))
    plan = BatchPlan(3, 0, (0, 1, 2, 3), (1, 2, 5, 7), weights, boxes)
    single, mixed = read_batches(
        PhotoLoader(paths, RULE, ALL_AUGMENTS, seed=1), [make_plan(3, range(8)), plan]
    )
    for index in range(4):
        photo, partner = (single.pixels[i].numpy() for i in (index, plan.partners[index]))
        expected = mix_photos(photo, partner, weights[index], boxes[index])
        assert np.array_equal(mixed.pixels[index].numpy(), expected)
    assert torch.equal(mixed.pixels[2], single.pixels[2])
    assert not torch.equal(mixed.pixels[3], single.pixels[3])


@pytest.mark.parametrize("rule", [RULE, FLOATS])
def test_flips_without_crop_use_processor_crop(paths: list[Path], rule: ImageProcessor) -> None:
    flips = Augment(crop_scale=None, horizontal_flip=0.5)
    [batch] = read_batches(PhotoLoader(paths, rule, flips), [make_plan(0, range(12))])
    flipped = 0
    for actual, exact in zip(batch.pixels, rule(paths), strict=True):
        # torch resizes in float32, Pillow in uint8: they differ by rounding to whole numbers.
        matches = [
            (actual - expected).abs().max() < (0.03 if rule is FLOATS else 1e-9)
            for expected in (exact, exact.flip(2))
        ]
        assert sum(matches) == 1
        flipped += matches[1]
    assert 0 < flipped < 12


@pytest.mark.parametrize("rule", [RULE, FLOATS], ids=["uint8", "float32"])
def test_erasing_does_not_change_the_cache(paths: list[Path], rule: ImageProcessor) -> None:
    erasing = Augment(crop_scale=None, horizontal_flip=0, random_erasing=1.0)
    with PhotoLoader(paths, rule, erasing, cache="memory") as loader:
        for epoch in range(3):  # a cached photo must not be erased
            [batch] = loader.batches([make_plan(epoch, range(12))])
            changed = batch.pixels != rule(paths)
            assert (batch.pixels[changed] == 0).all()
            assert 0.01 < changed.float().mean() < 0.4
            assert changed.any(1).flatten(1).any(1).all()


def test_large_photos_shrink_by_whole_factors(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = {}
    apply = Augment.apply

    def record_apply(self: Augment, photo: np.ndarray, *args: object, **more: object) -> np.ndarray:
        decoded[photo.shape] = photo
        return apply(self, photo, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Augment, "apply", record_apply)
    assert len(read_batches(PhotoLoader(paths, RULE, Augment()), [make_plan(0, [6, 0, 8])])) == 1
    assert set(decoded) == {(60, 100, 3), (90, 50, 3), (106, 58, 3)}  # 300 x 500 by 5
    assert np.array_equal(decoded[60, 100, 3], np.asarray(Image.open(paths[6]).reduce(5)))
    assert np.array_equal(decoded[90, 50, 3], np.asarray(decode(paths[0], 3)[0]))  # upright


def test_deep_photos_keep_float32(tmp_path: Path) -> None:
    """Crop, flip and colours change in float32; operations for 8 bits are refused."""
    values = np.linspace(0, 1, 60 * 70, dtype=np.float32).reshape(60, 70)
    Image.fromarray(values).save(tmp_path / "deep.tif")
    path = tmp_path / "deep.tif"
    [batch] = read_batches(PhotoLoader([path], RULE), [make_plan(0, [0])])
    assert torch.equal(batch.pixels, RULE([path]))
    [batch] = read_batches(
        PhotoLoader([path], RULE, Augment(crop_scale=None, horizontal_flip=1)), [make_plan(0, [0])]
    )
    assert torch.equal(batch.pixels, RULE([path]).flip(3))
    [batch] = read_batches(PhotoLoader([path], RULE, Augment.light()), [make_plan(0, [0])])
    assert len(batch.pixels[0, 0].unique()) > 900
    for augment, name in ((Augment.strong(), "rand_augment_ops"), (Augment.card(), "hue")):
        with pytest.raises(DataError, match=f"deeper than 8 bits, and {name}=.* set {name}=0"):
            read_batches(PhotoLoader([path], RULE, augment), [make_plan(0, [0])])


def test_reflectance_is_not_clipped() -> None:
    """Numbers beyond 255 stay as they are."""
    rule = ImageProcessor(size=(16, 16), in_channels=5, rescale_factor=1e-4)
    bands = np.random.default_rng(0).integers(0, 10_000, (20, 30, 5)).astype(np.uint16)
    for augment in (Augment(crop_scale=None, horizontal_flip=0.5), Augment.light()):
        [batch] = read_batches(PhotoLoader([bands], rule, augment), [make_plan(0, [0])])
        assert 0.6 < batch.pixels.max() <= 1
        assert len(batch.pixels.unique()) > 1000


def test_loader_reads_arrays() -> None:
    rule = ImageProcessor(size=(16, 16), in_channels=5)
    arrays = [np.full((20, 30, 5), 10 * n, np.uint8) for n in range(1, 4)]
    augment = Augment.strong()
    for workers in (0, 1):
        [batch] = read_batches(
            PhotoLoader(arrays, rule, augment, workers=workers), [make_plan(0, range(3))]
        )
        assert batch.pixels.shape == (3, 5, 16, 16)
        assert torch.isfinite(batch.pixels).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_pin_returns_pinned_pixels(
    paths: list[Path], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without CUDA torch cannot pin memory, so the test records the requests."""
    pinned: list[torch.Tensor] = []
    empty = torch.empty

    def record_empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        tensor = empty(*shape, **options)
        if pin_memory:
            pinned.append(tensor)
        return tensor

    expected = read_batches(
        PhotoLoader(paths, RULE, ALL_AUGMENTS, workers=workers), [make_plan(0, (0, 1, 2))]
    )
    monkeypatch.setattr(torch, "empty", record_empty)
    [batch] = read_batches(
        PhotoLoader(paths, RULE, ALL_AUGMENTS, workers=workers, pin=True), [make_plan(0, (0, 1, 2))]
    )
    assert [p.data_ptr() for p in pinned] == [batch.pixels.data_ptr()]
    assert torch.equal(batch.pixels, expected[0].pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_photos_are_skipped_or_raise(paths: list[Path], workers: int) -> None:
    [whole] = read_batches(
        PhotoLoader(paths, RULE, ALL_AUGMENTS, seed=1), [make_plan(0, range(12))]
    )
    paths[2].write_bytes(b"no photo")
    paths[7].write_bytes(paths[7].read_bytes()[:-600])
    paths[9].unlink()
    boxes = (None, (0, 0, 16, 16), None, None)
    plans = [
        make_plan(0, [0, 2, 1, 9, 2]),
        BatchPlan(0, 0, (3, 4, 7, 5), (7, 3, 0, 4), (0.5, 0.75, 0.5, 0.5), boxes),
        make_plan(0, [2, 9]),
        make_plan(0, [11]),
    ]
    loader = PhotoLoader(paths, RULE, ALL_AUGMENTS, seed=1, workers=workers, on_bad="skip")
    first, second, third, last = read_batches(loader, plans)
    assert first.samples == (0, 1)
    assert torch.equal(first.pixels, whole.pixels[[0, 1]])
    assert [sample for sample, _ in first.failed] == [2, 9]
    assert "02.png' is not an image" in first.failed[0][1]
    assert "09.png' is not there" in first.failed[1][1]
    # 7 cannot be read, so 3 stays unmixed.
    assert second.plan == BatchPlan(
        0, 0, (3, 4, 5), (3, 3, 4), (1.0, 0.75, 0.5), (None, boxes[1], None)
    )
    assert torch.equal(second.pixels[0], whole.pixels[3])
    assert torch.equal(second.pixels[2], 0.5 * whole.pixels[5] + 0.5 * whole.pixels[4])
    assert [sample for sample, _ in second.failed] == [7]
    assert "07.jpg' is damaged or truncated" in second.failed[0][1]
    assert third.pixels.shape == (0, 3, 32, 32)
    assert (third.samples, len(third.failed)) == ((), 2)
    assert torch.equal(last.pixels, whole.pixels[[11]])
    assert last.failed == ()
    with PhotoLoader(paths, RULE, workers=workers) as loader:
        batches = loader.batches([make_plan(0, [0, 1]), make_plan(0, [3, 9, 2]), make_plan(0, [4])])
        assert next(batches).samples == (0, 1)
        with pytest.raises(
            DataError, match=r"photo 9 cannot be used: '.*09.png' is not there"
        ) as raised:
            next(batches)
        assert isinstance(raised.value.__cause__, ImageError)
        assert "\n" not in str(raised.value)
        with pytest.raises(DataError, match=r"photo 2 .*02.png"):
            list(loader.evaluation_batches(3))


def test_loader_rejects_bad_arguments(paths: list[Path]) -> None:
    for rule in (ImageProcessor(shortest_edge=32), ImageProcessor()):
        with pytest.raises(ConfigError, match=r"pixels of many sizes.*with_image_size"):
            PhotoLoader(paths, rule)
    for changes, message in (
        ({"workers": -1}, "workers=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"cache": "disk"}, r"cache='disk': expected one of \('auto', 'memory', 'none'\)"),
        ({"on_bad": "replace"}, r"on_bad='replace': expected one of \('fail', 'skip'\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            PhotoLoader(paths, RULE, **changes)  # type: ignore[arg-type]


def test_mean_color_normalizes_to_zero() -> None:
    assert mean_color(RULE) == (128, 102, 76)
    assert mean_color(ImageProcessor(size=(8, 8))) is None
    assert (
        mean_color(ImageProcessor(rescale_factor=None, image_mean=(9.6,) * 3, image_std=(1.0,) * 3))
        == (10,) * 3
    )


def test_real_photos_keep_brightness(fridge_photos: list[Path]) -> None:
    rule = ImageProcessor(size=(224, 224), image_mean=MEAN, image_std=STD)
    some = fridge_photos[:6]
    with PhotoLoader(some, rule, workers=2) as loader:
        [batch] = loader.batches([make_plan(0, range(6))])
        assert torch.equal(batch.pixels, rule(some))
    [light] = read_batches(
        PhotoLoader(some, rule, Augment.light(), workers=2), [make_plan(0, range(6))]
    )
    assert light.pixels.shape == (6, 3, 224, 224)
    difference = (light.pixels.mean((2, 3)) - batch.pixels.mean((2, 3))).abs()
    assert 0 < difference.max() < 1.5  # nearly as bright and as colourful
