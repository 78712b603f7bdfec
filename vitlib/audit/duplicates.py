"""Duplicates among photos: the same bytes, the same pixels, or near duplicates.

Three steps. Photos of equal bytes or pixels are one, whatever they are. Of each such photo, pairs
are proposed by perceptual hashes (re-encoded, resized, brighter, mirrored ones) and by embeddings
(crops). alignment.py compares each pair, and two thresholds decide.

Shapes: N photos, P pairs.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.audit.alignment import Alignments, align
from vitlib.audit.grouping import group_equal, group_stars
from vitlib.audit.hashing import count_bits, near_hashes
from vitlib.audit.inspection import Facts, is_flat
from vitlib.audit.search import find_neighbours, near_pairs, unique_pairs, whiten
from vitlib.retrieval import unit

# Chosen on photos that no figure of benchmarks/RESULTS.md is measured on: docs/audit.md.
MAX_DIFFERENCE, MIN_CORRELATION = 0.1, 0.9
# Photos of few pixels have less to tell them apart: if the larger photo's shorter side is less.
TINY_SIDE, TINY_DIFFERENCE = 64, 0.065
HASH_RADIUS = 7  # bits of 63
NEIGHBOURS, LEAST_NEIGHBOURS = 40, 3  # of each photo, by its embedding
MAX_PAIRS = 40_000  # proposed by embeddings, where each photo has its least number of neighbours
MAX_HASH_PAIRS = 2_000_000  # proposed by hashes: 32 MiB
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Kind = Literal["bytes", "pixels", "near"]


class Match(NamedTuple):
    """Two photos that are the same.

    Attributes:
        first: a photo.
        second: another.
        kind: "bytes", "pixels" or "near".
        difference: largest mean squared difference in a cell, in units of the variance.
        correlation: of brightness where they overlap.
        cosine: of their embeddings; NaN without embeddings.
        hash_bits: bits in which their perceptual hashes differ, of the better orientation.
        mirrored: True if one is flipped horizontally.
        scale: share of the whole's side that the part takes, of the shorter share.
    """

    first: int
    second: int
    kind: Kind
    difference: float = 0.0
    correlation: float = 1.0
    cosine: float = 1.0
    hash_bits: int = 0
    mirrored: bool = False
    scale: float = 1.0


class Duplicates(NamedTuple):
    """Photos that are the same.

    Attributes:
        equal: (N,) lowest photo with the bytes or the pixels of each.
        centres: (N,) centre of each photo's group, near duplicates included.
        matches: near duplicates among photos of different pixels.
        proposed: number of pairs that were compared.
        limited: True if hashes proposed more pairs than are compared.
    """

    equal: Ints
    centres: Ints
    matches: tuple[Match, ...]
    proposed: int
    limited: bool = False


def find_duplicates(facts: Facts, grey: Any, vectors: Floats) -> Duplicates:
    """Find duplicates among photos that can be read.

    Args:
        facts: (N,) FACTS.
        grey: (N, 64, 64) grey copies, or GreyCopies.
        vectors: (N, D) embeddings.

    Returns:
        The duplicates; numbers are rows of the facts.
    """
    digests = [row.tobytes() for row in facts["digest"]]
    pixels = [row.tobytes() for row in facts["pixels"]]
    equal = group_equal(digests, pixels)
    # One photo stands for all of its pixels. Photos of one colour are alike without being copies.
    rows = np.flatnonzero((equal == np.arange(len(equal))) & ~is_flat(facts))
    proposed, limited = propose_pairs(
        facts["hash"][rows], facts["mirror_hash"][rows], vectors[rows]
    )
    pairs = rows[proposed]
    shapes = np.stack([facts["width"], facts["height"]], axis=1).astype(np.int64)
    overlaps = align(grey, shapes, pairs)
    matches = _list_matches(pairs, overlaps, facts, vectors)
    near = np.array([match[:2] for match in matches], np.int64).reshape(-1, 2)
    centres = group_stars(len(equal), near, shapes.prod(axis=1))
    return Duplicates(equal, centres[equal], tuple(matches), len(pairs), limited)


def propose_pairs(
    hashes: npt.NDArray[np.uint64], mirror_hashes: npt.NDArray[np.uint64], vectors: Floats
) -> tuple[Ints, bool]:
    """Propose pairs of photos to compare.

    Args:
        hashes: (N,) perceptual hashes.
        mirror_hashes: (N,) those of the mirror images.
        vectors: (N, D) embeddings.

    Returns:
        (P, 2) pairs i < j, and True if hashes proposed more than MAX_HASH_PAIRS.
    """
    parts, count = [], 0
    for queries in (hashes, mirror_hashes):
        for pairs in near_hashes(hashes, queries, HASH_RADIUS):
            parts.append(pairs)
            count += len(pairs)
            if count > MAX_HASH_PAIRS:  # repeated pairs count once
                parts = [unique_pairs(np.concatenate(parts))]
                count = len(parts[0])
            if count > MAX_HASH_PAIRS:
                break
    limited = count > MAX_HASH_PAIRS
    if len(vectors) > 1:
        k = int(np.clip(MAX_PAIRS // len(vectors), LEAST_NEIGHBOURS, NEIGHBOURS))
        rows, own = whiten(vectors), np.arange(len(vectors))
        parts.append(near_pairs(find_neighbours(rows, rows, k, query_groups=own, groups=own)))
    return unique_pairs(np.concatenate(parts) if parts else np.empty((0, 2))), limited


def _list_matches(pairs: Ints, overlaps: Alignments, facts: Facts, vectors: Floats) -> list[Match]:
    """List the pairs within the thresholds, the most alike first."""
    sides = np.minimum(facts["width"], facts["height"])[pairs].max(axis=1)
    limits = np.where(sides < TINY_SIDE, TINY_DIFFERENCE, MAX_DIFFERENCE)
    near = (overlaps.difference <= limits) & (overlaps.correlation >= MIN_CORRELATION)
    chosen = np.flatnonzero(near)
    chosen = chosen[np.argsort(overlaps.difference[chosen], kind="stable")]
    first, second = pairs[chosen].T
    cosines = np.einsum("nd,nd->n", unit(vectors[first]), unit(vectors[second]))
    bits = [count_bits(facts[key][first], facts["hash"][second]) for key in ("hash", "mirror_hash")]
    least = np.minimum(*bits)
    return [
        Match(
            int(first[i]),
            int(second[i]),
            "near",
            round(float(overlaps.difference[row]), 4),
            round(float(overlaps.correlation[row]), 4),
            round(min(float(cosines[i]), 1.0), 4),
            int(least[i]),
            bool(overlaps.mirrored[row]),
            round(float(overlaps.scale[row]), 3),
        )
        for i, row in enumerate(chosen)
    ]


def match_across(duplicates: Duplicates, sides: npt.NDArray[np.bool_], facts: Facts) -> list[Match]:
    """Find the photos of one side that are also on the other.

    Args:
        duplicates: of both sides together.
        sides: (N,) True for photos of the second side.
        facts: (N,) FACTS, which tell equal bytes from equal pixels.

    Returns:
        For each photo of the first side with a duplicate on the second its best match, (first side,
        second side), ascending.
    """
    members: dict[int, tuple[list[int], list[int]]] = {}
    for photo, root in enumerate(duplicates.equal.tolist()):
        members.setdefault(root, ([], []))[int(sides[photo])].append(photo)
    best: dict[int, Match] = {}
    for here, there in members.values():
        for photo in here if there else ():
            best[photo] = match_equal(photo, there, facts)
    for match in duplicates.matches:  # the most alike first
        for photo, other in ((match.first, match.second), (match.second, match.first)):
            here, there = members[int(photo)][0], members[int(other)][1]
            for copy in here if there else ():
                best.setdefault(copy, match._replace(first=copy, second=there[0]))
    return [best[photo] for photo in sorted(best)]


def match_equal(photo: int, others: list[int], facts: Facts) -> Match:
    """Match a photo with one of equal pixels.

    Args:
        photo: the photo.
        others: photos of equal bytes or pixels, at least one.
        facts: (N,) FACTS.

    Returns:
        The match, with the first of equal bytes where there is one.
    """
    same = [i for i in others if (facts["digest"][i] == facts["digest"][photo]).all()]
    return Match(photo, same[0], "bytes") if same else Match(photo, others[0], "pixels")


def describe(match: Match) -> str:
    """Describe why two photos are the same, in words.

    Args:
        match: the photos.
    """
    if match.kind != "near":
        return "the same bytes" if match.kind == "bytes" else "the same pixels in another file"
    what = ["mirrored"] * match.mirrored
    what += [f"a crop of {match.scale:.0%}"] * (match.scale < 0.97)
    kind = " and ".join(what) or "the same view, encoded or lit differently"
    return f"{kind}: largest difference {match.difference:.3f}, correlation {match.correlation:.3f}"
