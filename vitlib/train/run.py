"""Fine-tuning: finetune() trains a model on labelled photos and writes a checkpoint of it.

How data flows: the photos are read and split, and the model is loaded with a head for their labels.
loop.py trains it and chooses the best checkpoint. That is written as a Hugging Face checkpoint with
the settings, the history, its curves and a card (artifacts.py). All input is checked before the
first step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from reprlib import repr as shown  # short, however large the value
from typing import Any

import numpy as np
import torch

from vitlib.checkpoint.save import save
from vitlib.config import ProblemType
from vitlib.data import LabelledPhotos
from vitlib.errors import ConfigError
from vitlib.image.depth import Levels
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import ALWAYS_SHOW
from vitlib.system.atomic import refuse_input
from vitlib.system.torch_state import (
    is_available,
    isolate_torch_settings,
    preserve_rng_state,
    unavailable,
)
from vitlib.train import artifacts, datasets, lora, optim, run_folder, start
from vitlib.train.choice import choose_settings
from vitlib.train.config import TrainConfig
from vitlib.train.distributed import join_processes
from vitlib.train.evaluations import Evaluation
from vitlib.train.init_weights import build_from_scratch
from vitlib.train.linear_probe import use_features
from vitlib.train.loop import Trainer
from vitlib.train.losses import check_loss
from vitlib.vit import ViT
from vitlib.weights import load

logger = logging.getLogger("vitlib")


@dataclass(frozen=True)
class Finetuned:
    """The result of a run.

    Attributes:
        out: Folder of the run, which is the new checkpoint.
        labels: Labels of the classes, or names of the outputs.
        metrics: Metrics of the best checkpoint on the validation set; empty without one.
        best_step: Step of that checkpoint.
        steps: Steps taken.
        seconds: Time of training and evaluation.
        stopped_early: Early stopping ended the run.
        left_out: (file, reason) of each photo that could not be used.
        first: This is the process that writes and prints.
        notes: What is allowed but seldom intended, a line each.
        evaluations: Each evaluation, or each epoch without a validation set.
        fold_metrics: Of a fitted head without a validation set: metrics of linear heads on folds of
            the training photos that they did not see.
        counts: Photos that took part, by "training" and "validation".
    """

    out: Path
    labels: tuple[str, ...]
    metrics: dict[str, float]
    best_step: int
    steps: int
    seconds: float
    stopped_early: bool
    left_out: tuple[tuple[str, str], ...]
    first: bool = True
    notes: tuple[str, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    fold_metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON has it, without `first`.

        Returns:
            Names and values of the fields, paths as text.
        """
        values = {k: v for k, v in vars(self).items() if k != "first"}
        values["evaluations"] = [asdict(evaluation) for evaluation in self.evaluations]
        return {**values, "out": str(self.out), "left_out": [list(x) for x in self.left_out]}


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
    on_evaluation: Callable[[Evaluation], object] | None = None,
    reading: Mapping[str, Any] | None = None,
    class_map: str | os.PathLike[str] | None = None,
    exclude: str | os.PathLike[str] | None = None,
    features: str | os.PathLike[str] | None = None,
) -> Finetuned:
    """Train an image classifier, or with regression=True a model that predicts numbers.

    Several processes train together when torchrun starts them.

    Args:
        data: A folder a class, a CSV, a JSONL (see vitlib.data.read_photos), or its result.
        model: A hub id, folder or file; or a ViT, which is itself trained, frozen parameters left
            as they are. Its head is replaced unless it has these labels or is custom. None with
            from_scratch.
        out: Folder that becomes a Hugging Face checkpoint; for a model with custom modules it holds
            state_dict.safetensors.
        config: Settings; None chooses them by the photos, as TrainConfig.from_dict({"auto": True})
            does, unless the model is new: see choice.py.
        validation: Like data; None for a part of data (config.run.validation_split; 0: none).
        multi_label: Photos have any number of labels.
        regression: Photos have numbers instead of labels, from a CSV or a JSONL. The loss is the
            squared error, and a new head starts at the targets' mean.
        from_scratch: Size of a new model such as "S/16", or "96x8x4/4": width, blocks, heads,
            patch.
        image_processor: Preprocessing; None for the checkpoint's.
        levels: Black and white of photos deeper than 8 bits: see ImageProcessor.
        resume: Continue the run in out.
        device: Device of the model; None for CUDA where there is a GPU.
        progress: Show a progress bar.
        on_evaluation: Called after each evaluation, for instance with print.
        reading: More arguments of vitlib.load.
        class_map: Table from labels of photos to names of classes: see vitlib/data/class_map.py.
        exclude: CSV of photos to leave out, as `vitlib audit --fix-list` writes it.
        features: Store of vectors (vitlib/features), for a head that is fitted to frozen features;
            None takes VITLIB_FEATURES of the environment, and without it none.

    Returns:
        The result of the run.

    Raises:
        DataError: A set cannot be used.
        ConfigError: A setting cannot be used with this model or device.
        TrainError: The folder holds another run; or the loss is no longer a number, or is far
            above that of one answer for all photos. The last checkpoint stays.
        KeyboardInterrupt: Ctrl-C ended the run after a step, with a checkpoint of it.
    """
    settings, device = _check_arguments(model, from_scratch, config), _check_device(device)
    for path in (data, validation):
        if isinstance(path, str | os.PathLike):
            refuse_input(out, [path], inside=True)
    whole = replace(settings.run, validation_split=0.0) if settings.run.auto else settings.run
    training, held_out = datasets.read_sets(
        data, validation, whole, multi_label=multi_label, regression=regression,
        class_map=class_map, exclude=exclude,
    )  # fmt: skip
    if settings.run.auto:
        settings, training, held_out = _apply_choice(settings, training, held_out)
    target = Path(out)
    with join_processes(device) as world:
        with world.on_first() as is_first:  # before a model is downloaded
            if is_first:
                run_folder.check_folder(target, resume)
        trainable = start.list_trainable(model)
        vit, processor = _prepare_model(
            model, from_scratch, settings, training, image_processor, reading
        )
        processor = processor if levels is None else replace(processor, levels=levels)
        description = _describe_run(
            training, held_out, settings, vit, model, from_scratch, processor
        )
        description["arguments"] = run_folder.describe_arguments(
            data=data, model=model, validation=validation, class_map=class_map,
            multi_label=multi_label, regression=regression, from_scratch=from_scratch,
            levels=levels, reading=reading, exclude=exclude,
        )  # fmt: skip
        vit.to(world.device)
        trainer = Trainer(
            vit, training, held_out, processor, settings, target, world, progress=progress,
            on_evaluation=on_evaluation,
        )  # fmt: skip
        with world.on_first() as is_first:
            if is_first:
                run_folder.claim_folder(target, description, resume)
                artifacts.write_settings(target, settings)
                artifacts.write_lists(target, training, held_out)
        trainer.resume()
        use_features(trainer, vit, features)
        trainer.run()
        check_loss(trainer.criterion, trainer.targets, trainer.list_evaluations()[-1], settings)
        with world.on_first() as is_first:
            if is_first:
                _write_model(trainer, processor, description)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        return _summarize(trainer)


def _check_arguments(model: object, size: str | None, config: object) -> TrainConfig:
    """Return the settings; raise ConfigError for arguments that exclude each other."""
    settings = config
    if config is None:
        # A new model has no features to begin with.
        settings = TrainConfig.from_dict({"auto": size is None})
    if not isinstance(settings, TrainConfig):
        raise ConfigError(
            f"config={shown(config)}: expected a TrainConfig, such as TrainConfig.from_dict(...)"
        )
    if (model is None) == (size is None):
        raise ConfigError("give a model to start from, or from_scratch=, a size: one of both")
    if size is None and settings.tune.init != "mimetic":
        raise ConfigError(
            f"init={settings.tune.init!r} is of a new model: give from_scratch= (--from-scratch), "
            "or leave init out"
        )
    return settings


def _apply_choice(
    config: TrainConfig, training: LabelledPhotos, held_out: LabelledPhotos | None
) -> tuple[TrainConfig, LabelledPhotos, LabelledPhotos | None]:
    """Choose the settings by the photos, say what and why, and hold out what was chosen."""
    chosen, reason = choose_settings(training, held_out, config)
    logger.warning("%s", reason, extra=ALWAYS_SHOW)
    if held_out is None and chosen.run.validation_split:
        return (chosen, *datasets.hold_out(training, chosen.run))
    return chosen, training, held_out


def _prepare_model(
    source: str | os.PathLike[str] | ViT | None,
    size: str | None,
    config: TrainConfig,
    photos: LabelledPhotos,
    image_processor: ImageProcessor | None,
    reading: Mapping[str, Any] | None,
) -> tuple[ViT, ImageProcessor]:
    """Return the model with a head for the labels and frozen weights, and its preprocessing."""
    # The first weights of the head, and of a new model.
    torch.manual_seed(config.run.seed)
    model, processor = _load_model(source, size, config, photos, image_processor, reading)
    if config.tune.fit == "squash":
        processor = processor.with_squash()
    if any(p.dtype != torch.float32 for p in model.parameters()):
        model.float()
    problem_type: ProblemType = photos.task
    is_new = start.set_head(model, photos.labels, is_caller_model=model is source)
    if is_new and photos.regression:
        start.init_regression_head(model, photos.targets().mean(axis=0, dtype=np.float64))
    rates = {
        name: getattr(config.tune, name)
        for name in ("drop_path", "dropout", "attention_dropout")
        if getattr(config.tune, name) is not None
    }
    start.set_dropout_rates(model, rates)
    model.config = replace(model.config, labels=photos.labels, problem_type=problem_type, **rates)
    start.warn_of_layout(model, processor)
    model.set_grad_checkpointing(config.tune.gradient_checkpointing)
    optim.freeze_parameters(model, config.tune)
    lora.add_updates(model, config.tune, config.run.seed)
    return model, processor


def _load_model(
    source: str | os.PathLike[str] | ViT | None,
    size: str | None,
    config: TrainConfig,
    photos: LabelledPhotos,
    image_processor: ImageProcessor | None,
    reading: Mapping[str, Any] | None,
) -> tuple[ViT, ImageProcessor]:
    """Build, load or check the model, and find its preprocessing."""
    image_size = config.tune.image_size
    if size is not None:
        model = build_from_scratch(size, image_size or 224, len(photos.labels), config.tune.init)
        return model, image_processor or ImageProcessor.from_profile(
            "hf", "vit", model.config.image_size
        )
    if isinstance(source, str | os.PathLike):
        arguments = {"image_size": image_size or None, "dtype": torch.float32, **(reading or {})}
        model = load(source, **arguments)
        processor = image_processor or model.image_processor
        if not isinstance(processor, ImageProcessor):
            processor = ImageProcessor.load(source)
        return model, processor
    model = start.check_model(source)
    if image_size:
        raise ConfigError("image_size is for a model that is loaded: load it with image_size=")
    processor = image_processor or model.image_processor
    if not isinstance(processor, ImageProcessor):
        raise ConfigError("this model came without preprocessing: give image_processor=")
    return model, processor


def _describe_run(
    training: LabelledPhotos,
    held_out: LabelledPhotos | None,
    config: TrainConfig,
    vit: ViT,
    model: str | os.PathLike[str] | ViT | None,
    size: str | None,
    processor: ImageProcessor,
) -> dict[str, Any]:
    """Return the content of run.json: a run resumes only if all of it is the same."""

    def describe_set(photos: LabelledPhotos) -> dict[str, Any]:
        return {"source": photos.source, "photos": len(photos), "sum": datasets.digest(photos)}

    name = "A ViT"
    if size is not None:
        name = f"A new ViT ({size})"
    elif isinstance(model, str | os.PathLike):
        name = os.fspath(model)
    levels = processor.levels
    return {
        "format": run_folder.FORMAT,
        "model": name,
        "labels": list(training.labels),
        "multi_label": training.multi_label,
        **({"regression": True} if training.regression else {}),
        "training": describe_set(training),
        "validation": None if held_out is None else describe_set(held_out),
        "config": config.to_dict(),
        "levels": list(levels) if isinstance(levels, tuple) else levels,
        "parameters": sum(p.numel() for p in vit.parameters()),
    }


def _check_device(device: torch.device | str | None) -> torch.device | str | None:
    """Return the device; raise ConfigError if this machine or its torch does not have it."""
    if not is_available(device or "cpu"):
        raise unavailable(device)
    return device


def _write_model(trainer: Trainer, processor: ImageProcessor, description: dict[str, Any]) -> None:
    """Write the best checkpoint, for Hugging Face if it can hold the model, and the artifacts."""
    trainer.load_best_weights()
    lora.merge_updates(trainer.model)
    trainer.model.eval()
    if start.list_custom_parts(trainer.model):
        start.write_state_dict(trainer.model, trainer.out, processor)
    else:
        layout = start.choose_layout(trainer.model, processor)
        save(trainer.model, trainer.out, layout=layout, image_processor=processor)
    artifacts.write_card(trainer, description, len(_list_left_out(trainer)))
    artifacts.write_curves(trainer)
    artifacts.write_lists(trainer.out, *artifacts.select_readable(trainer))


def _summarize(trainer: Trainer) -> Finetuned:
    """Return the result of a finished run."""
    state, training, validation = trainer.state, trainer.training, trainer.validation
    sets = zip(("training", "validation"), artifacts.select_readable(trainer), strict=True)
    notes = (*trainer.config.list_unused(), *datasets.find_oddities(training, validation))
    return Finetuned(
        out=trainer.out,
        labels=training.labels,
        metrics=artifacts.evaluation_metrics(trainer),
        best_step=state.best_or_last,
        steps=state.step,
        seconds=sum(event.get("seconds") or 0.0 for event in trainer.log.events),
        stopped_early=state.stopped_early,
        left_out=tuple(_list_left_out(trainer)),
        first=trainer.world.is_first,
        notes=notes,
        evaluations=tuple(trainer.list_evaluations()),
        fold_metrics=artifacts.fold_metrics(trainer),
        counts={name: len(part) for name, part in sets if part is not None},
    )


def _list_left_out(trainer: Trainer) -> list[tuple[str, str]]:
    """Return (file, reason) of each photo that could not be used."""
    training, validation, state = trainer.training, trainer.validation, trainer.state
    left_out = [*training.left_out, *(() if validation is None else validation.left_out)]
    for photos, errors in ((training, state.train_errors), (validation, state.eval_errors)):
        if photos is not None:
            left_out += [(str(photos.photos[i].path), why) for i, why in sorted(errors.items())]
    return left_out
