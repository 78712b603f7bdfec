"""Findings of an audit as ranked rows: who is meant, and why.

Shapes: N photos, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.audit.duplicates import Duplicates, Match, describe, match_across, match_equal
from vitlib.audit.grouping import list_groups
from vitlib.audit.inspection import Facts
from vitlib.audit.labels import Suspects
from vitlib.audit.quality import Problem
from vitlib.audit.rarity import FLAGGED, Rarity
from vitlib.audit.report import (
    DuplicateRow,
    LeakRow,
    NextRow,
    OutlierRow,
    QualityRow,
    SuspectRow,
)

SHARE = 0.1  # of the photos, whose labels are listed however probable they are
Ints = npt.NDArray[np.int64]


class Names(NamedTuple):
    """Names of photos.

    Attributes:
        files: (N,) paths.
        splits: (N,) numbers of their parts.
        split_names: name of each part.
        labels: (N,) labels; None without.
    """

    files: Sequence[str]
    splits: Ints
    split_names: Sequence[str]
    labels: Sequence[tuple[str, ...] | None]

    def label(self, photo: int) -> str:
        """Join the labels of a photo; "" without any.

        Args:
            photo: row of the photo.
        """
        return "; ".join(self.labels[photo] or ())

    def split(self, photo: int) -> str:
        """Return the name of a photo's part.

        Args:
            photo: row of the photo.
        """
        return self.split_names[int(self.splits[photo])]


def list_duplicates(duplicates: Duplicates, names: Names, facts: Facts) -> list[DuplicateRow]:
    """List the photos of each group of duplicates within the audited parts and across.

    Args:
        duplicates: of all photos.
        names: of all photos.
        facts: (N,) FACTS.

    Returns:
        The rows, larger groups first; of each group the photo to keep first: the one with the most
        pixels, of equal ones the first.
    """
    near = {pair: match for match in duplicates.matches for pair in _both(match)}
    rows = []
    for number, group in enumerate(list_groups(duplicates.centres), 1):
        size = {i: int(facts["width"][i]) * int(facts["height"][i]) for i in group}
        keeper = max(group, key=lambda i: (size[i], -i))
        labels = {frozenset(names.labels[i] or ()) for i in group if names.labels[i] is not None}
        conflict = len(labels) > 1
        for photo in [keeper, *(i for i in group if i != keeper)]:
            match = None if photo == keeper else _match(photo, keeper, duplicates, near, facts)
            reason = "the largest of the group" if match is None else describe(match)
            if conflict:
                reason += "; photos of this group have different labels"
            rows.append(
                DuplicateRow(
                    number,
                    names.files[photo],
                    names.split(photo),
                    names.label(photo),
                    "kept" if match is None else match.kind,
                    "" if match is None else names.files[match.second],
                    0.0 if match is None else match.difference,
                    1.0 if match is None else match.cosine,
                    conflict,
                    reason,
                )
            )
    return rows


def _both(match: Match) -> list[tuple[int, int]]:
    """List a match in both directions."""
    return [(match.first, match.second), (match.second, match.first)]


def _match(
    photo: int,
    keeper: int,
    duplicates: Duplicates,
    near: dict[tuple[int, int], Match],
    facts: Facts,
) -> Match:
    """Find why a photo is in the group of another: by itself, or by the group's centre."""
    equal, centre = duplicates.equal, int(duplicates.centres[photo])
    if equal[photo] == equal[keeper]:
        return match_equal(photo, [keeper], facts)
    for other in (keeper, centre):
        match = near.get((int(equal[photo]), int(equal[other])))
        if match is not None:
            return match._replace(first=photo, second=other)
    # The photo has the pixels of the centre, of which the keeper one is a near duplicate.
    match = near[int(equal[centre]), int(equal[keeper])]
    return match._replace(first=photo, second=keeper)


def list_leakage(duplicates: Duplicates, names: Names, facts: Facts) -> list[LeakRow]:
    """List the photos of the first part that are in the other part too.

    Args:
        duplicates: of all photos.
        names: of all photos, of two parts.
        facts: (N,) FACTS.

    Returns:
        The rows; the same bytes first, then the same pixels, then the most alike.
    """
    matches = match_across(duplicates, names.splits == 1, facts)
    order = ("bytes", "pixels", "near")
    rows = []
    for match in sorted(matches, key=lambda m: (order.index(m.kind), m.difference, m.first)):
        photo, other = match.first, match.second
        reason = describe(match)
        if names.label(photo) and names.label(other) and names.label(photo) != names.label(other):
            reason += "; with another label there"
        rows.append(
            LeakRow(
                names.files[photo],
                names.split(photo),
                names.label(photo),
                names.files[other],
                names.split(other),
                names.label(other),
                match.kind,
                match.difference,
                match.cosine,
                reason,
            )
        )
    return rows


def list_suspects(
    suspects: Suspects, targets: Ints, classes: Sequence[str], files: Sequence[str]
) -> list[SuspectRow]:
    """List improbable labels of photos with one label each.

    Args:
        suspects: the judgement.
        targets: (N,) classes.
        classes: names of the classes.
        files: of the judged photos.

    Returns:
        The rows: confident suspects, labels less probable than another, and in any case the tenth
        of the photos with the lowest margins; by margin.
    """
    order = np.argsort(suspects.margin, kind="stable")
    least = int(np.ceil(SHARE * len(order)))
    rows: list[SuspectRow] = []
    for position, photo in enumerate(order.tolist()):
        if not (position < least or suspects.confident[photo] or suspects.margin[photo] < 0):
            continue
        label, other = int(targets[photo]), int(suspects.suggested[photo])
        p, q = suspects.probability[photo, label], suspects.probability[photo, other]
        share = suspects.neighbour_share[photo, label]
        reason = (
            f"{classes[other]} {q:.2f} against {classes[label]} {p:.2f}; {share:.0%} of the "
            "neighbours have the label"
        )
        numbers = (p, q, share, suspects.margin[photo])
        confident = bool(suspects.confident[photo])
        names = files[photo], classes[label], classes[other]
        rows.append(_suspect_row(len(rows) + 1, names, numbers, confident, reason))
    return rows


def list_several_suspects(
    suspects: Suspects,
    targets: npt.NDArray[np.float32],
    classes: Sequence[str],
    judged: npt.NDArray[np.bool_],
    files: Sequence[str],
) -> list[SuspectRow]:
    """List improbable labels of photos with several labels each, a row a photo and class.

    Args:
        suspects: the judgement.
        targets: (N, C) of 1, 0 and NaN.
        classes: names of the classes.
        judged: (C,) False for classes that cannot be judged.
        files: of the judged photos.

    Returns:
        The rows, by margin.
    """
    margin = np.where(judged, suspects.margin, np.nan)
    photos, columns = np.nonzero(~np.isnan(margin))
    order = np.argsort(margin[photos, columns], kind="stable")
    least = int(np.ceil(SHARE * len(files)))
    rows: list[SuspectRow] = []
    for position, index in enumerate(order.tolist()):
        photo, column = int(photos[index]), int(columns[index])
        confident = bool(suspects.confident[photo, column])
        if not (position < least or confident or margin[photo, column] < 0):
            continue
        present = targets[photo, column] == 1
        p = suspects.probability[photo, column]
        share = suspects.neighbour_share[photo, column]
        state, other = ("labelled", "absent") if present else ("not labelled", "present")
        reason = (
            f"{state} {classes[column]}, whose probability is {p:.2f}; {share:.0%} of the "
            "neighbours have it"
        )
        own, opposite = (p, 1 - p) if present else (1 - p, p)
        support = share if present else 1 - share
        numbers = (own, opposite, support, margin[photo, column])
        names = files[photo], classes[column], other
        rows.append(_suspect_row(len(rows) + 1, names, numbers, confident, reason))
    return rows


def _suspect_row(
    rank: int,
    names: tuple[str, str, str],
    numbers: tuple[float, float, float, float],
    confident: bool,
    reason: str,
) -> SuspectRow:
    """Make a row of a file, its label and the suggested one, with rounded numbers."""
    probability, suggested, share, margin = (round(float(number), 4) for number in numbers)
    return SuspectRow(rank, *names, probability, suggested, share, margin, confident, reason)


def list_outliers(
    overall: Rarity, within: Rarity | None, files: Sequence[str], labels: Sequence[str]
) -> list[OutlierRow]:
    """List photos that are far from their neighbours.

    Args:
        overall: distances to photos of any class.
        within: distances to photos of the same class; None without classes.
        files: of the photos.
        labels: of the photos.

    Returns:
        The rows with a score above 3.5, the highest first.
    """
    scopes = [("set", overall), *([("class", within)] if within is not None else [])]
    best: dict[int, tuple[float, str, float]] = {}
    for scope, rarity in scopes:
        for photo in np.flatnonzero(rarity.score > FLAGGED).tolist():
            entry = (float(rarity.score[photo]), scope, float(rarity.distance[photo]))
            best[photo] = max(best.get(photo, entry), entry)
    rows = []
    ranked = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))
    for rank, (photo, (score, scope, distance)) in enumerate(ranked, 1):
        among = f"photos of {labels[photo]}" if scope == "class" else "photos"
        reason = (
            f"mean distance {distance:.3f} to the nearest {among}, {score:.1f} deviations above "
            "the median"
        )
        rows.append(
            OutlierRow(
                rank, files[photo], labels[photo], scope, round(score, 2), round(distance, 4),
                reason,
            )
        )  # fmt: skip
    return rows


def list_quality(
    problems: Sequence[Problem], names: Names, failed: Sequence[tuple[str, str, str]]
) -> list[QualityRow]:
    """List photos of poor quality, those that cannot be read first.

    Args:
        problems: of the photos that can be read.
        names: of these photos.
        failed: (file, split, error) of the others.
    """
    rows = [
        QualityRow(file, split, "unreadable", float("nan"), error) for file, split, error in failed
    ]
    return rows + [
        QualityRow(names.files[p.photo], names.split(p.photo), p.issue, float(p.value), p.reason)
        for p in problems
    ]


def list_next(
    photos: Ints, values: npt.NDArray[np.float64], method: str, names: Names
) -> list[NextRow]:
    """List photos to label next, in order.

    Args:
        photos: as rarity.rank_next() gives them.
        values: the same.
        method: "typicality" or "coverage".
        names: of the photos.
    """
    reasons = {
        "typicality": "the most typical photo of its cluster: typicality {:.2f}",
        "coverage": "the farthest from those before; then no photo is farther than {:.2f}",
    }
    return [
        NextRow(
            rank, names.files[photo], names.label(photo), round(float(value), 4),
            reasons[method].format(value),
        )
        for rank, (photo, value) in enumerate(zip(photos.tolist(), values, strict=True), 1)
    ]  # fmt: skip
