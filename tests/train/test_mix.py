"""MixUp and CutMix: pairs, photos and targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitlib.train.augment import Augment
from vitlib.train.augment_photo import sample_rng
from vitlib.train.mix import MixPairs, draw_cutmix_box, draw_pairs, mix_photos, mix_targets

MIXUP = Augment(mixup_alpha=1.0)
CUTMIX = Augment(cutmix_alpha=1.0)
BOTH = Augment(mixup_alpha=0.8, cutmix_alpha=1.0)
SIZE = (32, 48)
NAN = float("nan")


def test_pairs_depend_on_seed_and_step_alone() -> None:
    first = draw_pairs(BOTH, 3, 17, 64, SIZE)
    np.random.default_rng().random(3)
    torch.rand(3)
    assert draw_pairs(BOTH, 3, 17, 64, SIZE) == first
    assert draw_pairs(BOTH, 3, 18, 64, SIZE).weights != first.weights
    assert draw_pairs(BOTH, 4, 17, 64, SIZE).partners != first.partners
    assert draw_pairs(BOTH, 17, 3, 64, SIZE).partners != first.partners


def test_pairs_differ_from_sample_rng() -> None:
    """SeedSequence pads with zeros, so (3, 17) and (3, 17, 0) would be the same seed."""
    pairs = draw_pairs(MIXUP, 3, 17, 64, SIZE)
    assert sample_rng(3, 17, 0).permutation(64).tolist() != _ring(pairs)


def _ring(pairs: MixPairs) -> list[int]:
    """Return the ring of the pairs, rotated to start like the sample's permutation."""
    ring = [0]
    while pairs.partners[ring[-1]] != 0:
        ring.append(pairs.partners[ring[-1]])
    assert len(ring) == len(pairs.partners)
    drawn = sample_rng(3, 17, 0).permutation(64).tolist()
    start = ring.index(drawn[0])
    return ring[start:] + ring[:start]


@pytest.mark.parametrize("count", [2, 3, 65])
def test_every_photo_is_a_partner_once(count: int) -> None:
    for step in range(20):
        partners, weights, boxes = draw_pairs(MIXUP, 0, step, count, SIZE)
        assert sorted(partners) == list(range(count))
        assert all(index != partner for index, partner in enumerate(partners))
        assert all(0 <= share < 1 for share in weights)
        assert boxes == (None,) * count
        assert len(set(weights)) == count  # each pair has its own


def test_no_pairs_without_mixing() -> None:
    assert draw_pairs(Augment(), 0, 0, 8, SIZE) == MixPairs()
    assert draw_pairs(Augment(mixup_alpha=1.0, mix_prob=0.0), 0, 0, 8, SIZE) == MixPairs()
    assert draw_pairs(BOTH, 0, 0, 1, SIZE) == MixPairs((0,), (1.0,), (None,))
    assert draw_pairs(BOTH, 0, 0, 0, SIZE) == MixPairs()


def test_cutmix_weight_counts_whole_pixels() -> None:
    ones, zeros = np.ones((2, *SIZE), np.float32), np.zeros((2, *SIZE), np.float32)
    cut_off = whole = 0
    for step in range(40):
        partners, weights, boxes = draw_pairs(CUTMIX, 0, step, 8, SIZE)
        for index in range(8):
            box = boxes[index]
            if box is None:
                assert (partners[index], weights[index]) == (index, 1.0)
                continue
            top, left, bottom, right = box
            assert 0 <= top < bottom <= 32
            assert 0 <= left < right <= 48
            actual = mix_photos(ones, zeros, weights[index], box)
            assert actual.mean(dtype=np.float64) == weights[index]
            assert (actual == 0).sum() == 2 * (bottom - top) * (right - left)
            edge = 0 in (top, left) or bottom == 32 or right == 48
            cut_off, whole = cut_off + edge, whole + (not edge)
    assert cut_off > 20
    assert whole > 20


def test_cutmix_box_known_values() -> None:
    class Fixed:
        def __init__(self, *values: int) -> None:
            self.values = list(values)

        def integers(self, _: int) -> int:
            return self.values.pop(0)

    # A quarter of 8 x 16 is 4 x 8.
    assert draw_cutmix_box(0.75, (8, 16), Fixed(4, 8)) == (2, 4, 6, 12)  # type: ignore[arg-type]
    assert draw_cutmix_box(0.75, (8, 16), Fixed(0, 15)) == (0, 11, 2, 16)  # type: ignore[arg-type]
    assert draw_cutmix_box(0.0, (8, 16), Fixed(4, 8)) == (0, 0, 8, 16)  # type: ignore[arg-type]


def test_pair_distributions() -> None:
    def all_of(augment: Augment) -> tuple[np.ndarray, int, int]:
        drawn = [draw_pairs(augment, 0, step, 100, (224, 224)) for step in range(30)]
        weights = np.concatenate([pairs.weights for pairs in drawn])
        boxes = sum(box is not None for pairs in drawn for box in pairs.boxes)
        own = sum(index == p for pairs in drawn for index, p in enumerate(pairs.partners))
        return weights, boxes, own

    weights, boxes, own = all_of(MIXUP)
    assert (boxes, own) == (0, 0)
    assert (weights.mean(), weights.std()) == pytest.approx((0.5, 12**-0.5), abs=0.02)
    narrow, _, _ = all_of(Augment(mixup_alpha=50.0))
    assert narrow.std() == pytest.approx((1 / (4 * 101)) ** 0.5, abs=0.005)
    _, boxes, own = all_of(Augment(mixup_alpha=1.0, cutmix_alpha=1.0, mix_switch_prob=0.3))
    assert boxes / 3000 == pytest.approx(0.3, abs=0.03)
    weights, boxes, own = all_of(Augment(mixup_alpha=1.0, mix_prob=0.6))
    assert own / 3000 == pytest.approx(0.4, abs=0.03)
    assert (weights == 1).sum() == own
    _, boxes, own = all_of(CUTMIX)
    assert boxes == 3000 - own
    assert own < 30


def test_mix_photos_known_values() -> None:
    own = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    partner = np.full((1, 2, 4), 100, np.float32)
    before = own.copy(), partner.copy()
    assert mix_photos(own, partner, 0.75, None)[0].tolist() == [
        [25, 25.75, 26.5, 27.25],
        [28, 28.75, 29.5, 30.25],
    ]
    assert mix_photos(own, partner, 0.5, (0, 1, 2, 3))[0].tolist() == [
        [0, 100, 100, 3],
        [4, 100, 100, 7],
    ]
    assert mix_photos(own, partner, 1.0, None) is own
    assert mix_photos(own, partner, 0.75, None).dtype == np.float32
    assert np.array_equal(own, before[0])
    assert np.array_equal(partner, before[1])


def test_mix_targets_known_values() -> None:
    own = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1]])
    partners = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 1, 1]])
    expected = torch.tensor([[0.25, 0, 0.75], [0, 1, 0], [1, 0, 1]])
    assert torch.equal(mix_targets(own, partners, (0.25, 0.5, 1.0)), expected)
    assert torch.equal(mix_targets(own, partners, torch.tensor([0.25, 0.5, 1.0])), expected)
    assert mix_targets(own, partners, (0.25, 0.5, 1.0)).dtype == torch.float32
    assert mix_targets(own[:0], partners[:0], ()).shape == (0, 3)


def test_mix_targets_unknown_labels() -> None:
    own = torch.tensor([[NAN, 1.0, 0.0]] * 3)
    partners = torch.tensor([[1.0, NAN, 1.0]] * 3)
    actual = mix_targets(own, partners, (0.5, 1.0, 0.0))
    expected = torch.tensor([[NAN, NAN, 0.5], [NAN, 1.0, 0.0], [1.0, NAN, 1.0]])
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(-1), expected.nan_to_num(-1))
