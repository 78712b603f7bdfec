"""Duplicates among inspected photos, and the rows that name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from fixtures.audit_sets import photo
from vitlib.audit import duplicates
from vitlib.audit.duplicates import Duplicates, describe, find_duplicates, match_across
from vitlib.audit.findings import Names, list_duplicates
from vitlib.audit.inspection import GreyCopies, Inspection, inspect_photos
from vitlib.features.extraction import hash_photo


def inspect(folder: Path, *images: Image.Image) -> Inspection:
    """Write images as 0.png, 1.png, ... and inspect them."""
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return inspect_photos(paths, [hash_photo(path) for path in paths], folder / "facts.npy")


def find(inspection: Inspection) -> Duplicates:
    """Find duplicates by embeddings that tell nothing."""
    rows = np.arange(len(inspection.facts))
    vectors = np.random.default_rng(0).normal(size=(len(rows), 8)).astype(np.float32)
    return find_duplicates(inspection.facts, GreyCopies(inspection.grey, rows), vectors)


def names_of(count: int, labels: str = "") -> Names:
    given = [(label,) for label in labels] or [None] * count
    return Names([f"/{i}.png" for i in range(count)], np.zeros(count, int), ["data"], given)


def test_copies_are_grouped_around_the_largest(tmp_path: Path) -> None:
    image = photo(1, (200, 150))
    inspection = inspect(
        tmp_path,
        image.resize((100, 75)), image, ImageOps.mirror(image), photo(2), photo(3),
        ImageEnhance.Brightness(image).enhance(0.7), image,
    )  # fmt: skip
    found = find(inspection)
    assert found.equal.tolist() == [0, 1, 2, 3, 4, 5, 1]
    assert len(set(found.centres[[0, 1, 2, 5, 6]].tolist())) == 1
    assert found.centres[[3, 4]].tolist() == [3, 4]
    rows = list_duplicates(found, names_of(7, "aaabbaa"), inspection.facts)
    assert [row.filename for row in rows] == ["/1.png", "/0.png", "/2.png", "/5.png", "/6.png"]
    assert [row.kind for row in rows] == ["kept", "near", "near", "near", "bytes"]
    assert {row.same_as for row in rows[1:]} == {"/1.png"}
    assert not rows[0].conflict
    assert rows[2].reason.startswith("mirrored")
    conflict = list_duplicates(found, names_of(7, "aabbbaa"), inspection.facts)
    assert all(row.conflict for row in conflict)


def test_photos_of_one_colour_are_equal_only_by_pixels(tmp_path: Path) -> None:
    colours = [Image.new("RGB", (60, 40), colour) for colour in ("red", "maroon", "red")]
    found = find(inspect(tmp_path, *colours))
    assert found.equal.tolist() == [0, 1, 0]
    assert found.matches == ()


def test_crops_of_one_photo_are_joined_by_it_alone(tmp_path: Path) -> None:
    image = photo(7, (240, 180))
    left, right = image.crop((0, 0, 150, 180)), image.crop((90, 0, 240, 180))
    both = find(inspect(tmp_path, left, right, photo(8)))
    assert both.matches == ()
    found = find(inspect(tmp_path, left, right, image))
    assert {(m.first, m.second) for m in found.matches} == {(0, 2), (1, 2)}
    assert found.centres.tolist() == [2, 2, 2]
    assert all("a crop of" in describe(match) for match in found.matches)


def test_each_photo_of_one_side_has_its_best_match(tmp_path: Path) -> None:
    image = photo(4, (160, 120))
    inspection = inspect(tmp_path, image, photo(5), image, ImageOps.mirror(image), photo(6))
    found = find(inspection)
    sides = np.array([False, False, True, True, True])
    [match] = match_across(found, sides, inspection.facts)
    assert (match.first, match.second, match.kind) == (0, 2, "bytes")
    sides = np.array([False, False, False, True, True])
    matches = match_across(found, sides, inspection.facts)
    assert [(m.first, m.second, m.kind) for m in matches] == [(0, 3, "near"), (2, 3, "near")]


def test_too_many_hash_pairs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_HASH_PAIRS", 10)
    same = np.zeros(30, np.uint64)
    pairs, limited = duplicates.propose_pairs(same, same, np.empty((30, 0), np.float32)[:0])
    assert limited
    assert len(pairs) > 10
    different = np.arange(30, dtype=np.uint64) * np.uint64(0x0101010101010101 * 7)
    assert not duplicates.propose_pairs(different[:2], different[:2], np.empty((0, 4)))[1]
