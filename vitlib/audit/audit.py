"""`run`: a Predictor and photos -> a report of what is wrong with the photos.

Shapes: N photos, D features.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from vitlib.audit.duplicates import MAX_HASH_PAIRS, Duplicates, find_duplicates
from vitlib.audit.files import AUDIT, FEATURES, begin_report, inspect_and_store, write_report
from vitlib.audit.findings import (
    Names,
    list_duplicates,
    list_leakage,
    list_next,
    list_outliers,
    list_quality,
)
from vitlib.audit.fix_list import write_fix_list
from vitlib.audit.inspection import GreyCopies, Inspection, is_flat
from vitlib.audit.judgement import Judgement, judge_labels
from vitlib.audit.quality import find_problems
from vitlib.audit.rarity import measure_rarity, rank_next
from vitlib.audit.report import AuditReport, count_findings
from vitlib.audit.source import AGAINST, AuditSet, read_set
from vitlib.audit.thresholds import describe_thresholds
from vitlib.data import LabelledPhotos
from vitlib.errors import ConfigError, DataError, check_int
from vitlib.evaluate.folder import check_folder
from vitlib.evaluate.measurement import describe_run
from vitlib.features import FeatureStore, PhotoFeatures, extract, open_store, select_features
from vitlib.metrics import import_sklearn_metrics
from vitlib.plots.draw import new_figure
from vitlib.predict.optimized_model import current_config
from vitlib.predict.predictor import Predictor
from vitlib.system.atomic import check_writable, refuse_input
from vitlib.system.torch_state import isolate_torch_settings

Method = Literal["typicality", "coverage"]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class _Readable(NamedTuple):
    """Photos that can be read.

    Attributes:
        rows: (n,) their numbers among all photos, ascending.
        audited: (m,) positions in `rows` of photos of the audited parts, which come first.
        vectors: (n, D) embeddings.
        facts: (n,) FACTS.
        names: their names.
    """

    rows: Ints
    audited: Ints
    vectors: Floats
    facts: npt.NDArray[Any]
    names: Names


@isolate_torch_settings()
def run(
    predictor: Predictor,
    data: str | os.PathLike[str] | AuditSet,
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = "",
    against: str | os.PathLike[str] | None = None,
    multi_label: bool = False,
    unlabelled: bool = False,
    store: FeatureStore | None = None,
    fix_list: str | os.PathLike[str] | None = None,
    next_count: int = 20,
    next_by: Method = "typicality",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> AuditReport:
    """Audit photos: duplicates, leakage, doubtful labels, odd and damaged photos, what to label.

    Nothing is deleted or moved. The report is returned and written to the folder `out`, of which
    report.html holds everything. A run that is killed goes on where the features are stored.

    Args:
        predictor: the model, whose embeddings are compared, and its preprocessing.
        data: a labelled set, a folder with train/ and val/, or photos without labels; or the result
            of read_set(), which takes `against`, `multi_label` and `unlabelled` then.
        out: a new or empty folder outside of `data`, or one with an earlier audit.
        model: where the predictor was loaded from; its name in the report.
        against: photos that should not be in `data`, such as the test set.
        multi_label: True if a photo may have several labels.
        unlabelled: True reads any folder as photos without labels.
        store: store of features; None stores them in `out`/features.
        fix_list: a CSV to write of photos to leave out, which finetune --exclude reads.
        next_count: number of photos to label next.
        next_by: "typicality" or "coverage".
        batch_size: photos per forward pass.
        seed: of folds and clusters.
        progress: show progress bars on stderr.

    Returns:
        The report. Photos that cannot be read are in `failed`.

    Raises:
        ConfigError: before the model runs, for arguments out of range or a missing extra.
        DataError: before the model runs, for sets that cannot be used; later where no photo can be
            read.
        SourceError: before the model runs, where `out` or `fix_list` cannot be written.
    """
    started = time.perf_counter()
    target = Path(out)
    if next_by not in get_args(Method):
        raise ConfigError(f"next_by={next_by!r}: expected 'typicality' or 'coverage'")
    check_int("next_count", next_count, at_least=0)
    photos = data
    if not isinstance(photos, AuditSet):
        check_output(target, [photos] if against is None else [photos, against], fix_list)
        photos = read_set(photos, against, multi_label=multi_label, unlabelled=unlabelled)
    elif against is not None or multi_label or unlabelled:
        raise ConfigError("data was read already: give against= and its form to read_set()")
    check_output(target, photos.inputs, fix_list)
    feature = select_features(current_config(predictor.model))[0]
    begin_report(target)
    features = extract(
        predictor,
        photos.photos,
        [feature],
        store=open_store(None, target / FEATURES) if store is None else store,
        batch_size=batch_size,
        progress=progress,
    )
    with inspect_and_store(photos.photos, features.digests, target, progress) as inspection:
        vectors = features.vectors[feature]
        failed = _list_failed(photos, features, inspection)
        ready = _select_readable(photos, vectors, inspection)
        duplicates = find_duplicates(
            ready.facts, GreyCopies(inspection.grey, ready.rows), ready.vectors
        )
    report = _find(photos, ready, duplicates, target, failed, next_count, next_by, seed)
    about = describe_run(
        predictor,
        os.fspath(model),
        LabelledPhotos((), (), False, photos.inputs[0]),
        0,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    about["data"] = _describe_data(photos, ready)
    about["settings"] = {"next": next_count, "next_by": next_by, "seed": seed}
    about["feature"] = str(feature)
    about["seconds"] = round(time.perf_counter() - started, 3)
    report = replace(report, about=about)
    write_report(report, predictor.image_processor)
    if fix_list is not None:
        write_fix_list(report, Path(fix_list))
    return report


def check_output(
    out: Path,
    inputs: Sequence[str | os.PathLike[str]],
    fix_list: str | os.PathLike[str] | None = None,
) -> None:
    """Check what an audit writes and the extras it needs, before any work.

    Args:
        out: folder of the report.
        inputs: what is read.
        fix_list: the file to write, or None.

    Raises:
        SourceError: `out` or `fix_list` cannot be written, or is what is read.
        ConfigError: scikit-learn or matplotlib is not installed.
    """
    refuse_input(out, inputs, inside=True)
    if fix_list is not None:
        refuse_input(fix_list, inputs)
        check_writable(Path(fix_list))
    check_folder(out, AUDIT)
    # Missing extras are duplicates now, and not after an hour of inference.
    import_sklearn_metrics()
    new_figure(1, 1)


def _list_failed(
    photos: AuditSet, features: PhotoFeatures, inspection: Inspection
) -> list[tuple[str, str, str]]:
    """List (file, split, error) of photos that are not there or cannot be decoded."""
    errors = inspection.errors | features.errors
    paths, splits = photos.photos, photos.splits
    failed = [
        (str(paths[i]), photos.parts[splits[i]].name, error) for i, error in sorted(errors.items())
    ]
    return [
        *failed,
        *((file, part.name, error) for part in photos.parts for file, error in part.left_out),
    ]


def _select_readable(photos: AuditSet, vectors: Floats, inspection: Inspection) -> _Readable:
    """Select the photos that can be read. Raises DataError where there are none."""
    decoded = inspection.facts["digest"].any(axis=1)
    usable = np.asarray(decoded & np.isfinite(vectors).all(axis=1))
    rows = np.flatnonzero(usable)
    if not len(rows):
        source = photos.parts[0].source
        first = next(iter(inspection.errors.values()), "no photo has finite features")
        raise DataError(f"{source}: none of {len(vectors)} photos can be read, the first: {first}")
    paths, labels = photos.photos, photos.labels
    names = Names(
        [str(paths[i].absolute()) for i in rows],
        photos.splits[rows],
        [part.name for part in photos.parts],
        [labels[i] for i in rows],
    )
    audited = np.flatnonzero(rows < photos.audited)
    whole = len(rows) == len(vectors)
    chosen = vectors if whole else vectors[rows]  # a million vectors are not copied
    return _Readable(rows, audited, chosen, inspection.facts[rows], names)


def _find(
    photos: AuditSet,
    ready: _Readable,
    duplicates: Duplicates,
    out: Path,
    failed: list[tuple[str, str, str]],
    next_count: int,
    next_by: Method,
    seed: int,
) -> AuditReport:
    """List all findings."""
    names, facts = ready.names, ready.facts
    audited, vectors = ready.audited, ready.vectors[: len(ready.audited)]
    groups = duplicates.centres[audited]
    judged = photos.join_labelled()
    classes: Ints | None = None
    judgement = Judgement((), (), (f"labels are not judged: {photos.parts[0].reason}",))
    if judged is not None:
        part = judged.subset(ready.rows[audited])
        judgement = judge_labels(part, vectors, groups, seed)
        classes = None if part.multi_label else part.targets()
    flat = is_flat(facts[audited])
    within = None if classes is None else measure_rarity(vectors, groups, classes)
    overall = measure_rarity(vectors, groups)
    outliers = list_outliers(
        overall, within, names.files[: len(audited)], [names.label(i) for i in audited.tolist()]
    )
    useful = np.flatnonzero(~flat)
    chosen, values = rank_next(vectors[useful], groups[useful], next_count, next_by, seed)
    notes = [*judgement.notes, *_notes(photos, duplicates)]
    leakage = list_leakage(duplicates, names, facts) if len(photos.parts) > 1 else []
    report = AuditReport(
        out,
        {},
        {},
        tuple(list_duplicates(duplicates, names, facts)),
        tuple(leakage),
        judgement.rows,
        tuple(outliers),
        tuple(list_quality(find_problems(facts), names, failed)),
        tuple(list_next(useful[chosen], values, next_by, names)),
        judgement.classes,
        describe_thresholds(),
        tuple(notes),
        tuple((file, error) for file, _, error in failed),
    )
    return replace(
        report, counts=count_findings(report), label_accuracy=round(judgement.accuracy, 4)
    )


def _notes(photos: AuditSet, duplicates: Duplicates) -> list[str]:
    """Say what is not looked for, and why."""
    notes = [
        "photos that lie on their side without an EXIF tag are not looked for: no rule that tells "
        "them reliably has been measured"
    ]
    if len(photos.parts) < 2:
        notes.append("leakage is not looked for: there is one set, and no --against")
    for part in photos.parts:
        if part.name == AGAINST and part.reason:
            notes.append(f"{part.source} has no labels: {part.reason}")
    if duplicates.limited:
        notes.append(
            f"hashes propose more than {MAX_HASH_PAIRS} pairs: only the first are compared"
        )
    return notes


def _describe_data(photos: AuditSet, ready: _Readable) -> dict[str, Any]:
    """Describe the parts, and how many photos can be read."""
    judged = photos.join_labelled()
    return {
        "source": photos.parts[0].source,
        "photos": len(photos.photos) + sum(len(part.left_out) for part in photos.parts),
        "readable": len(ready.rows),
        "parts": {part.name: len(part.photos) for part in photos.parts},
        "classes": 0 if judged is None else len(judged.labels),
        "multi_label": judged is not None and judged.multi_label,
    }
