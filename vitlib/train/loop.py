"""The loop: photos -> pixels -> logits -> loss -> gradients -> weights, step by step.

How data flows: order.py says which photos make a step and which of them this process reads;
reader.py makes pixels of them, a pass at a time; fast_step computes logits with a graph;
losses.py sums, and divides by the weight of the whole step's batch, so that passes and processes do
not show; the processes' gradients are averaged, cut, and the optimizer takes its step. After the
epochs that are evaluated, scores of the validation set choose the best checkpoint.

A step is a function of the weights, the optimizer's numbers and its own number: to go on after a
kill, no more than those three are read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlib import dropout, metrics
from vitlib.data import LabelledPhotos
from vitlib.errors import ConfigError, DataError, TrainError
from vitlib.image.processor import ImageProcessor
from vitlib.scores import logits_to_scores
from vitlib.system.progress import progress_bar
from vitlib.train import optim, resume
from vitlib.train.augment import Augment
from vitlib.train.config import TrainConfig
from vitlib.train.distributed import World
from vitlib.train.feature_cache import Features
from vitlib.train.forward import Forward
from vitlib.train.fused_step import hold_heap
from vitlib.train.loader.loader import Batch, PhotoLoader
from vitlib.train.loader.photos import pixel_size
from vitlib.train.log import MetricsLog
from vitlib.train.losses import build_criterion, soft_targets
from vitlib.train.mix import mix_targets
from vitlib.train.sampler import BatchPlan, BatchSampler
from vitlib.vit import ViT


@dataclass
class TrainerState:
    """Where a run is."""

    step: int = 0  # steps taken
    best_step: int | None = None
    best_value: float | None = None
    best_loss: float | None = None  # of evaluations that are equal in value, the lowest
    waited: int = 0  # evaluations since the best
    stopped: bool = False  # early
    failed: dict[int, str] = field(default_factory=dict)  # photos left out, by number
    unseen: dict[int, str] = field(default_factory=dict)  # the same of the validation set


class Trainer:
    """A run in one of its processes. Raises ConfigError for what cannot be trained."""

    def __init__(
        self,
        model: ViT,
        training: LabelledPhotos,
        validation: LabelledPhotos | None,
        processor: ImageProcessor,
        config: TrainConfig,
        out: Path,
        world: World,
        *,
        progress: bool = False,
    ) -> None:
        self.model, self.config, self.out, self.world = model, config, out, world
        self.training, self.validation, self.shown = training, validation, progress
        self.metric = config.run.metric_for_best_model or metrics.PRIMARY[training.task]
        self._check_metric()
        self.targets = soft_targets(training.targets(), model.num_classes)
        self.criterion = build_criterion(config.loss, self.targets, training.task)
        self.device_criterion = self.criterion.move_weights(world.to_device)
        self.frozen = resume.checksum_frozen(model)
        self.forward = Forward(model, config, world)
        self.model = model = self.forward.model
        self.optimizer = optim.optimizer(model, config.optim)
        self.order = BatchSampler.of(config, len(training), world.size, pixel_size(processor))
        self.reader = self._reader(training, processor)
        self.watched = None if validation is None else self._reader(validation, processor, True)
        self.features: Features | None = None
        if self._features_do():
            self.features = Features(model, self.reader, self.forward.head_input)
        decay = config.tune.ema_decay
        moved = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in moved.items()} if decay else {}
        self.log = MetricsLog(out, world.first, config.run.tensorboard)
        self.now = TrainerState()

    def _check_metric(self) -> None:
        """Raises ConfigError for a metric that no evaluation will give."""
        if self.validation is None:
            if self.config.run.early_stopping_patience or self.config.run.metric_for_best_model:
                raise ConfigError(
                    "early_stopping_patience and metric_for_best_model need a validation set"
                )
            return
        targets = self.validation.targets()
        even = np.full((len(targets), self.model.num_classes), 1 / self.model.num_classes)
        known = ("loss", *metrics.task_metrics(targets, even, self.validation.task))
        if self.metric not in known:
            raise ConfigError(
                f"metric_for_best_model={self.metric!r}: expected one of {', '.join(known)}"
            )

    def run(self) -> TrainerState:
        """Every step that is left. Raises TrainError where the loss is no number any more."""
        self.log.go_on_from(self.now.step)
        total = self.order.total
        with self.reader, self.watched or nullcontext(), hold_heap():
            passes = self._passes()
            shown = self.shown and self.world.first
            with progress_bar(total - self.now.step, shown, "step") as advance:
                while self.now.step < total and not self.now.stopped:
                    self._train_step(self.order.step(self.now.step), passes)
                    advance(1)
                    self._after_step(total)
        self.log.close()
        # What holds parts of the model goes too, as it holds the processes' group.
        self.model, self.features, self.average = self.forward.close(), None, {}
        del self.optimizer
        return self.now

    def resume(self) -> None:
        """Go on from the last checkpoint. Raises TrainError where it is of another run."""
        found = resume.list_checkpoints(self.out)
        if not found:
            return
        tensors, state = resume.load_checkpoint(found[max(found)])
        if state.get("frozen") != self.frozen:
            raise TrainError("the model's frozen weights are not those of the run: it had another")
        resume.restore_tensors(tensors, self.model, self.average, self.optimizer)
        self.forward.scaler.load_state_dict(state["scaler"])
        self.now = TrainerState(**state["progress"])
        for held in (self.now.failed, self.now.unseen):  # JSON's keys are text
            numbers = {int(k): v for k, v in held.items()}
            held.clear()
            held.update(numbers)

    def best_weights(self) -> None:
        """Put the best checkpoint's weights into the model, their averages where they were kept."""
        steps = resume.list_checkpoints(self.out)
        step = self.now.best_step if self.now.best_step in steps else max(steps)
        assert step is not None
        tensors, _ = resume.load_checkpoint(steps[step])
        kind = "average/" if self.config.tune.ema_decay else "model/"
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[kind + name])

    def _reader(
        self, photos: LabelledPhotos, processor: ImageProcessor, plain: bool = False
    ) -> PhotoLoader:
        run = self.config.run
        augment = None if plain or self.config.augment == Augment.none() else self.config.augment
        return PhotoLoader(
            [photo.path for photo in photos.photos],
            processor,
            augment,
            seed=run.seed,
            workers=run.dataloader_num_workers,
            cache=run.cache,
            on_bad=run.on_bad_image,
            pin=self.world.device.type == "cuda",
        )

    def _features_do(self) -> bool:
        """Whether what the head reads is the same in every epoch."""
        cfg = self.model.config
        return (
            self.config.tune.head_only
            and self.config.augment == Augment.none()
            and not (cfg.dropout or cfg.attention_dropout or cfg.drop_path)
        )

    def _passes(self) -> Iterator[Batch]:
        if self.features is not None:
            return iter(())
        return self.reader.batches(self.order.from_step(self.now.step, self.world.rank))

    def _train_step(self, plan: BatchPlan, passes: Iterator[Batch]) -> None:
        """All passes of a step, and the step. Only _move waits for a GPU."""
        start, model = time.perf_counter(), self.model
        model.train()
        weight = self.criterion.weight(self._targets(plan))
        mine = self.order.passes_of(plan, self.world.rank)
        losses: list[Tensor] = []
        scale = self.world.size / max(weight, 1e-12)
        for index, part in enumerate(mine):
            batch = None if self.features is not None else next(passes)
            left = self._noted(part, batch)
            # train_forward computes one blank image where there is no photo.
            keys = dropout.sample_keys(self.config.run.seed, plan.epoch, left.samples or (0,))
            dropout.set_keys(model, self.world.to_device(keys))
            pixels = batch.pixels if batch is not None else self._features(left)
            logits = self.forward(pixels, last=index == len(mine) - 1, of_head=batch is None)
            loss = self.device_criterion.sum(logits, self.world.to_device(self._targets(left)))
            self.forward.backward(loss * scale)
            losses.append(loss.detach())
        dropout.set_keys(model, None)
        self._move(plan, losses, weight, start)

    def _move(self, plan: BatchPlan, losses: list[Tensor], weight: float, start: float) -> None:
        """The optimizer's step, if the loss is a number.

        Losses and the gradients' norm are read together, after the last kernel of the backward
        pass is queued. This is the one time that a step waits for a GPU.
        """
        number = plan.step + 1
        norm = self.forward.cut(self.optimizer, self.config.optim.max_grad_norm)
        total, length = self.world.read(losses, norm)
        loss = total / max(weight, 1e-12)
        if not math.isfinite(loss):
            self.optimizer.zero_grad(set_to_none=True)
            raise self._diverged(f"the loss is {loss}", number)
        share = optim.rate_at(plan.step, self.order.total, self.config)
        optim.set_rate(self.optimizer, share, self.config)
        self.forward.step(self.optimizer)
        self.now.step = number
        self._average()
        self.log.say(
            {
                "event": "train",
                "step": number,
                "epoch": number / self.order.steps_an_epoch,
                "loss": loss,
                "learning_rate": optim.largest_rate(self.optimizer),
                "grad_norm": length,
                "samples": len(plan.samples),
                "seconds": time.perf_counter() - start,
            }
        )

    def _diverged(self, what: str, step: int) -> TrainError:
        kept = resume.list_checkpoints(self.out)
        at = f"the checkpoint of step {max(kept)} is kept" if kept else "no checkpoint yet"
        return TrainError(
            f"{what} at step {step} of {self.order.total}: {at}; try a lower learning_rate than "
            f"{self.config.optim.learning_rate:g}, a longer warm-up or max_grad_norm"
        )

    def _average(self) -> None:
        """The averages follow the weights; at first faster."""
        if not self.average:
            return
        keep = min(self.config.tune.ema_decay, (1 + self.now.step) / (10 + self.now.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter, 1 - keep)

    def _after_step(self, total: int) -> None:
        """Evaluation and checkpoint where they are due."""
        step, an_epoch, run = self.now.step, self.order.steps_an_epoch, self.config.run
        due = step == total or step % (an_epoch * run.eval_epochs) == 0
        if due:
            for found in self.world.gather(self.now.failed):
                self.now.failed.update(found)
            self._evaluate()
        if due or (run.save_steps and step % run.save_steps == 0):
            self._save()

    def _save(self) -> None:
        parts = resume.collect_tensors(self.model, self.average, self.optimizer)
        tensors = self.forward.whole(parts)
        with self.world.first_does() as mine:
            if not mine:
                return
            steps = [*resume.list_checkpoints(self.out), self.now.step]
            keep = {*sorted(steps)[-self.config.run.save_total_limit :], self.now.best_step or -1}
            state = {
                "progress": vars(self.now),
                "frozen": self.frozen,
                "scaler": self.forward.scaler.state_dict(),
            }
            resume.write_checkpoint(self.out, self.now.step, tensors, state, keep)
            self.log.write_table()

    def _evaluate(self) -> None:
        """Metrics of the validation set; whether they are the best, and for how long not."""
        if self.watched is None or self.validation is None:
            return
        start = time.perf_counter()
        scores, rows, loss = self._scores(self.watched, self.validation)
        found = metrics.task_metrics(self.validation.targets()[rows], scores, self.validation.task)
        found = {"loss": loss, **found}
        value, now, run = found[self.metric], self.now, self.config.run
        greater = run.greater_is_better
        sign = 1 if (self.metric not in metrics.LOWER if greater is None else greater) else -1
        better = math.isfinite(value) and (
            now.best_value is None or sign * (value - now.best_value) > run.early_stopping_threshold
        )
        surer = value == now.best_value and now.best_loss is not None and loss < now.best_loss
        if better or surer:
            now.best_step, now.best_value, now.best_loss = now.step, value, loss
        if better:
            now.waited = 0
        else:
            now.waited += 1
            now.stopped = 0 < run.early_stopping_patience <= now.waited
        seconds = time.perf_counter() - start
        at = {"event": "eval", "step": now.step, "epoch": now.step / self.order.steps_an_epoch}
        self.log.say({**at, **found, "seconds": seconds})

    def _scores(self, reader: PhotoLoader, photos: LabelledPhotos) -> tuple[Any, Any, float]:
        """(N, C) scores of the photos that could be read, their numbers, and their mean loss."""
        self.model.eval()
        kept = self._exchange() if self.average else None
        size = self.config.run.per_device_eval_batch_size
        # With fsdp all compute as often as each other, those with no photo left on one twice.
        last = len(photos) + (-len(photos) % self.world.size if self.forward.shared else 0)
        mine = [i % len(photos) for i in range(self.world.rank, last, self.world.size)]
        logits, numbers, unseen = [], [], self.now.unseen
        with torch.inference_mode():
            for batch in reader.evaluation_batches(size, mine):
                numbers += list(batch.samples)
                unseen.update(batch.failed)
                logits.append(self.forward.plain(batch.pixels).float())
        if kept is not None:
            self._exchange()
        empty = torch.empty(0, self.model.num_classes, dtype=torch.float32)
        read = torch.cat(logits).cpu() if logits else empty  # once, as each read waits for a GPU
        parts = self.world.gather((read, numbers, unseen))
        every_number = np.array([n for _, part, _ in parts for n in part], np.int64)
        rows, order = np.unique(every_number, return_index=True)
        every = torch.cat([part for part, _, _ in parts])[torch.from_numpy(order)]
        for *_, found in parts:
            unseen.update(found)
        if not len(rows):
            raise DataError(f"no photo of the validation set can be read: {min(unseen.items())[1]}")
        if not every.isfinite().all():
            raise self._diverged("the model's answers are no numbers", self.now.step)
        targets = soft_targets(photos.targets(), self.model.num_classes)[torch.from_numpy(rows)]
        plain = type(self.criterion)(photos.task)
        loss = plain.sum(every, targets).item() / max(plain.weight(targets), 1e-12)
        return logits_to_scores(every, photos.task).numpy(), rows, loss

    def _exchange(self) -> bool:
        """Averages and weights change places."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    held = parameter.detach().clone()
                    parameter.copy_(self.average[name])
                    self.average[name].copy_(held)
        return True

    def _targets(self, plan: BatchPlan) -> Tensor:
        """(B, C) shares of a plan's photos."""
        own = self.targets[list(plan.samples)]
        if not plan.partners:
            return own
        shares = torch.tensor(plan.shares, dtype=torch.float32)
        return mix_targets(own, self.targets[list(plan.partners)], shares)

    def _noted(self, plan: BatchPlan, batch: Batch | None) -> BatchPlan:
        """The plan less the photos that could not be read, which are noted."""
        if batch is not None:
            plan, failed = batch.plan, dict(batch.failed)
        else:
            assert self.features is not None
            plan, failed = self.features.readable(plan), self.features.failed
        self.now.failed.update(failed)
        if len(self.now.failed) == len(self.training):
            raise DataError(f"no photo can be read: {min(self.now.failed.items())[1]}")
        return plan

    def _features(self, plan: BatchPlan) -> Tensor:
        assert self.features is not None
        return self.features.of(plan)
