"""evaluate: a Predictor and labelled photos -> a report, as data and as a folder."""

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
from vitlib.data.rows import composed
from vitlib.errors import ConfigError, DataError, ImageError, NotFiniteError
from vitlib.evaluate.files import write
from vitlib.evaluate.folder import check_folder
from vitlib.evaluate.measure import about, measured, measured_numbers
from vitlib.evaluate.report import Answers, Report
from vitlib.evaluate.tuning import fit
from vitlib.metrics import scikit_learn
from vitlib.plots.draw import new_figure
from vitlib.predict.calibration import Calibration
from vitlib.predict.predictor import Predictor
from vitlib.scores import check_choice
from vitlib.source.locate import DEMO, resolve
from vitlib.system.atomic import refuse_input
from vitlib.system.torch_state import own_settings

OnBadImage = Literal["fail", "skip"]


class Scored(NamedTuple):
    """What a model says of a set: of the photos that could be read, and why the others could not
    be."""

    photos: LabelledPhotos
    scores: npt.NDArray[np.float32]  # (N, C)
    errors: dict[int, str]  # index in the whole set -> why
    seconds: float


@own_settings()
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
    """How good a model is on labelled photos: every metric of vitlib.metrics with intervals, tables
    and pictures, as a Report and as files in the folder `out`, of which report.html holds all.

    model: where the predictor was loaded from: its name in the report.
    tune: photos that neither train nor judge the model: a temperature and, with several labels a
        photo, a threshold for each class are tuned on them, used, and stored as calibration.json
        beside the files of `model` where that is a folder or a file, and in `out`.
    calibration: in place of the predictor's own, one as Calibration.read gives it.
    threshold: with several labels a photo, instead of the calibration's, or of 0.5.
    positive: a class to measure against the rest
        ({f1,precision,recall,average_precision}_score_binary, AUC_binary).
    Of a regression the errors of its numbers (metrics.regression); what is of classes is refused.
    bootstrap: draws for the intervals, from `seed`; 0: no intervals.
    on_bad_image: "skip" goes on without a photo that cannot be read: it is counted, named and a row
        of predictions.csv; so is what was left out when the set was read.

    `out` is new, empty, or holds an earlier report, which is replaced once the new one is whole.
    Raises, before the model runs: ConfigError for settings that do not fit it or without the extras
    "eval" and "plot", DataError for labels that are no classes of the model, photos of another task
    or in both sets, SourceError where `out` cannot be used. Later: ImageError for a bad photo with
    "fail", DataError where no photo could be read.
    """
    target = Path(out)
    read = [photos.source] if tune is None else [photos.source, tune.source]
    refuse_input(target, read, inside=True)
    check_choice(
        predictor.task, tune=tune, calibration=calibration, threshold=threshold, positive=positive
    )
    photos, tune = _ready(predictor, photos, tune)
    if calibration is None and tune is None:
        calibration = predictor.calibration
    index = _check(predictor, tune, calibration, threshold, positive, bootstrap, on_bad_image)
    check_folder(target)
    scikit_learn()
    new_figure(1, 1)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    failed_tuning: tuple[tuple[str, str], ...] = ()
    if tune is not None:
        said = _scored(predictor, tune, batch_size, on_bad_image, progress)
        targets = said.photos.targets()
        task = predictor.labels, predictor.multi_label
        calibration = fit(targets, said.scores, *task, source=tune.source, date=date)
        failed_tuning = _failed(tune, said.errors)
    said = _scored(predictor, photos, batch_size, on_bad_image, progress)
    told = about(predictor, os.fspath(model), photos, len(said.photos), date)
    told |= {"seconds": round(said.seconds, 3), "batch_size": batch_size}
    answers = _answers(said, calibration, threshold)
    if photos.regression:
        report = measured_numbers(answers, target, told, bootstrap=bootstrap, seed=seed)
    else:
        report = measured(
            answers, target, calibration, told, positive=index, bootstrap=bootstrap, seed=seed
        )
    report = replace(report, failed=_failed(photos, said.errors), failed_tuning=failed_tuning)
    if tune is not None and calibration is not None and os.fspath(model):
        path = Path(resolve(model)).expanduser()
        if path.exists() and (path != DEMO or isinstance(model, os.PathLike)):
            report = replace(report, stored=calibration.store(path))
    write(report, photos, answers, said.errors, predictor.image_processor)
    return report


def _ready(
    predictor: Predictor, photos: LabelledPhotos, tune: LabelledPhotos | None
) -> tuple[LabelledPhotos, LabelledPhotos | None]:
    """Both sets in the classes of the model. Raises ConfigError without a head, DataError for sets
    that do not fit it or each other."""
    if not predictor.model.num_classes:
        raise ConfigError("this model has no head to evaluate: fine-tune it first")
    found = []
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
        found.append(part.with_labels(predictor.labels, ids=True))
    if tune is not None:
        mine = {os.path.realpath(photo.path) for photo in photos.photos}
        both = [p.path for p in tune.photos if os.path.realpath(p.path) in mine]
        if both:
            raise DataError(
                f"{len(both)} photos to tune on are also to be evaluated on, such as {both[0]}: "
                "expected two sets apart, or the numbers would flatter"
            )
    return found[0], found[1] if tune is not None else None


def _check(
    predictor: Predictor,
    tune: LabelledPhotos | None,
    calibration: Calibration | None,
    threshold: float | None,
    positive: str | None,
    bootstrap: int,
    on_bad_image: OnBadImage,
) -> int | None:
    """The number of the class `positive`. Raises ConfigError for settings that do not fit."""
    if on_bad_image not in get_args(OnBadImage):
        raise ConfigError(f"on_bad_image={on_bad_image!r}: expected 'fail' or 'skip'")
    if bootstrap < 0:
        raise ConfigError(f"bootstrap={bootstrap}: expected 0 (no intervals) or more draws")
    if tune is not None and calibration is not None:
        raise ConfigError("tune= makes a calibration: leave calibration= out")
    if calibration is not None:
        calibration.check(predictor.labels, predictor.task)
    if threshold is not None and not predictor.multi_label:
        raise ConfigError("threshold= is for models that give several labels a photo")
    if positive is None:
        return None
    names = [composed(label) for label in predictor.labels]
    if names.count(composed(positive)) != 1:
        raise ConfigError(f"positive={positive!r}: expected the name of one class of the model")
    return names.index(composed(positive))


def _scored(
    predictor: Predictor,
    photos: LabelledPhotos,
    batch_size: int,
    on_bad_image: OnBadImage,
    progress: bool,
) -> Scored:
    errors: dict[int, str] = {}

    def note(index: int, error: ImageError) -> None:
        if isinstance(error, NotFiniteError):  # the model fails, which no report may leave out
            raise ConfigError(f"{photos.photos[index].path}: {error}") from error
        errors[index] = str(error)

    predictor.fast()  # made before the clock starts
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
    return Scored(photos.subset(read), scores[read], errors, seconds)


def _answers(said: Scored, calibration: Calibration | None, threshold: float | None) -> Answers:
    scores = said.scores if calibration is None else calibration.apply(said.scores)
    tuned = calibration.thresholds if calibration is not None else None
    limits = tuned if threshold is None and tuned is not None else threshold
    classes = scores.shape[1]
    each = np.broadcast_to(np.asarray(0.5 if limits is None else limits, np.float64), classes)
    return Answers(said.photos, said.photos.targets(), scores, said.scores, each)


def _failed(photos: LabelledPhotos, errors: dict[int, str]) -> tuple[tuple[str, str], ...]:
    """(file, why) of those that could not be decoded and those left out when the set was read."""
    decoding = [(str(photos.photos[index].path), why) for index, why in sorted(errors.items())]
    return (*decoding, *photos.left_out)
