"""Results of a probe as data: rows of the table, and the report that holds them.

Shapes: C classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitlib.evaluate.folder import ReportKind

PAGE, TABLE = "report.html", "probe.csv"
PICTURES = ("layers.png", "few_shot.png", "classes.png")
KIND = ReportKind("vitlib-probe", 1, "probe.json", (PAGE, TABLE, *PICTURES), "probe")


@dataclass(frozen=True)
class ProbeRow:
    """Result of a method on one model, layer and pool.

    Attributes:
        model: Name of the model.
        layer: Number of blocks that the tokens pass, 1..depth.
        pool: Pooling of the tokens.
        method: "knn", "logistic" or "linear".
        value: Primary metric of the held-out photos, 0..1.
        interval: 95 % interval of it, (low, high).
        spread: Standard deviation of the metric over the folds; None with test photos.
        metrics: Every metric of the held-out photos, by name.
        choices: What each round chose inside its training part: {"C": ...}, {"k": ...} or
            {"rate": ...}.
        inner: Primary metric inside the training photos, by which layer and pool are chosen.
        by_choice: Primary metric of the held-out photos by k or rate, had it been given.
        milliseconds: Time of a photo through the model, reading included; None where all vectors
            came from a store.
    """

    model: str
    layer: int
    pool: str
    method: str
    value: float
    interval: tuple[float, float]
    spread: float | None
    metrics: dict[str, float]
    choices: tuple[dict[str, float], ...]
    inner: float
    by_choice: dict[str, float]
    milliseconds: float | None


@dataclass(frozen=True)
class FewShotRow:
    """Result of a method that is fitted to a few photos of each class.

    Attributes:
        model: Name of the model.
        layer: As in ProbeRow.
        pool: As in ProbeRow.
        method: "knn" or "logistic".
        per_class: Photos of a class.
        value: Mean of the primary metric over the draws, 0..1.
        spread: Standard deviation over the draws.
        tries: The metric of each draw.
    """

    model: str
    layer: int
    pool: str
    method: str
    per_class: int
    value: float
    spread: float
    tries: tuple[float, ...]


@dataclass(frozen=True)
class SelectedRow:
    """Logistic regression whose layer and pool, too, are chosen inside the training part.

    Attributes:
        model: Name of the model; "" where the model is chosen as well.
        value: Primary metric of the held-out photos, 0..1.
        interval: 95 % interval of it, (low, high).
        choices: (model, layer, pool) of each round.
    """

    model: str
    value: float
    interval: tuple[float, float]
    choices: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class BestProbe:
    """The probe that is saved: logistic regression fitted to all training photos.

    Attributes:
        model: Name of the model.
        layer: As in ProbeRow.
        pool: As in ProbeRow.
        c: Inverse strength of the penalty.
        inner: Primary metric of its settings on photos inside the training part.
        folder: Folder of the checkpoint; None where it is not saved.
        layout: "hf", or "vitlib" where Hugging Face's files cannot hold it; "" without a folder.
        note: Why it is not saved, or not as Hugging Face's files; "".
    """

    model: str
    layer: int
    pool: str
    c: float
    inner: float
    folder: Path | None = None
    layout: str = ""
    note: str = ""


@dataclass(frozen=True)
class ProbeReport:
    """Report of `vitlib probe`.

    Attributes:
        folder: Folder of the report.
        about: Data, protocol, models, settings and versions.
        labels: (C,) names of the classes.
        multi_label: True if photos may have several labels.
        primary: Name of the metric that chooses.
        rows: The table.
        few_shot: Results of few photos.
        selected: Layer and pool chosen inside the training part, for each model, and for all.
        best: The probe that is saved; None without logistic regression.
        notes: Sentences on what a reader must know.
        failed: (file, error) of photos that could not be used.
    """

    folder: Path
    about: dict[str, Any]
    labels: tuple[str, ...]
    multi_label: bool
    primary: str
    rows: tuple[ProbeRow, ...]
    few_shot: tuple[FewShotRow, ...]
    selected: tuple[SelectedRow, ...]
    best: BestProbe | None
    notes: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON holds it.

        Returns:
            The content of probe.json.
        """
        value = asdict(self)
        del value["folder"]
        if self.best is not None and self.best.folder is not None:
            value["best"]["folder"] = str(self.best.folder)
        return {
            "format": KIND.format,
            "format_version": KIND.version,
            "complete": True,
            **value,
        }
