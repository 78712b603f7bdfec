"""`run`: labelled photos and models -> a table of their features, a report, and the best probe.

Shapes: N photos, D features, C classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitlib.batch.store_embeddings import store_embeddings
from vitlib.errors import ConfigError, DataError, check_int, count_noun
from vitlib.evaluate.folder import check_folder
from vitlib.evaluate.measurement import library_versions
from vitlib.features import Feature, FeatureStore, open_store, select_features
from vitlib.metrics import import_sklearn_metrics
from vitlib.plots.draw import new_figure
from vitlib.predict.optimized_model import current_config
from vitlib.predict.predictor import Predictor
from vitlib.probe.collect import Collector
from vitlib.probe.division import divide_photos
from vitlib.probe.files import write_report
from vitlib.probe.head import save_probe
from vitlib.probe.journal import Journal
from vitlib.probe.logistic_head import Fitter
from vitlib.probe.measure import METHODS, Task, measure_feature
from vitlib.probe.neighbours import COUNTS, usable_counts
from vitlib.probe.photos import ProbePhotos, read_probe_photos
from vitlib.probe.results import KIND, BestProbe, ProbeReport
from vitlib.probe.table import Measured, choose_best, few_shot_rows, probe_rows, selected_rows
from vitlib.source.locate import ALWAYS_SHOW
from vitlib.system.atomic import open_atomic, refuse_input
from vitlib.system.progress import progress_bar
from vitlib.system.terminal import dump_json
from vitlib.system.torch_state import isolate_torch_settings

logger = logging.getLogger("vitlib")
Layers = Literal["all", "last"] | Sequence[int]


class Settings(NamedTuple):
    """Settings of a run, as run() takes them.

    Attributes:
        layers: "all", "last", or numbers of layers.
        pools: Pools; None takes the model's usual one.
        methods: Names of METHODS.
        few_shot: Numbers of photos of a class.
        k: Numbers of neighbours.
        seed: Seed of folds, draws and first weights.
    """

    layers: Layers
    pools: Sequence[str] | None
    methods: tuple[str, ...]
    few_shot: tuple[int, ...]
    k: tuple[int, ...]
    seed: int


@isolate_torch_settings()
def run(
    data: str | os.PathLike[str],
    models: str | Predictor | Sequence[str | os.PathLike[str] | Predictor],
    out: str | os.PathLike[str],
    *,
    layers: Layers = "last",
    pools: Sequence[str] | None = None,
    methods: Sequence[str] = METHODS,
    few_shot: Sequence[int] = (),
    k: Sequence[int] = COUNTS,
    multi_label: bool = False,
    seed: int = 0,
    features: str | os.PathLike[str] | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    on_bad_image: Literal["fail", "skip"] = "skip",
    save_model: bool = True,
    progress: bool = False,
) -> ProbeReport:
    """Measure frozen features of models on labelled photos, and save the best probe.

    A folder with train/ and val/ or test/ is measured on the latter, another set by 5 folds. C, k,
    rate, layer and pool are chosen inside the training part only. A run that was killed continues:
    vectors and results that are in `out` are not computed again.

    Args:
        data: Labelled photos, as read_photos() takes them.
        models: Hub ids, folders, files, or Predictors; one or more.
        out: Folder of the report: new, empty, or with an earlier report of a probe.
        layers: "all", "last", or numbers of layers, 1..depth.
        pools: Pools of select_features(); None takes "cls", of a model without a class token
            "embed".
        methods: Names of METHODS: "knn", "logistic", "linear".
        few_shot: Numbers of photos of a class, for further probes of so few.
        k: Numbers of neighbours.
        multi_label: True if a photo may have any number of labels.
        seed: Seed of folds, draws and first weights.
        features: Folder of the feature store; None takes VITLIB_FEATURES of the environment, or
            out/features.
        embeddings: Embeddings of an earlier `vitlib embed` or `batch` run of the one model, which
            are copied into the store. Then pools is ("embed",) by default.
        batch_size: Photos that pass through a model together.
        on_bad_image: "skip" leaves photos out that cannot be read, and names them; "fail" raises.
        save_model: True writes the best probe to out/model.
        progress: True shows progress bars.

    Returns:
        The report, which is also written.

    Raises:
        ConfigError: An argument is out of range, or a model has no such layer or pool.
        DataError: The photos cannot be used.
        SourceError: A model, or the folder, cannot be used.
        BatchError: The embeddings are not those of the model.
    """
    pools = ("embed",) if pools is None and embeddings is not None else pools
    folder, settings = Path(out), Settings(
        layers, pools, tuple(methods), tuple(few_shot), tuple(k), seed
    )  # fmt: skip
    _check(settings, data, folder)
    photos = read_probe_photos(data, multi_label=multi_label, on_bad_image=on_bad_image)
    divide_photos(photos.training, photos.test, seed)  # refuses too few photos before the work
    store = open_store(features, folder / "features")
    assert store is not None
    collectors = _open_models(models, settings, store, batch_size, progress)
    # Missing extras are named now, and not after an hour of inference.
    import_sklearn_metrics()
    new_figure(1, 1)
    if embeddings is not None:
        _copy_embeddings(Path(embeddings), collectors, store)
    with open_atomic(folder / KIND.last) as file:
        # The folder is known as a probe's from now on, so that the same run may continue in it.
        file.write(dump_json(KIND.stub, None).encode())
    digests, photos = _fill(collectors, photos, on_bad_image)
    task = Task(
        photos.all.targets(), photos.all.labels,
        divide_photos(photos.training, photos.test, seed),
        settings.methods, settings.k, settings.few_shot, seed,
    )  # fmt: skip
    journal = Journal(folder / "results", task, digests)
    measured = [m for c in collectors for m in _measure(c, photos, task, journal, progress)]
    best = choose_best(measured)
    saved = None
    if best is not None:
        saved = _save_best(best, collectors, photos, task, folder / "model", save_model)
    report = ProbeReport(
        folder,
        _describe(data, photos, task, collectors, settings),
        photos.all.labels,
        task.multi_label,
        task.primary,
        probe_rows(measured, task),
        few_shot_rows(measured),
        selected_rows(measured, task),
        saved,
        _notes(photos, task, saved),
        photos.failed,
    )
    shown = best or measured[0]
    collector = next(c for c in collectors if c.name == shown.model)
    held_out = task.division.held_out
    paths = [photos.all.photos[int(i)].path for i in held_out]
    _, vectors = next(collector.read(paths, [shown.feature]))
    write_report(report, vectors, task.targets[held_out], seed)
    return report


def _check(settings: Settings, data: str | os.PathLike[str], folder: Path) -> None:
    """Raise ConfigError or SourceError for arguments that no run can have."""
    for name, values in (("k", settings.k), ("few_shot", settings.few_shot)):
        for value in values:
            check_int(name, value, at_least=1)
    if not settings.k:
        raise ConfigError("k is empty: expected one number of neighbours or more")
    wrong = [name for name in settings.methods if name not in METHODS]
    if wrong or not settings.methods:
        shown = repr(wrong[0]) if wrong else "no method"
        raise ConfigError(f"methods: {shown}: expected one or more of {', '.join(METHODS)}")
    refuse_input(folder, [data], inside=True)
    check_folder(folder, KIND)


def _open_models(
    models: str | os.PathLike[str] | Predictor | Sequence[str | os.PathLike[str] | Predictor],
    settings: Settings,
    store: FeatureStore,
    batch_size: int,
    progress: bool,
) -> list[Collector]:
    """Load the models, and name the features of each. Raises ConfigError for none or equal ones."""
    sources = [models] if isinstance(models, str | os.PathLike | Predictor) else list(models)
    if not sources:
        raise ConfigError("no model: expected one or more")
    collectors: list[Collector] = []
    for source in sources:
        predictor = source if isinstance(source, Predictor) else Predictor.load(source)
        name = predictor.source or f"model {len(collectors) + 1}"
        if any(other.name == name for other in collectors):
            raise ConfigError(f"the model {name} is given twice: name each once")
        config = current_config(predictor.model)
        pools = settings.pools or (("cls",) if config.tokens.cls else ("embed",))
        try:
            chosen = select_features(config, settings.layers, pools)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        collectors.append(Collector(name, predictor, chosen, store, batch_size, progress))
    return collectors


def _copy_embeddings(source: Path, collectors: Sequence[Collector], store: FeatureStore) -> None:
    """Copy embeddings of an earlier run into the store. Raises ConfigError for several models."""
    if len(collectors) > 1:
        raise ConfigError(
            f"embeddings: {source} is of one model, and {len(collectors)} are given: give that one"
        )
    copied = store_embeddings(source, collectors[0].predictor, store)
    if copied.absent:
        photos = count_noun(copied.absent, "photo")
        logger.warning("%s: %s not there any more", source, photos, extra=ALWAYS_SHOW)


def _fill(
    collectors: Sequence[Collector], photos: ProbePhotos, on_bad_image: str
) -> tuple[list[str], ProbePhotos]:
    """Compute all vectors; return hashes of the photos that can be read, and these photos."""
    paths = [photo.path for photo in photos.all.photos]
    errors: dict[int, str] = {}
    digests: list[str] = []
    for collector in collectors:
        digests, failed = collector.fill(paths)
        errors |= failed
    if errors and on_bad_image == "fail":
        raise DataError(f"{paths[min(errors)]}: {errors[min(errors)]}")
    readable = [index for index in range(len(paths)) if index not in errors]
    if not readable:
        raise DataError(f"none of {len(paths)} photos can be read, the first: {errors[0]}")
    return [digests[index] for index in readable], photos.without(errors)


def _measure(
    collector: Collector, photos: ProbePhotos, task: Task, journal: Journal, progress: bool
) -> list[Measured]:
    """Measure each feature of a model, or read its result where an earlier run wrote it."""
    results: dict[Feature, dict[str, Any]] = {}
    for feature in collector.features:
        stored = journal.read(collector.digest, feature)
        if stored is not None:
            results[feature] = stored
    pending = [feature for feature in collector.features if feature not in results]
    paths = [photo.path for photo in photos.all.photos]
    with progress_bar(len(pending), progress, "probe") as advance:
        for feature, vectors in collector.read(paths, pending):
            result: dict[str, Any] = dict(measure_feature(vectors, task))
            result["milliseconds"] = collector.milliseconds
            journal.write(collector.digest, feature, result)
            results[feature] = result
            advance(1)
    return [Measured(collector.name, f, **results[f]) for f in collector.features]


def _save_best(
    best: Measured,
    collectors: Sequence[Collector],
    photos: ProbePhotos,
    task: Task,
    folder: Path,
    save_model: bool,
) -> BestProbe:
    """Fit the best probe to all training photos, and write it."""
    method = best.method("logistic")
    c = method.final_choice["C"]
    probe = BestProbe(best.model, best.feature.layer, best.feature.pool, c, method.final_inner)
    if not save_model:
        return probe
    collector = next(entry for entry in collectors if entry.name == best.model)
    rows = task.division.training(frozenset())
    training = photos.all.subset(rows)
    paths = [photo.path for photo in training.photos]
    _, vectors = next(collector.read(paths, [best.feature]))
    head = Fitter(vectors, task.targets[rows], len(task.labels)).fit(c)
    saved = save_probe(collector.predictor, best.feature, head, training, vectors, folder)
    if saved.note:
        logger.warning("%s", saved.note)
    return replace(probe, folder=saved.folder, layout=saved.layout, note=saved.note)


def _describe(
    data: str | os.PathLike[str],
    photos: ProbePhotos,
    task: Task,
    collectors: Sequence[Collector],
    settings: Settings,
) -> dict[str, Any]:
    """Describe data, protocol, models, settings and versions."""
    division = task.division
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data": {
            "source": os.fspath(data),
            "photos": len(photos.all),
            "failed": len(photos.failed),
            "measured": len(division.held_out),
        },
        "protocol": {
            "kind": division.kind,
            "folds": len(division.rounds),
            "training_photos": len(division.training(division.rounds[0].excluded)),
            "held_out_photos": len(division.held_out),
        },
        "models": [{"name": c.name, "features": [list(f) for f in c.features]} for c in collectors],
        "settings": {
            "methods": list(settings.methods),
            "k": list(settings.k),
            "few_shot": list(settings.few_shot),
            "seed": settings.seed,
        },
        "versions": library_versions(),
    }


def _notes(photos: ProbePhotos, task: Task, best: BestProbe | None) -> tuple[str, ...]:
    """List what a reader of the table must know."""
    notes = list(photos.notes)
    division = task.division
    smallest = min(len(division.training(r.excluded)) for r in division.rounds)
    usable = usable_counts(task.k, max(smallest - 1, 1))
    unused = [k for k in task.k if k not in usable]
    if unused and "knn" in task.methods:
        notes.append(
            f"k = {', '.join(map(str, unused))}: left out, since a training part has "
            f"{count_noun(smallest, 'photo')}"
        )
    for per_class in task.few_shot:
        counts = photos.training.counts()
        short = sum(0 < n < per_class for n in counts.values())
        if short:
            notes.append(
                f"few-shot {per_class}: {count_noun(short, 'class')} with fewer photos: all of them"
            )
    if best is not None and best.note:
        notes.append(best.note)
    return tuple(notes)
