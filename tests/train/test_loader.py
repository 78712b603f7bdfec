from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paths import ROOT
from vitlib import ImageProcessor
from vitlib.errors import ConfigError, DataError, ImageError, TrainError
from vitlib.image.decode import decode
from vitlib.train.augment import Augment
from vitlib.train.loader import cache as photo_cache
from vitlib.train.loader.cache import ArrayCache, create_cache
from vitlib.train.loader.loader import Batch, PhotoLoader
from vitlib.train.loader.photos import mean_color
from vitlib.train.mix import draw_pairs, mix_photos
from vitlib.train.sampler import BatchPlan

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
RULE = ImageProcessor(size=(32, 32), image_mean=MEAN, image_std=STD)
CROPPED = ImageProcessor(
    shortest_edge=40, crop_size=(32, 32), resample=3, image_mean=MEAN, image_std=STD
)
FLOATS = ImageProcessor(size=(32, 32), float_resize=True, image_mean=MEAN, image_std=STD)
GRAY = ImageProcessor(size=(32, 32), in_channels=1, image_mean=(0.4,), image_std=(0.3,))
WITH = Augment(  # all of it, so that nothing is left untested
    crop_scale=(0.3, 1.0), brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1,
    rand_augment_ops=1, random_erasing=0.5, erasing_fill="noise", grayscale_prob=0.2,
    blur_prob=0.2, vertical_flip=0.5, mixup_alpha=0.8, cutmix_alpha=1.0,
)  # fmt: skip


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Something smooth and coloured, unlike any other of another seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Twelve photos of many kinds: sizes, gray, palette, alpha, turned by EXIF, large."""
    found = []
    for number in range(12):
        image = picture(50 + 7 * number, 90 - 4 * number, number)
        path = tmp_path / f"{number:02}.png"
        if number == 3:
            image = image.convert("L")
        elif number == 4:
            image = image.convert("RGBA")
            image.putalpha(100)
        elif number == 5:
            image = image.convert("P")
        elif number == 6:
            image = picture(300, 500, 6)
        if number in (0, 7):
            exif = Image.Exif()
            exif[0x0112] = 6  # lies on its side
            path = path.with_suffix(".jpg")
            image.save(path, exif=exif)
        else:
            image.save(path)
        found.append(path)
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()
    assert not [t for t in threading.enumerate() if t.name.startswith("vitlib-read")]


def plan(
    epoch: int, samples: Sequence[int], augment: Augment | None = None, step: int = 0
) -> BatchPlan:
    """A whole step's, with its pairs."""
    if augment is None or not augment.mixes:
        return BatchPlan(epoch, step, tuple(samples))
    places, shares, boxes = draw_pairs(augment, 1, step, len(samples), (32, 32))
    return BatchPlan(epoch, step, tuple(samples), tuple(samples[p] for p in places), shares, boxes)


def read(reader: PhotoLoader, plans: Sequence[BatchPlan]) -> list[Batch]:
    with reader:
        return list(reader.batches(plans))


def workers_of(reader: PhotoLoader) -> list[int]:
    assert reader._pool is not None
    return [process.pid or 0 for process in reader._pool._processes]


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
        with PhotoLoader(paths, rule, augment, workers=workers, cache="memory") as reader:
            for epoch in range(2):  # read, and from the cache
                plans = [plan(epoch, order[:4]), plan(epoch, order[4:])]
                batches = list(reader.batches(plans))
                assert [batch.samples for batch in batches] == [tuple(order[:4]), tuple(order[4:])]
                assert all(batch.pixels.dtype == torch.float32 for batch in batches)
                assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected[order])
                assert reader.num_cached == 9


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rule", [CROPPED, FLOATS])
def test_evaluation_batches_equal_processor(
    paths: list[Path], rule: ImageProcessor, workers: int
) -> None:
    expected = rule(paths)
    with PhotoLoader(paths, rule, WITH, workers=workers) as reader:
        for _ in range(2):
            batches = list(reader.evaluation_batches(5))
            assert [batch.samples for batch in batches] == [
                (0, 1, 2, 3, 4),
                (5, 6, 7, 8, 9),
                (10, 11),
            ]
            assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected)
        some = list(reader.evaluation_batches(2, np.array([7, 2, 5])))
        assert torch.equal(torch.cat([batch.pixels for batch in some]), expected[[7, 2, 5]])
        assert list(reader.evaluation_batches(2, [])) == []
        assert len(reader) == 12
        with pytest.raises(ConfigError, match="batch_size=0"):
            reader.evaluation_batches(0)


@pytest.mark.parametrize(
    "rule", [RULE, CROPPED, FLOATS, GRAY], ids=["size", "crop", "float", "gray"]
)
def test_sample_pixels_do_not_depend_on_batch_or_worker(
    paths: list[Path], rule: ImageProcessor
) -> None:
    """Whatever batch, place, order, number of processes, cache, and what was read before."""
    whole = plan(2, range(12), WITH, step=9)
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
    other = [plan(epoch, [5, 1, 0, 8], WITH, step=epoch) for epoch in range(2)]
    [expected] = read(PhotoLoader(paths, rule, WITH, seed=1, cache="none"), [whole])
    assert expected.pixels.shape == (12, rule.in_channels, 32, 32)
    assert expected.plan == whole
    for workers in (0, 1, 2):
        for cache in ("none", "memory", "auto"):
            reader = PhotoLoader(paths, rule, WITH, seed=1, workers=workers, cache=cache)
            found = read(reader, [*other, *parts[::-1], whole])
            assert [len(batch.pixels) for batch in found] == [4, 4, 6, 0, 5, 1, 12]
            assert torch.equal(torch.cat([b.pixels for b in found[5:1:-1]]), expected.pixels)
            assert torch.equal(found[6].pixels, expected.pixels)


def test_augmentation_differs_by_epoch_seed_and_sample(paths: list[Path]) -> None:
    augment = Augment()
    same = [paths[0]] * 3
    seen = []
    for seed in (0, 1):
        reader = PhotoLoader(same, RULE, augment, seed=seed)
        seen += [b.pixels for b in read(reader, [plan(0, range(3)), plan(1, range(3))])]
    rows = torch.cat(seen)
    assert len({row.numpy().tobytes() for row in rows}) == len(rows) == 12


def test_two_ranks_read_halves_of_a_batch(paths: list[Path]) -> None:
    """Each draws the whole step's pairs and takes its half; partners may be the other's."""
    order, size = [8, 3, 1, 10, 4, 9, 0, 2], RULE.size
    assert size is not None
    [whole] = read(PhotoLoader(paths, RULE, WITH, seed=1), [plan(1, order, WITH, step=4)])
    halves = []
    for rank in range(2):
        pairs = draw_pairs(WITH, 1, 4, len(order), size)
        mine = slice(4 * rank, 4 * rank + 4)
        partners = tuple(order[place] for place in pairs.partners[mine])
        assert set(partners) - set(order[mine])
        half = BatchPlan(1, 4, tuple(order[mine]), partners, pairs.weights[mine], pairs.boxes[mine])
        halves += read(PhotoLoader(paths, RULE, WITH, seed=1, workers=rank), [half])
    assert torch.equal(torch.cat([half.pixels for half in halves]), whole.pixels)


def test_mixed_partners_are_augmented_as_samples(paths: list[Path]) -> None:
    shares, boxes = (0.3, 0.75, 1.0, 1 - 40 / 1024), (None, None, None, (2, 20, 10, 25))
    one = BatchPlan(3, 0, (0, 1, 2, 3), (1, 2, 5, 7), shares, boxes)
    alone, mixed_ones = read(PhotoLoader(paths, RULE, WITH, seed=1), [plan(3, range(8)), one])
    for place in range(4):
        own, partner = (alone.pixels[i].numpy() for i in (place, one.partners[place]))
        expected = mix_photos(own, partner, shares[place], boxes[place])
        assert np.array_equal(mixed_ones.pixels[place].numpy(), expected)
    assert torch.equal(mixed_ones.pixels[2], alone.pixels[2])
    assert not torch.equal(mixed_ones.pixels[3], alone.pixels[3])


@pytest.mark.parametrize("rule", [RULE, FLOATS])
def test_flips_without_crop_use_processor_crop(paths: list[Path], rule: ImageProcessor) -> None:
    flips = Augment(crop_scale=None, horizontal_flip=0.5)
    [batch] = read(PhotoLoader(paths, rule, flips), [plan(0, range(12))])
    flipped = 0
    for found, exact in zip(batch.pixels, rule(paths), strict=True):
        # What torch resizes as floats Pillow does in levels: half a level of rounding apart.
        near = [
            (found - one).abs().max() < (0.03 if rule is FLOATS else 1e-9)
            for one in (exact, exact.flip(2))
        ]
        assert sum(near) == 1
        flipped += near[1]
    assert 0 < flipped < 12


@pytest.mark.parametrize("rule", [RULE, FLOATS], ids=["levels", "floats"])
def test_erasing_does_not_change_the_cache(paths: list[Path], rule: ImageProcessor) -> None:
    erasing = Augment(crop_scale=None, horizontal_flip=0, random_erasing=1.0)
    with PhotoLoader(paths, rule, erasing, cache="memory") as reader:
        for epoch in range(3):  # what is kept must not be erased
            [batch] = reader.batches([plan(epoch, range(12))])
            changed = batch.pixels != rule(paths)
            assert (batch.pixels[changed] == 0).all()
            assert 0.01 < changed.float().mean() < 0.4
            assert changed.any(1).flatten(1).any(1).all()


def test_large_photos_shrink_by_whole_factors(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    apply = Augment.apply

    def note(self: Augment, levels: np.ndarray, *args: object, **more: object) -> np.ndarray:
        seen[levels.shape] = levels
        return apply(self, levels, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Augment, "apply", note)
    assert len(read(PhotoLoader(paths, RULE, Augment()), [plan(0, [6, 0, 8])])) == 1
    assert set(seen) == {(60, 100, 3), (90, 50, 3), (106, 58, 3)}  # 300 x 500 by 5
    assert np.array_equal(seen[60, 100, 3], np.asarray(Image.open(paths[6]).reduce(5)))
    assert np.array_equal(seen[90, 50, 3], np.asarray(decode(paths[0], 3)[0]))  # upright


def test_deep_photos_keep_float32(tmp_path: Path) -> None:
    """A crop, a flip and colours are changed in float32; what is made for 8 bits is refused."""
    values = np.linspace(0, 1, 60 * 70, dtype=np.float32).reshape(60, 70)
    Image.fromarray(values).save(tmp_path / "deep.tif")
    path = tmp_path / "deep.tif"
    [batch] = read(PhotoLoader([path], RULE), [plan(0, [0])])
    assert torch.equal(batch.pixels, RULE([path]))
    [batch] = read(
        PhotoLoader([path], RULE, Augment(crop_scale=None, horizontal_flip=1)), [plan(0, [0])]
    )
    assert torch.equal(batch.pixels, RULE([path]).flip(3))
    [batch] = read(PhotoLoader([path], RULE, Augment.light()), [plan(0, [0])])
    assert len(batch.pixels[0, 0].unique()) > 900
    for augment, name in ((Augment.strong(), "rand_augment_ops"), (Augment.card(), "hue")):
        with pytest.raises(DataError, match=f"deeper than 8 bits, and {name}=.* set {name}=0"):
            read(PhotoLoader([path], RULE, augment), [plan(0, [0])])


def test_reflectance_is_not_clipped() -> None:
    """Numbers beyond 255 are not clipped to levels."""
    rule = ImageProcessor(size=(16, 16), in_channels=5, rescale_factor=1e-4)
    bands = np.random.default_rng(0).integers(0, 10_000, (20, 30, 5)).astype(np.uint16)
    for augment in (Augment(crop_scale=None, horizontal_flip=0.5), Augment.light()):
        [batch] = read(PhotoLoader([bands], rule, augment), [plan(0, [0])])
        assert 0.6 < batch.pixels.max() <= 1
        assert len(batch.pixels.unique()) > 1000


def test_loader_reads_arrays() -> None:
    rule = ImageProcessor(size=(16, 16), in_channels=5)
    arrays = [np.full((20, 30, 5), 10 * n, np.uint8) for n in range(1, 4)]
    augment = Augment.strong()
    for workers in (0, 1):
        [batch] = read(PhotoLoader(arrays, rule, augment, workers=workers), [plan(0, range(3))])
        assert batch.pixels.shape == (3, 5, 16, 16)
        assert torch.isfinite(batch.pixels).all()


def test_photo_of_a_plan_is_decoded_once(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_ones: list[Path] = []

    planes = ImageProcessor.decode_planes

    def note(self: ImageProcessor, photo: Path, *more: object) -> list[Image.Image]:
        read_ones.append(photo)
        return planes(self, photo, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageProcessor, "decode_planes", note)
    twice = BatchPlan(0, 0, (0, 1, 0, 2), (1, 0, 5, 7), (0.5, 0.5, 0.5, 1.0), (None,) * 4)
    [batch] = read(PhotoLoader(paths, RULE, Augment(), cache="none"), [twice])
    assert sorted(read_ones) == [paths[n] for n in (0, 1, 2, 5)]  # 7 has no share
    assert len(batch.pixels) == 4
    read_ones.clear()
    epochs = [plan(epoch, range(12)) for epoch in range(3)]
    read(PhotoLoader(paths, RULE, Augment(), cache="none"), epochs)
    assert len(read_ones) == 36
    read_ones.clear()
    with PhotoLoader(paths, RULE, Augment()) as reader:
        for epoch in epochs:
            assert len(list(reader.batches([epoch]))) == 1
        assert reader.num_cached == 12
    assert len(read_ones) == 12
    assert reader.num_cached == 0


@pytest.mark.parametrize("augment", [None, Augment()])
def test_processes_share_the_cache(paths: list[Path], augment: Augment | None) -> None:
    [expected] = read(PhotoLoader(paths, RULE, augment), [plan(5, range(12))])
    with PhotoLoader(paths, RULE, augment, workers=2) as reader:
        list(reader.batches([plan(0, range(6)), plan(0, range(6, 12))]))  # half a process
        assert reader.num_cached == 12
        for path in paths:
            path.unlink()
        for _ in range(2):  # each process has all
            [found] = reader.batches([plan(5, range(12))])
            assert torch.equal(found.pixels, expected.pixels)


def test_cache_skips_arrays_that_do_not_fit() -> None:
    cache = ArrayCache(4, 64 + 64 + 6, threading.Lock())
    arrays = [np.full((4, 4, 3), 7, np.uint8), np.full((2, 2, 3), 0.5, np.float32)]
    for place, array in enumerate([*arrays, arrays[0], np.full((1, 1, 5), 3, np.uint8)]):
        assert cache.get(place) is None
        cache.put(place, array)
    assert len(cache) == 3
    for place, array in enumerate(arrays):
        kept = cache.get(place)
        assert kept is not None
        assert kept.dtype == array.dtype
        assert np.array_equal(kept, array)
    assert cache.get(2) is None
    cache.put(0, np.zeros((4, 4, 3), np.uint8))  # there is one already
    found = cache.get(0)
    assert found is not None
    assert found.max() == 7
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_cache_size_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def room(kind: str, free: int | None) -> int | None:
        monkeypatch.setattr(photo_cache, "available_memory", lambda _: free)
        found = create_cache(kind, 100, 1000, threading.Lock())
        return None if found is None else len(found._memory)

    assert room("none", 10**6) is None
    assert room("auto", 10**6) == 100_000  # it all fits
    assert room("auto", 10**5) == 25_000
    assert room("memory", 10**5) == 90_000
    assert room("auto", None) is None
    assert room("memory", None) == 100_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room("auto", 10**5) == 6_250

    def none_left(*_: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(photo_cache, "shared_array", none_left)
    assert room("auto", 10**6) is None
    with pytest.raises(ConfigError, match="cache='memory': no 100000 bytes to be had"):
        room("memory", 10**6)


def test_small_cache_changes_no_pixel(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [plan(epoch, range(12), WITH, step=epoch) for epoch in range(2)]
    expected = read(PhotoLoader(paths, RULE, WITH, cache="none"), plans)
    monkeypatch.setattr(photo_cache, "available_memory", lambda _: 300_000)
    with PhotoLoader(paths, RULE, WITH) as reader:
        found = list(reader.batches(plans))
        assert 0 < reader.num_cached < 12
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_pin_returns_pinned_pixels(
    paths: list[Path], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch without CUDA cannot pin memory: the test records the requests."""
    pinned: list[torch.Tensor] = []
    empty = torch.empty

    def empty_noted(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        tensor = empty(*shape, **options)
        if pin_memory:
            pinned.append(tensor)
        return tensor

    expected = read(PhotoLoader(paths, RULE, WITH, workers=workers), [plan(0, (0, 1, 2))])
    monkeypatch.setattr(torch, "empty", empty_noted)
    [batch] = read(PhotoLoader(paths, RULE, WITH, workers=workers, pin=True), [plan(0, (0, 1, 2))])
    assert [p.data_ptr() for p in pinned] == [batch.pixels.data_ptr()]
    assert torch.equal(batch.pixels, expected[0].pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_photos_are_skipped_or_raise(paths: list[Path], workers: int) -> None:
    [whole] = read(PhotoLoader(paths, RULE, WITH, seed=1), [plan(0, range(12))])
    paths[2].write_bytes(b"no photo")
    paths[7].write_bytes(paths[7].read_bytes()[:-600])
    paths[9].unlink()
    boxes = (None, (0, 0, 16, 16), None, None)
    plans = [
        plan(0, [0, 2, 1, 9, 2]),
        BatchPlan(0, 0, (3, 4, 7, 5), (7, 3, 0, 4), (0.5, 0.75, 0.5, 0.5), boxes),
        plan(0, [2, 9]),
        plan(0, [11]),
    ]
    reader = PhotoLoader(paths, RULE, WITH, seed=1, workers=workers, on_bad="skip")
    first, second, third, last = read(reader, plans)
    assert first.samples == (0, 1)
    assert torch.equal(first.pixels, whole.pixels[[0, 1]])
    assert [sample for sample, _ in first.failed] == [2, 9]
    assert "02.png' is not an image" in first.failed[0][1]
    assert "09.png' is not there" in first.failed[1][1]
    # 7 is neither there nor mixed into 3, which is left as it is.
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
    with PhotoLoader(paths, RULE, workers=workers) as reader:
        batches = reader.batches([plan(0, [0, 1]), plan(0, [3, 9, 2]), plan(0, [4])])
        assert next(batches).samples == (0, 1)
        with pytest.raises(
            DataError, match=r"photo 9 cannot be used: '.*09.png' is not there"
        ) as raised:
            next(batches)
        assert isinstance(raised.value.__cause__, ImageError)
        assert "\n" not in str(raised.value)
        with pytest.raises(DataError, match=r"photo 2 .*02.png"):
            list(reader.evaluation_batches(3))


class Slow(Sequence[Path]):
    """Photos of which one takes longer than any test."""

    def __init__(self, paths: list[Path], slow: int) -> None:
        self.paths, self.slow = paths, slow

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Path:  # type: ignore[override]
        if index == self.slow:
            time.sleep(600)
        return self.paths[index]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_worker_raises(paths: list[Path], victim: int) -> None:
    """The one that is waited for, and another."""
    reader = PhotoLoader(Slow(paths, 5), RULE, workers=2)
    batches = reader.batches([plan(0, [0]), plan(0, [1]), plan(0, [5]), plan(0, [2]), plan(0, [3])])
    assert next(batches).samples == (0,)
    assert next(batches).samples == (1,)
    pids = workers_of(reader)
    killer = threading.Timer(0.3, os.kill, (pids[victim], signal.SIGKILL))
    killer.start()
    start = time.monotonic()
    with pytest.raises(
        TrainError, match=f"reader process {pids[victim]} was killed by SIGKILL: "
    ) as raised:
        next(batches)
    assert time.monotonic() - start < 20
    assert "\n" not in str(raised.value)
    killer.join()
    assert not multiprocessing.active_children()
    with pytest.raises(TrainError, match="closed, or one of its processes has ended"):
        next(reader.batches([plan(0, [0])]))
    reader.close()


def test_failed_worker_raises(paths: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    with PhotoLoader(paths, RULE, workers=1) as reader:
        batches = reader.batches([plan(0, [0]), plan(0, [99])])
        with pytest.raises(TrainError, match="ended with status 1"):
            list(batches)
    assert "IndexError" in capfd.readouterr().err


def test_close_ends_pending_reads(paths: list[Path]) -> None:
    reader = PhotoLoader(Slow(paths, 3), RULE, workers=2)
    batches = reader.batches([plan(0, [0]), plan(0, [3]), plan(0, [1]), plan(0, [3])])
    assert next(batches).samples == (0,)
    pids = workers_of(reader)
    start = time.monotonic()
    reader.close()
    reader.close()
    assert time.monotonic() - start < 20
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(TrainError, match="the reader is closed"):
        next(batches)
    with pytest.raises(ConfigError, match="the reader is closed"):
        next(reader.batches([plan(0, [0])]))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_evaluation_runs_within_an_epoch(paths: list[Path], workers: int) -> None:
    """And an epoch that is left, and batches that grow."""
    epoch = [plan(0, [n, n + 1], step=n) for n in range(0, 12, 2)]
    expected = read(PhotoLoader(paths, RULE, Augment()), epoch)
    exact = RULE(paths)
    with PhotoLoader(paths, RULE, Augment(), workers=workers) as reader:
        left = reader.batches(epoch)
        assert torch.equal(next(left).pixels, expected[0].pixels)
        batches = reader.batches(epoch)
        for number, batch in enumerate(batches):
            assert torch.equal(batch.pixels, expected[number].pixels)
            if number in (1, 2, 4):
                found = torch.cat([b.pixels for b in reader.evaluation_batches(4 + number)])
                assert torch.equal(found, exact)
            if number == 2:
                assert torch.equal(next(left).pixels, expected[1].pixels)
                left.close()  # type: ignore[attr-defined]
        assert number == 5
        if reader._pool is not None:
            assert not reader._pool._done


def test_plans_are_taken_a_bounded_number_ahead(paths: list[Path]) -> None:
    for workers, ahead in ((0, 2), (2, 4)):
        asked = 0

        def plans() -> Iterator[BatchPlan]:
            nonlocal asked
            for number in range(100):
                asked += 1
                yield plan(0, [number % 12], step=number)

        with PhotoLoader(paths, RULE, workers=workers) as reader:
            batches = reader.batches(plans())
            for taken in range(1, 9):
                next(batches)
                assert asked == taken - 1 + ahead
            batches.close()  # type: ignore[attr-defined]


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


SCRIPT = """
    import sys, time
    import torch
    from vitlib import ImageProcessor
    from vitlib.train.augment import Augment
    from vitlib.train.sampler import BatchPlan
    from vitlib.train.loader.loader import PhotoLoader
    torch.mm(torch.rand(500, 500), torch.rand(500, 500)).sum()  # threads of torch's own
    reader = PhotoLoader(sys.argv[2:], ImageProcessor(size=(32, 32)), Augment.strong(), workers=2)
    batches = reader.batches(BatchPlan(0, n, (0, 1, 2)) for n in range(20))
    total = next(batches).pixels.sum()
    print(*[p.pid for p in reader._pool._processes], flush=True)
    with open("/proc/self/maps") as file:  # whatever has a name would stay after a kill
        named = [line for line in file if "/dev/shm" in line and "(deleted)" not in line]
    assert not named, named
    if sys.argv[1] == "sleep":
        time.sleep(600)
    total = sum(batch.pixels.sum() for batch in batches)
    if sys.argv[1] == "close":
        reader.close()
    print("done", flush=True)
"""


@pytest.mark.parametrize("way", ["close", "leave"])
def test_script_leaves_no_process_or_file(paths: list[Path], way: str) -> None:
    """No warning, semaphore, process or temporary file, though a script forgets to close it."""
    process = run(SCRIPT, way, *paths[:3])
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    pids, done = out.splitlines()
    assert done == "done"
    for pid in map(int, pids.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_killed_parent(paths: list[Path]) -> None:
    process = run(SCRIPT, "sleep", *paths[:3])
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 30
    while any(
        Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in pids
    ):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_loader_uses_threads_without_fork(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vitlib.train.loader.loader.can_fork", lambda: False)
    with caplog.at_level("INFO", "vitlib"):
        reader = PhotoLoader(paths, RULE, workers=2)
    assert "this system cannot fork: threads read the photos" in caplog.text
    assert torch.equal(read(reader, [plan(0, range(12))])[0].pixels, RULE(paths))


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
    with PhotoLoader(some, rule, workers=2) as reader:
        [batch] = reader.batches([plan(0, range(6))])
        assert torch.equal(batch.pixels, rule(some))
    [light] = read(PhotoLoader(some, rule, Augment.light(), workers=2), [plan(0, range(6))])
    assert light.pixels.shape == (6, 3, 224, 224)
    difference = (light.pixels.mean((2, 3)) - batch.pixels.mean((2, 3))).abs()
    assert 0 < difference.max() < 1.5  # still about as bright and as coloured
