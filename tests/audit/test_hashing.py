"""Perceptual hashes, and near pairs of them by both searches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageEnhance

from vitlib.audit import hashing
from vitlib.audit.hashing import count_bits, hash_grey, near_hashes


def scene(seed: int) -> Image.Image:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC)


def grey(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX))


def bits(first: int, second: int) -> int:
    return bin(first ^ second).count("1")


def test_bits_equal_python() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 50, dtype=np.uint64)
    values[:2] = 0, 2**64 - 1
    expected = [[bits(int(a), int(b)) for b in values] for a in values]
    np.testing.assert_array_equal(count_bits(values[:, None], values[None]), expected)


def test_hash_equals_the_definition() -> None:
    from scipy.fft import dctn  # scikit-learn needs scipy

    pixels = grey(scene(1)).astype(float)
    low = dctn(pixels, type=2)[:8, :8].ravel()[1:]
    expected = int("0" + "".join("1" if x > np.median(low) else "0" for x in low), 2)
    # scipy scales all coefficients of type 2 by the same factor.
    assert hash_grey(pixels)[0] == expected


def test_mirror_hash_is_the_hash_of_the_mirror_image() -> None:
    for seed in range(5):
        pixels = grey(scene(seed))
        assert hash_grey(pixels)[1] == hash_grey(pixels[:, ::-1])[0]
        assert hash_grey(pixels)[0] != hash_grey(pixels)[1]


def test_hash_keeps_what_encoding_and_light_change(tmp_path: Path) -> None:
    image = scene(3)
    image.save(tmp_path / "a.jpg", quality=20)
    others = [Image.open(tmp_path / "a.jpg"), ImageEnhance.Brightness(image).enhance(0.7)]
    others.append(image.resize((40, 40)))
    own = hash_grey(grey(image))[0]
    assert max(bits(own, hash_grey(grey(other))[0]) for other in others) <= 7
    assert min(bits(own, hash_grey(grey(scene(seed)))[0]) for seed in range(4, 30)) > 7


@pytest.mark.parametrize("all_pairs", [10**6, 0], ids=["all pairs", "shared bytes"])
@pytest.mark.parametrize("block", [10**6, 7], ids=["one block", "many"])
def test_near_hashes_equal_brute_force(
    monkeypatch: pytest.MonkeyPatch, all_pairs: int, block: int
) -> None:
    monkeypatch.setattr(hashing, "ALL_PAIRS", all_pairs)
    monkeypatch.setattr(hashing, "BLOCK", block)
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 120, dtype=np.uint64)
    for index in range(1, 120, 2):  # the neighbour before, with 0 to 11 bits changed
        flips = rng.choice(64, index % 12, replace=False)
        hashes[index] = hashes[index - 1] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    for queries in (hashes, rng.permutation(hashes)):
        found = {
            tuple(pair) for pairs in near_hashes(hashes, queries, 7) for pair in pairs.tolist()
        }
        expected = {
            (min(i, j), max(i, j))
            for i in range(120)
            for j in range(120)
            if i != j and bits(int(hashes[i]), int(queries[j])) <= 7
        }
        assert found == expected
        assert expected
