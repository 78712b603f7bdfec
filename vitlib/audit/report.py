"""Report of an audit, as data.

Photos are named by their files; every list is ranked, the most urgent first.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitlib.evaluate.report import to_json

FORMAT, VERSION = "vitlib-audit", 1


@dataclass(frozen=True)
class DuplicateRow:
    """A photo of a group of duplicates.

    Attributes:
        group: number of the group, from 1.
        filename: the photo.
        split: its part.
        label: its labels, joined by "; ".
        kind: "kept" for the photo of the group to keep, else "bytes", "pixels" or "near".
        same_as: the photo that it equals; "" of the kept one.
        difference: largest difference in a cell, in units of the variance of brightness.
        cosine: of the two embeddings.
        conflict: True if the group has photos of other labels.
        reason: a sentence.
    """

    group: int
    filename: str
    split: str
    label: str
    kind: str
    same_as: str
    difference: float
    cosine: float
    conflict: bool
    reason: str


@dataclass(frozen=True)
class LeakRow:
    """A photo that is in two splits.

    Attributes:
        filename: the photo of the first split.
        split: its part.
        label: its labels.
        other: the same photo in the other split.
        other_split: its part.
        other_label: its labels.
        kind: "bytes", "pixels" or "near".
        difference: largest difference in a cell.
        cosine: of the two embeddings.
        reason: a sentence.
    """

    filename: str
    split: str
    label: str
    other: str
    other_split: str
    other_label: str
    kind: str
    difference: float
    cosine: float
    reason: str


@dataclass(frozen=True)
class SuspectRow:
    """A label that is improbable.

    Attributes:
        rank: from 1.
        filename: the photo.
        label: the label that is given; with several labels the class in question.
        suggested: the label that is more probable; with several labels "absent" or "present".
        probability: of the given label, by regression on photos of other folds.
        suggested_probability: of the suggested one.
        neighbour_share: weighted share of the nearest photos that have the given label.
        margin: -1..1, low where the label is improbable.
        confident: True off the diagonal of the confident joint, or where most duplicates of the
            photo have another label.
        reason: a sentence.
    """

    rank: int
    filename: str
    label: str
    suggested: str
    probability: float
    suggested_probability: float
    neighbour_share: float
    margin: float
    confident: bool
    reason: str


@dataclass(frozen=True)
class OutlierRow:
    """A photo unlike the rest.

    Attributes:
        rank: from 1.
        filename: the photo.
        label: its labels.
        scope: "class" where it is unlike its class, "set" where it is unlike all photos.
        score: modified z-score of its distance.
        distance: mean cosine distance to the nearest photos.
        reason: a sentence.
    """

    rank: int
    filename: str
    label: str
    scope: str
    score: float
    distance: float
    reason: str


@dataclass(frozen=True)
class QualityRow:
    """A photo of poor or odd quality.

    Attributes:
        filename: the photo.
        split: its part.
        issue: kind of problem.
        value: what was measured.
        reason: a sentence.
    """

    filename: str
    split: str
    issue: str
    value: float
    reason: str


@dataclass(frozen=True)
class NextRow:
    """A photo to label next.

    Attributes:
        rank: from 1.
        filename: the photo.
        label: its labels, where it has any.
        value: its typicality, or the distance of the photo farthest from those chosen so far.
        reason: a sentence.
    """

    rank: int
    filename: str
    label: str
    value: float
    reason: str


@dataclass(frozen=True)
class AuditReport:
    """Result of an audit; `as_dict` is audit.json, and the output of `--json`.

    Attributes:
        folder: folder of the report's files.
        about: data, model, settings, versions, date, seconds.
        counts: number of each finding.
        duplicates: photos of groups of duplicates, by group.
        leakage: photos of the data that are in another split too.
        label_suspects: improbable labels.
        outliers: photos unlike the rest.
        quality: photos of poor or odd quality.
        label_next: photos to label next.
        classes: by class: photos, confident threshold, suspects.
        thresholds: each number that decides, with what it was chosen by.
        notes: sentences about parts that are left out, and why.
        failed: (file, error) of photos that cannot be read.
        label_accuracy: share of labels that the features predict out of fold; NaN without labels.
    """

    folder: Path
    about: dict[str, Any]
    counts: dict[str, int]
    duplicates: tuple[DuplicateRow, ...] = ()
    leakage: tuple[LeakRow, ...] = ()
    label_suspects: tuple[SuspectRow, ...] = ()
    outliers: tuple[OutlierRow, ...] = ()
    quality: tuple[QualityRow, ...] = ()
    label_next: tuple[NextRow, ...] = ()
    classes: tuple[dict[str, Any], ...] = ()
    thresholds: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    label_accuracy: float = float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Convert to types that JSON has.

        Returns:
            Every field; None for NaN.
        """
        fields: dict[str, Any] = {
            "format": FORMAT,
            "format_version": VERSION,
            "complete": True,
            **self.about,
            "counts": self.counts,
            "label_accuracy": self.label_accuracy,
            "thresholds": self.thresholds,
            "notes": list(self.notes),
            "classes": list(self.classes),
            "failed": [{"file": file, "error": error} for file, error in self.failed],
        }
        for name in LISTS:
            fields[name] = [asdict(row) for row in getattr(self, name)]
        converted = to_json(fields)
        assert isinstance(converted, dict)
        return converted


# Fields of the report that are lists, and files of their own.
LISTS = ("duplicates", "leakage", "label_suspects", "outliers", "quality", "label_next")


def count_findings(report: AuditReport) -> dict[str, int]:
    """Count the findings of each kind.

    Args:
        report: the report.

    Returns:
        The counts by name.
    """
    copies = [row for row in report.duplicates if row.kind != "kept"]
    return {
        "unreadable": len(report.failed),
        "duplicate_groups": len(report.duplicates) - len(copies),
        "exact_duplicates": sum(row.kind != "near" for row in copies),
        "near_duplicates": sum(row.kind == "near" for row in copies),
        "conflicting_groups": sum(row.conflict and row.kind == "kept" for row in report.duplicates),
        "leaked": len(report.leakage),
        "label_suspects": sum(row.confident for row in report.label_suspects),
        "outliers": len(report.outliers),
        "quality": sum(row.issue != "unreadable" for row in report.quality),
        "label_next": len(report.label_next),
    }
