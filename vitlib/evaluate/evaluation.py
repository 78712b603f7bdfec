"""`evaluate`: a Predictor and labelled photos -> a report, as data and as a folder."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from vitlib.data import LabelledPhotos
from vitlib.data.rows import normalize_label
from vitlib.errors import (
    ConfigError,
    DataError,
    ImageError,
    NotFiniteError,
)
from vitlib.evaluate.files import write_report
from vitlib.evaluate.folder import check_folder
from vitlib.evaluate.measurement import describe_run, measure, measure_regression
from vitlib.evaluate.overlap import describe_overlap
from vitlib.evaluate.report import Predictions, Report
from vitlib.evaluate.tuning import fit
from vitlib.metrics import import_sklearn_metrics
from vitlib.plots.draw import new_figure
from vitlib.predict.calibration import Calibration
from vitlib.predict.predictor import Predictor
from vitlib.scores import check_choice
from vitlib.source.locate import DEMO, resolve_source
from vitlib.system.atomic import expand_home, refuse_input
from vitlib.system.torch_state import isolate_torch_settings

OnBadImage = Literal["fail", "skip"]


class ScoredPhotos(NamedTuple):
    """Scores of the photos that can be read, and the errors of the others.

    Attributes:
        photos: the photos that can be read.
        scores: (N, C) of these photos.
        errors: error of each other photo, by its index in the whole set.
        seconds: time that decoding and the model took.
    """

    photos: LabelledPhotos
    scores: npt.NDArray[np.float32]
    errors: dict[int, str]
    seconds: float


@isolate_torch_settings()
def evaluate(
    predictor: Predictor,
    photos: LabelledPhotos,
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = "",
    tune: LabelledPhotos | None = None,
    calibration: Calibration | None = None,
    threshold: float | None = None,
    positive: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
    on_bad_image: OnBadImage = "fail",
    progress: bool = False,
) -> Report:
    """Measure a model on labelled photos: every metric with intervals, tables and figures.

    The report is returned and written to the folder `out`, of which report.html holds everything.
    A regression is measured by the errors of its numbers (metrics.regression); arguments that are
    about classes are refused for it.

    Args:
        predictor: the model, its preprocessing and labels.
        photos: the photos to measure on.
        out: a new or empty folder, or one with an earlier report. An earlier report is replaced
            once the new one is complete.
        model: where the predictor was loaded from; its name in the report.
        tune: photos that neither train nor judge the model. A temperature and, with several labels
            a photo, a threshold for each class are fitted on them, used, and stored as
            calibration.json in `out` and beside the files of `model` where that is local.
        calibration: replaces the predictor's own calibration, as Calibration.read gives it.
        threshold: with several labels a photo, replaces the thresholds of the calibration; 0..1.
        positive: name of a class to measure against the rest, as
            {f1,precision,recall,average_precision}_score_binary and AUC_binary.
        bootstrap: resamples for the intervals; 0 computes no intervals.
        seed: of the resamples.
        batch_size: photos per forward pass.
        on_bad_image: "fail" raises for a photo that cannot be read; "skip" counts and names it, and
            gives it a row of predictions.csv.
        progress: show a progress bar on stderr.

    Returns:
        The report.

    Raises:
        ConfigError: before the model runs, for arguments that do not fit it or a missing extra
            "eval" or "plot".
        DataError: before the model runs, for labels that are not classes of the model, photos of
            another task, or photos in both sets; later where no photo can be read.
        SourceError: before the model runs, where `out` cannot be used.
        ImageError: for a photo that cannot be read, with "fail".
    """
    target = Path(out)
    inputs = [photos.source] if tune is None else [photos.source, tune.source]
    refuse_input(target, inputs, inside=True)
    check_choice(
        predictor.task, tune=tune, calibration=calibration, threshold=threshold, positive=positive
    )
    photos, tune = _prepare_sets(predictor, photos, tune)
    if calibration is None and tune is None:
        calibration = predictor.calibration
    index = _check(predictor, tune, calibration, threshold, positive, bootstrap, on_bad_image)
    check_folder(target)
    # Missing extras are found now, and not after an hour of inference.
    import_sklearn_metrics()
    new_figure(1, 1)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    failed_tuning: tuple[tuple[str, str], ...] = ()
    if tune is not None:
        scored = _score(predictor, tune, batch_size, on_bad_image, progress)
        targets = scored.photos.targets()
        task = predictor.labels, predictor.multi_label
        calibration = fit(targets, scored.scores, *task, source=tune.source, date=date)
        failed_tuning = _failures(tune, scored.errors)
    scored = _score(predictor, photos, batch_size, on_bad_image, progress)
    about = describe_run(predictor, os.fspath(model), photos, len(scored.photos), date)
    about |= {"seconds": round(scored.seconds, 3), "batch_size": batch_size}
    predictions = _predict(scored, calibration, threshold)
    if photos.regression:
        report = measure_regression(predictions, target, about, bootstrap=bootstrap, seed=seed)
    else:
        report = measure(
            predictions, target, calibration, about, positive=index, bootstrap=bootstrap, seed=seed
        )
    failed = _failures(photos, scored.errors)
    notes = (*report.notes, *describe_overlap(model, photos, tune))
    report = replace(report, failed=failed, failed_tuning=failed_tuning, notes=notes)
    if tune is not None and calibration is not None and os.fspath(model):
        path = expand_home(resolve_source(model))
        if path.exists() and (path != DEMO or isinstance(model, os.PathLike)):
            report = replace(report, stored=calibration.store(path))
    write_report(report, photos, predictions, scored.errors, predictor.image_processor)
    return report


def _prepare_sets(
    predictor: Predictor, photos: LabelledPhotos, tune: LabelledPhotos | None
) -> tuple[LabelledPhotos, LabelledPhotos | None]:
    """Convert both sets to the classes of the model.

    Raises ConfigError without a head, DataError for sets that do not fit the model or each other.
    """
    if not predictor.model.num_classes:
        raise ConfigError("this model has no head to evaluate: fine-tune it first")
    prepared = []
    for part in (photos, tune):
        if part is None:
            continue
        if part.regression != (predictor.task == "regression"):
            kinds = ("labels", "numbers")
            raise DataError(
                f"{part.source} was read with {kinds[part.regression]}, the model gives "
                f"{kinds[not part.regression]} ({predictor.task}): read it with "
                f"regression={not part.regression}"
            )
        if part.multi_label != predictor.multi_label:
            kinds = ("one label a photo", "several labels a photo")
            raise DataError(
                f"{part.source} was read with {kinds[part.multi_label]}, the model gives scores "
                f"for {kinds[predictor.multi_label]} (problem_type "
                f"{predictor.model.config.problem_type}): read it with "
                f"multi_label={predictor.multi_label}, or change the model's problem_type"
            )
        if not len(part):
            raise DataError(f"{part.source}: no photo to evaluate on")
        prepared.append(part.with_labels(predictor.labels, ids=True))
    if tune is not None:
        paths = {os.path.realpath(photo.path) for photo in photos.photos}
        shared = [p.path for p in tune.photos if os.path.realpath(p.path) in paths]
        if shared:
            raise DataError(
                f"{len(shared)} photos of the tuning set are also in the evaluation set, such as "
                f"{shared[0]}: expected two sets apart, or the numbers would flatter"
            )
    return prepared[0], prepared[1] if tune is not None else None


def _check(
    predictor: Predictor,
    tune: LabelledPhotos | None,
    calibration: Calibration | None,
    threshold: float | None,
    positive: str | None,
    bootstrap: int,
    on_bad_image: OnBadImage,
) -> int | None:
    """Return the number of the class `positive`. Raises ConfigError for arguments out of range."""
    if on_bad_image not in get_args(OnBadImage):
        raise ConfigError(f"on_bad_image={on_bad_image!r}: expected 'fail' or 'skip'")
    if bootstrap < 0:
        raise ConfigError(f"bootstrap={bootstrap}: expected 0 (no intervals) or more resamples")
    if tune is not None and calibration is not None:
        raise ConfigError("tune= makes a calibration: leave calibration= out")
    if calibration is not None:
        calibration.check(predictor.labels, predictor.task)
    if threshold is not None and not predictor.multi_label:
        raise ConfigError("threshold= is for models that give several labels a photo")
    if positive is None:
        return None
    names = [normalize_label(label) for label in predictor.labels]
    if names.count(normalize_label(positive)) != 1:
        raise ConfigError(f"positive={positive!r}: expected the name of one class of the model")
    return names.index(normalize_label(positive))


def _score(
    predictor: Predictor,
    photos: LabelledPhotos,
    batch_size: int,
    on_bad_image: OnBadImage,
    progress: bool,
) -> ScoredPhotos:
    """Run the model on a set. Raises DataError where no photo can be read."""
    errors: dict[int, str] = {}

    def note(index: int, error: ImageError) -> None:
        # A score that is not finite is a fault of the model, which no report may leave out.
        if isinstance(error, NotFiniteError):
            raise ConfigError(f"{photos.photos[index].path}: {error}") from error
        errors[index] = str(error)

    predictor.fast()  # optimized before the clock starts
    started = time.perf_counter()
    scores = predictor.probabilities(
        [photo.path for photo in photos.photos],
        batch_size=batch_size,
        on_error="raise" if on_bad_image == "fail" else note,
        progress=progress,
        calibrated=False,
    )
    seconds = time.perf_counter() - started
    read = [index for index in range(len(photos)) if index not in errors]
    if not read:
        raise DataError(
            f"{photos.source}: none of {len(photos)} photos can be read, the first: {errors[0]}"
        )
    return ScoredPhotos(photos.subset(read), scores[read], errors, seconds)


def _predict(
    scored: ScoredPhotos, calibration: Calibration | None, threshold: float | None
) -> Predictions:
    """Apply the calibration and choose the thresholds: the argument's, the calibration's or 0.5."""
    scores = scored.scores if calibration is None else calibration.apply(scored.scores)
    tuned = calibration.thresholds if calibration is not None else None
    limits = tuned if threshold is None and tuned is not None else threshold
    num_classes = scores.shape[1]
    per_class = np.broadcast_to(
        np.asarray(0.5 if limits is None else limits, np.float64), num_classes
    )
    return Predictions(scored.photos, scored.photos.targets(), scores, scored.scores, per_class)


def _failures(photos: LabelledPhotos, errors: dict[int, str]) -> tuple[tuple[str, str], ...]:
    """List (file, error) of the photos that cannot be decoded and those left out of the set."""
    decoding = [(str(photos.photos[index].path), error) for index, error in sorted(errors.items())]
    return (*decoding, *photos.left_out)
