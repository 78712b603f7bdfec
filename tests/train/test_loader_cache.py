"""The cache of decoded photos, in memory that processes share."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.training_batches import (
    ALL_AUGMENTS,
    RULE,
    make_plan,
    read_batches,
)
from vitlib import ImageProcessor
from vitlib.errors import ConfigError
from vitlib.train.augment import Augment
from vitlib.train.loader import cache as photo_cache
from vitlib.train.loader.cache import ArrayCache, create_cache
from vitlib.train.loader.loader import PhotoLoader
from vitlib.train.sampler import BatchPlan

pytestmark = pytest.mark.usefixtures("no_leftovers")


def test_photo_of_a_plan_is_decoded_once(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []

    planes = ImageProcessor.decode_planes

    def note(self: ImageProcessor, photo: Path, *more: object) -> list[Image.Image]:
        decoded.append(photo)
        return planes(self, photo, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageProcessor, "decode_planes", note)
    twice = BatchPlan(0, 0, (0, 1, 0, 2), (1, 0, 5, 7), (0.5, 0.5, 0.5, 1.0), (None,) * 4)
    [batch] = read_batches(PhotoLoader(paths, RULE, Augment(), cache="none"), [twice])
    assert sorted(decoded) == [paths[n] for n in (0, 1, 2, 5)]  # 7 has no share
    assert len(batch.pixels) == 4
    decoded.clear()
    epochs = [make_plan(epoch, range(12)) for epoch in range(3)]
    read_batches(PhotoLoader(paths, RULE, Augment(), cache="none"), epochs)
    assert len(decoded) == 36
    decoded.clear()
    with PhotoLoader(paths, RULE, Augment()) as loader:
        for epoch in epochs:
            assert len(list(loader.batches([epoch]))) == 1
        assert loader.num_cached == 12
    assert len(decoded) == 12
    assert loader.num_cached == 0


@pytest.mark.parametrize("augment", [None, Augment()])
def test_processes_share_the_cache(paths: list[Path], augment: Augment | None) -> None:
    [expected] = read_batches(PhotoLoader(paths, RULE, augment), [make_plan(5, range(12))])
    with PhotoLoader(paths, RULE, augment, workers=2) as loader:
        list(loader.batches([make_plan(0, range(6)), make_plan(0, range(6, 12))]))  # half a process
        assert loader.num_cached == 12
        for path in paths:
            path.unlink()
        for _ in range(2):  # each process has all
            [actual] = loader.batches([make_plan(5, range(12))])
            assert torch.equal(actual.pixels, expected.pixels)


def test_cache_skips_arrays_that_do_not_fit() -> None:
    cache = ArrayCache(4, 64 + 64 + 6, threading.Lock())
    arrays = [np.full((4, 4, 3), 7, np.uint8), np.full((2, 2, 3), 0.5, np.float32)]
    for index, array in enumerate([*arrays, arrays[0], np.full((1, 1, 5), 3, np.uint8)]):
        assert cache.get(index) is None
        cache.put(index, array)
    assert len(cache) == 3
    for index, array in enumerate(arrays):
        cached = cache.get(index)
        assert cached is not None
        assert cached.dtype == array.dtype
        assert np.array_equal(cached, array)
    assert cache.get(2) is None
    cache.put(0, np.zeros((4, 4, 3), np.uint8))  # there is one already
    actual = cache.get(0)
    assert actual is not None
    assert actual.max() == 7
    with pytest.raises(ValueError, match="read-only"):
        actual[0] = 1


def test_cache_size_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def room(kind: str, free: int | None) -> int | None:
        monkeypatch.setattr(photo_cache, "available_memory", lambda _: free)
        actual = create_cache(kind, 100, 1000, threading.Lock())
        return None if actual is None else len(actual._memory)

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
    plans = [make_plan(epoch, range(12), ALL_AUGMENTS, step=epoch) for epoch in range(2)]
    expected = read_batches(PhotoLoader(paths, RULE, ALL_AUGMENTS, cache="none"), plans)
    monkeypatch.setattr(photo_cache, "available_memory", lambda _: 300_000)
    with PhotoLoader(paths, RULE, ALL_AUGMENTS) as loader:
        actual = list(loader.batches(plans))
        assert 0 < loader.num_cached < 12
    for batch, reference in zip(actual, expected, strict=True):
        assert torch.equal(batch.pixels, reference.pixels)
