"""finetune: a checkpoint and labelled photos -> a checkpoint that knows their labels, in a folder.

How data flows: the photos are read and divided, the model is loaded with a head for their labels,
loop.py trains it and chooses the best checkpoint, and that is written as a Hugging Face checkpoint
with the settings, the history, its curves and a card (result.py). Everything that can be wrong is
looked at before the first step.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as shown  # short, however large the value
from typing import Any

import numpy as np
import torch

from vitlib.checkpoint.save import save
from vitlib.config import ProblemType
from vitlib.data import LabelledPhotos
from vitlib.data.photos import join_names, short
from vitlib.errors import ConfigError, TrainError
from vitlib.image.depth import Levels
from vitlib.image.processor import ImageProcessor
from vitlib.system.atomic import open_atomic, refuse_input
from vitlib.system.torch_state import isolate_torch_settings, preserve_rng_state
from vitlib.train import artifacts, datasets, lora, optim, start
from vitlib.train.config import TrainConfig
from vitlib.train.distributed import joined
from vitlib.train.init_weights import fresh
from vitlib.train.loop import Trainer, TrainerState
from vitlib.train.resume import list_checkpoints
from vitlib.vit import ViT
from vitlib.weights import load

logger = logging.getLogger("vitlib")
RUN = "run.json"
FORMAT = "vitlib run 1"


@dataclass(frozen=True)
class Finetuned:
    """What a run gave."""

    out: Path
    labels: tuple[str, ...]
    metrics: dict[str, float]  # of the best checkpoint on the validation set; empty without one
    best_step: int
    steps: int
    seconds: float
    stopped_early: bool
    left_out: tuple[tuple[str, str], ...]  # photos that could not be used, and why
    first: bool = True  # of several processes the one that speaks
    notes: tuple[str, ...] = ()  # what is allowed and seldom meant

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        said = {k: v for k, v in vars(self).items() if k != "first"}
        return {**said, "out": str(self.out), "left_out": [list(x) for x in self.left_out]}


@isolate_torch_settings()
@preserve_rng_state()
def finetune(
    data: str | os.PathLike[str] | LabelledPhotos,
    model: str | os.PathLike[str] | ViT | None,
    out: str | os.PathLike[str],
    *,
    config: TrainConfig | None = None,
    validation: str | os.PathLike[str] | LabelledPhotos | None = None,
    multi_label: bool = False,
    regression: bool = False,
    from_scratch: str | None = None,
    image_processor: ImageProcessor | None = None,
    levels: Levels = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
    reading: Mapping[str, Any] | None = None,
    class_map: str | os.PathLike[str] | None = None,
) -> Finetuned:
    """Train a classifier of labelled photos, or with regression=True what gives their numbers.

    data: a folder a class, a CSV, a JSONL (see vitlib.data.read_photos), or what that gives.
    model: a hub id, folder or file, or a ViT, which is itself trained, frozen parameters left as
        they are; its head is replaced unless it has these labels or was put in by hand. None with
        from_scratch, a size such as "S/16", or "96x8x4/4": width, blocks, heads, patch.
    out: the folder; a Hugging Face checkpoint when done, or state_dict.safetensors of a model with
        parts of its own. resume: go on with the run it holds.
    multi_label: any number of labels a photo. regression: numbers in place of labels, out of a CSV
        or a JSONL; the loss is the squared error, and a new head starts at their mean.
    validation: as data; None: a part of it (config.run.validation_split; 0: no validation).
    image_processor: instead of the checkpoint's. reading: more arguments of vitlib.load.
    class_map: a table from the photos' labels to names: see vitlib/data/class_map.py.
    levels: black and white of photos deeper than 8 bits: see ImageProcessor.

    Several processes train together when started with torchrun. Raises DataError for a set that
    cannot be used, ConfigError for settings that cannot be, TrainError for a folder that holds
    another run, and where the loss is no number: then the last checkpoint is kept.
    """
    chosen = config or TrainConfig()
    if config is not None and not isinstance(config, TrainConfig):
        raise ConfigError(
            f"config={shown(config)}: expected a TrainConfig, such as TrainConfig.from_dict(...)"
        )
    if (model is None) == (from_scratch is None):
        raise ConfigError("give a model to start from, or from_scratch=, a size: one of both")
    if from_scratch is None and chosen.tune.init != "mimetic":
        raise ConfigError(
            f"init={chosen.tune.init!r} is of a new model: give from_scratch= (--from-scratch), or "
            "leave init out"
        )
    device = _checked(device)
    for path in (data, validation):
        if isinstance(path, str | os.PathLike):
            refuse_input(out, [path], inside=True)
    training, held_out = datasets.read(
        data, validation, chosen.run, multi_label=multi_label, regression=regression,
        class_map=class_map,
    )  # fmt: skip
    target = Path(out)
    with joined(device) as world:
        with world.first_does() as mine:  # before a model is fetched
            if mine:
                _held(target, resume)
        moves = start.list_moved(model)
        net, rule = _model(model, from_scratch, chosen, training, image_processor, reading)
        rule = rule if levels is None else replace(rule, levels=levels)
        about = _about(training, held_out, chosen, net, model, from_scratch, rule)
        net.to(world.device)
        fit = Trainer(net, training, held_out, rule, chosen, target, world, progress=progress)
        with world.first_does() as mine:
            if mine:
                _claim(target, about, resume)
                artifacts.write_settings(target, chosen)
        fit.resume()
        fit.run()
        with world.first_does() as mine:
            if mine:
                _write(fit, rule, about, len(_left_out(fit, training, held_out)))
        for parameter, moved in moves:
            parameter.requires_grad_(moved)
        return _told(fit, training, held_out)


def _model(
    source: str | os.PathLike[str] | ViT | None,
    size: str | None,
    config: TrainConfig,
    photos: LabelledPhotos,
    processor: ImageProcessor | None,
    reading: Mapping[str, Any] | None,
) -> tuple[ViT, ImageProcessor]:
    """The model with a head for the labels, what does not move frozen; and its preprocessing."""
    torch.manual_seed(config.run.seed)  # the head's fresh weights
    pixels = config.tune.image_size
    if size is not None:
        net = fresh(size, pixels or 224, len(photos.labels), config.tune.init)
        rule = processor or ImageProcessor.from_profile("hf", "vit", net.config.image_size)
    elif isinstance(source, str | os.PathLike):
        given = {"image_size": pixels or None, "dtype": torch.float32, **(reading or {})}
        net = load(source, **given)
        found = processor or net.image_processor
        rule = found if isinstance(found, ImageProcessor) else ImageProcessor.load(source)
    else:
        net = start.check_given(source)
        if pixels:
            raise ConfigError("image_size is for a model that is loaded: load it with image_size=")
        rule = processor or net.image_processor  # type: ignore[assignment]
        if not isinstance(rule, ImageProcessor):
            raise ConfigError("this model came without preprocessing: give image_processor=")
    if config.tune.fit == "squash":
        rule = rule.with_squash()
    if any(p.dtype != torch.float32 for p in net.parameters()):
        net.float()
    problem: ProblemType = photos.task
    if start.fit_head(net, photos.labels, given=net is source) and photos.regression:
        start.head_at(net, photos.targets().mean(axis=0, dtype=np.float64))
    rates = {
        name: getattr(config.tune, name)
        for name in ("drop_path", "dropout", "attention_dropout")
        if getattr(config.tune, name) is not None
    }
    start.set_rates(net, rates)
    net.config = replace(net.config, labels=photos.labels, problem_type=problem, **rates)
    start.tell_output(net, rule)
    net.set_grad_checkpointing(config.tune.gradient_checkpointing)
    optim.freeze(net, config.tune)
    lora.add(net, config.tune, config.run.seed)
    return net, rule


def _about(
    training: LabelledPhotos,
    held_out: LabelledPhotos | None,
    config: TrainConfig,
    net: ViT,
    model: str | os.PathLike[str] | ViT | None,
    size: str | None,
    rule: ImageProcessor,
) -> dict[str, Any]:
    """What makes a run this one: to go on, all of it must be the same."""
    return {
        "format": FORMAT,
        "model": f"A new ViT ({size})"
        if size
        else os.fspath(model)
        if isinstance(model, str | os.PathLike)
        else "A ViT",
        "labels": list(training.labels),
        "multi_label": training.multi_label,
        **({"regression": True} if training.regression else {}),
        "training": {
            "source": training.source,
            "photos": len(training),
            "sum": datasets.digest(training),
        },
        "validation": None
        if held_out is None
        else {"source": held_out.source, "photos": len(held_out), "sum": datasets.digest(held_out)},
        "config": config.to_dict(),
        "levels": list(rule.levels) if isinstance(rule.levels, tuple) else rule.levels,
        "parameters": sum(p.numel() for p in net.parameters()),
    }


def _checked(device: torch.device | str | None) -> torch.device | str | None:
    """The device. Raises ConfigError where this machine or its torch has none of it."""
    there = {
        "cpu": 1, "cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }  # fmt: skip
    try:
        chosen = torch.device(device or "cpu")
        found = (chosen.index or 0) < there.get(chosen.type, 0)
    except RuntimeError:  # no device at all
        found = False
    if not found:
        names = [f"{name}:{i}" for name, n in there.items() for i in range(n) if name != "cpu"]
        raise ConfigError(
            f"device={str(device)!r} cannot be had on this machine with this torch: expected "
            f"{' or '.join(['cpu', *names])}"
        )
    return device


def _held(out: Path, resume: bool) -> dict[str, Any] | None:
    """What run.json of the folder says; None: it holds no run and can have one.

    Raises TrainError where it holds a run and none is to go on, or anything else.
    """
    marker = out / RUN
    try:
        if not marker.is_file():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise TrainError(f"{out} is not an empty folder: name another for this run")
            there = next(p for p in (out, *out.absolute().parents) if p.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise TrainError(f"{out} cannot be made: {there} is no folder to write to")
            return None
        if not resume and list_checkpoints(out):
            raise TrainError(
                f"{out} holds a run already: go on with it (resume=True, --resume), or name "
                "another folder"
            )
        if not resume:
            raise TrainError(
                f"{out} holds a run that has no checkpoint yet: if it has ended, delete the "
                "folder; or name another"
            )
        held = json.loads(marker.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainError(f"{out} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise TrainError(
            f"{marker} is damaged or of another version: name another folder for this run"
        )
    return held


def _claim(out: Path, about: dict[str, Any], resume: bool) -> None:
    """Make the folder this run's. Raises TrainError where it is another's, or not empty."""
    held = _held(out, resume)
    if held is None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(f"{out} cannot be made: {error.strerror or error}") from error
        with open_atomic(out / RUN) as file:
            file.write(
                json.dumps(about, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
            )
        return
    changed = [k for k in about if held.get(k) != about[k]]
    if "config" in changed:
        changed += _changes(held.get("config"), about["config"])
    if changed:
        raise TrainError(
            f"{out} holds a run with another {join_names(changed, 8)}: to go on, all must be the "
            "same; name another folder for another run"
        )


def _changes(before: Any, now: dict[str, Any]) -> list[str]:
    """The settings that differ, each with the value that the run has."""

    def of(holder: Any, key: str) -> Any:
        return holder.get(key) if isinstance(holder, dict) else None

    return [
        f"{name} ({short(json.dumps(of(of(before, part), name)))})"
        for part, values in now.items()
        for name, value in values.items()
        if of(of(before, part), name) != value
    ]


def _write(fit: Trainer, rule: ImageProcessor, about: dict[str, Any], left_out: int) -> None:
    """Write the best checkpoint, as a Hugging Face one where that can be, and what is to say."""
    fit.best_weights()
    lora.merge(fit.model)
    fit.model.eval()
    if start.own_parts(fit.model):
        start.write_own(fit.model, fit.out, rule)
    else:
        layout = start.layout_for(fit.model, rule)
        save(fit.model, fit.out, layout=layout, image_processor=rule)
    artifacts.write_card(fit, about, left_out)
    artifacts.write_curves(fit)


def _told(fit: Trainer, training: LabelledPhotos, held_out: LabelledPhotos | None) -> Finetuned:
    now: TrainerState = fit.now
    events = fit.log.events
    best = now.best_step or now.step
    found = [e for e in events if e["event"] == "eval" and e["step"] == best]
    said = {} if not found else {
        k: v for k, v in found[-1].items() if k not in ("event", "step", "epoch", "seconds")
    }  # fmt: skip
    left_out = _left_out(fit, training, held_out)
    seconds = sum(e.get("seconds") or 0.0 for e in events)
    return Finetuned(
        fit.out, training.labels, said, best, now.step, seconds, now.stopped, tuple(left_out),
        fit.world.first, (*fit.config.unused(), *datasets.notes(training, held_out)),
    )  # fmt: skip


def _left_out(
    fit: Trainer, training: LabelledPhotos, held_out: LabelledPhotos | None
) -> list[tuple[str, str]]:
    """Photos that could not be used, and why."""
    found = [*training.left_out, *(() if held_out is None else held_out.left_out)]
    for photos, missing in ((training, fit.now.failed), (held_out, fit.now.unseen)):
        if photos is not None:
            found += [(str(photos.photos[i].path), why) for i, why in sorted(missing.items())]
    return found
