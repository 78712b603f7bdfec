"""Photos of poor quality, and the facts that tell them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitlib.audit import inspection
from vitlib.audit.inspection import FACTS, inspect_photo, inspect_photos
from vitlib.audit.quality import find_problems
from vitlib.errors import ImageError
from vitlib.features.extraction import hash_photo


def facts_of(count: int, **fields: object) -> np.ndarray:
    """Facts of ordinary photos, with other values of the first."""
    facts = np.zeros(count, FACTS)
    facts["width"], facts["height"] = 640, 480
    facts["spread"], facts["chroma"], facts["orientation"] = 50, 100, 1
    for name, value in fields.items():
        facts[name][0] = value
    return facts


@pytest.mark.parametrize(
    ("fields", "issue"),
    [
        ({"spread": 0.5}, "blank"),
        ({"width": 20, "height": 30}, "tiny"),
        ({"width": 2000, "height": 480}, "shape"),
        ({"chroma": 2.0}, "grey"),
        ({"orientation": 6}, "orientation"),
    ],
)
def test_problem_is_found(fields: dict[str, float], issue: str) -> None:
    problems = find_problems(facts_of(20, **fields))
    assert [(p.photo, p.issue) for p in problems] == [(0, issue)]
    assert find_problems(facts_of(20)) == []


def test_what_all_photos_are_is_no_problem() -> None:
    facts = facts_of(20)
    facts["width"], facts["height"], facts["chroma"] = 28, 28, 0
    assert find_problems(facts) == []
    facts["width"] = 280
    assert find_problems(facts) == []


def test_colour_among_grey() -> None:
    facts = facts_of(20)
    facts["chroma"][1:] = 1
    assert [(p.photo, p.issue) for p in find_problems(facts)] == [(0, "colour")]
    facts["chroma"][:5] = 100  # a quarter is not rare
    assert find_problems(facts) == []


def test_facts_of_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((120, 80), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "b.webp", lossless=True)
    image.save(tmp_path / "c.bmp")
    image.convert("L").save(tmp_path / "grey.jpg")
    Image.new("RGB", (50, 40), (9, 200, 30)).save(tmp_path / "blank.jpg")
    turned = inspect_photo(tmp_path / "a.png")["facts"]
    assert (turned["orientation"], turned["width"], turned["height"]) == (6, 80, 120)
    upright, same = (inspect_photo(tmp_path / name)["facts"] for name in ("b.webp", "c.bmp"))
    assert upright["orientation"] == 1
    assert (upright["pixels"] == same["pixels"]).all()
    assert (upright["pixels"] != turned["pixels"]).any()
    assert upright["chroma"] > 50 > 8 > inspect_photo(tmp_path / "grey.jpg")["facts"]["chroma"]
    assert inspect_photo(tmp_path / "blank.jpg")["facts"]["spread"] < 2 < upright["spread"]
    with pytest.raises(ImageError):
        inspect_photo(tmp_path / "absent.png")


def test_facts_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    paths.append(tmp_path / "broken.jpg")
    paths[-1].write_bytes(b"\xff\xd8\xff no photo")
    digests = [hash_photo(path) for path in paths]
    first = inspect_photos(paths, digests, tmp_path / "facts.npy")
    assert list(first.errors) == [4]
    assert first.facts["digest"].any(axis=1).tolist() == [True] * 4 + [False]
    calls = []
    original = inspection.inspect_photo
    monkeypatch.setattr(
        inspection, "inspect_photo", lambda path: calls.append(path.name) or original(path)
    )
    Image.new("RGB", (9, 9)).save(paths[2])
    digests[2] = hash_photo(paths[2])
    second = inspect_photos(
        paths[::-1], digests[::-1], tmp_path / "new.npy", earlier=tmp_path / "facts.npy"
    )
    assert sorted(calls) == ["2.png", "broken.jpg"]
    assert list(second.errors) == [0]
    for index in (0, 1, 3):
        assert second.facts[4 - index] == first.facts[index]
        np.testing.assert_array_equal(second.grey[4 - index], first.grey[index])
    assert second.facts["width"][2] == 9
    # A damaged file, or one of another form, is not read.
    calls.clear()
    for content in (b"damaged", b""):
        (tmp_path / "bad.npy").write_bytes(content)
        inspect_photos(paths, digests, tmp_path / "x.npy", earlier=tmp_path / "bad.npy")
    assert len(calls) == 2 * 5
