"""The training loop: photos -> pixels -> logits -> loss -> gradients -> weights, step by step.

How data flows: sampler.py plans the photos of a step and the part of each process. loader/ makes
pixels of them, a micro-batch at a time. fused_step/ computes logits with a graph. losses.py sums
the loss and divides it by the weight of the whole step, so that the number of micro-batches and
processes makes no difference. Gradients are averaged over the processes and clipped, and the
optimizer takes its step. After some epochs, metrics of the validation set choose the best
checkpoint.

A step is a function of the weights, the optimizer's state and its own number. So a run resumes from
those three alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlib import dropout, metrics
from vitlib.config_parts import Regularization
from vitlib.data import LabelledPhotos
from vitlib.errors import ConfigError, DataError, TrainError
from vitlib.image.processor import ImageProcessor
from vitlib.scores import logits_to_scores
from vitlib.system.heap import hold_heap
from vitlib.system.interrupt import defer_interrupt
from vitlib.system.progress import progress_bar
from vitlib.train import optim, resume
from vitlib.train.augment import Augment
from vitlib.train.config import TrainConfig
from vitlib.train.distributed import World
from vitlib.train.ema import WeightAverage
from vitlib.train.evaluations import Evaluation, due_steps, list_evaluations
from vitlib.train.feature_cache import FeatureCache
from vitlib.train.loader.loader import Batch, PhotoLoader, create_loader
from vitlib.train.loader.photos import pixel_size
from vitlib.train.log import MetricsLog
from vitlib.train.losses import build_criterion, to_soft_targets
from vitlib.train.mix import mix_targets
from vitlib.train.sampler import BatchPlan, BatchSampler
from vitlib.train.trainer_state import TrainerState, check_metric
from vitlib.train.training_model import TrainingModel
from vitlib.vit import ViT

_MIN_WEIGHT = 1e-12  # divides the loss of a step in which every sample has a weight of 0


class Trainer:
    """A run in one of its processes.

    Attributes:
        model: Module that holds the weights; with FSDP a copy of the caller's until run() ends.
        state: Progress of the run.
        sampler: Photos of each step.
        log: Metrics of the run.
    """

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
        on_evaluation: Callable[[Evaluation], object] | None = None,
    ) -> None:
        """Prepare a run; nothing is written and no photo is read.

        Args:
            model: The model, with a head for the labels, on the device of the world.
            training: The training set.
            validation: The validation set; None for no evaluation.
            processor: The model's preprocessing.
            config: Settings of the run.
            out: Folder of the run.
            world: The processes.
            progress: Show a progress bar.
            on_evaluation: Called in the first process after each evaluation.

        Raises:
            ConfigError: The settings do not fit the model, the sets or the device.
        """
        self.model, self.config, self.out, self.world = model, config, out, world
        self.training, self.validation, self.processor = training, validation, processor
        self.show_progress = progress and world.is_first
        self.on_evaluation = on_evaluation if world.is_first else None
        if validation is not None and config.tune.start_share:
            raise ConfigError(
                "start_share averages weights after the run, which no validation set would measure:"
                " leave it out, or train without (validation_split=0)"
            )
        self.metric = config.run.metric_for_best_model or metrics.PRIMARY[training.task]
        check_metric(self.metric, validation, model.num_classes, config.run)
        self.targets = to_soft_targets(training.targets(), model.num_classes)
        self.criterion = build_criterion(config.loss, self.targets, training.task)
        self.device_criterion = self.criterion.move_weights(world.to_device)
        self.frozen_checksum = resume.checksum_frozen(model)
        self.training_model = TrainingModel(model, config, world)
        self.model = model = self.training_model.model
        self.optimizer = optim.create_optimizer(model, config.optim)
        self.sampler = BatchSampler.from_config(
            config, len(training), world.size, pixel_size(processor)
        )
        augment = None if config.augment == Augment.none() else config.augment
        pin = world.device.type == "cuda"
        self.train_loader = create_loader(training, processor, augment, config.run, pin)
        self.eval_loader: PhotoLoader | None = None
        if validation is not None:
            self.eval_loader = create_loader(validation, processor, None, config.run, pin)
        self.features: FeatureCache | None = None
        if self._has_constant_features():
            compute = self.training_model.head_input
            self.features = FeatureCache(model, self.train_loader, compute, progress)
        self.ema = WeightAverage(model, config.tune.ema_decay)
        self.log = MetricsLog(out, world.is_first, config.run.tensorboard)
        self.state = TrainerState()

    def run(self) -> TrainerState:
        """Take every step that is left.

        Ctrl-C ends the run after the step or evaluation in progress, with a checkpoint.

        Returns:
            The state at the end.

        Raises:
            KeyboardInterrupt: Ctrl-C ended it.
            TrainError: The loss is no longer a number, or a reader process has ended.
            DataError: A photo cannot be read.
        """
        self.log.start(self.state.step)
        total, first, start = self.sampler.total_steps, self.state.step, time.perf_counter()
        with (
            self.train_loader,
            self.eval_loader or nullcontext(),
            hold_heap(),
            defer_interrupt(self.world.size == 1) as interrupt,
        ):
            batches = self._iter_batches()
            with progress_bar(total - self.state.step, self.show_progress, "step") as advance:
                while self.state.step < total and not self.state.stopped_early:
                    self._train_step(self.sampler.plan_step(self.state.step), batches)
                    advance(1)
                    stops = interrupt.is_set()
                    if self._after_step(total, is_last=stops) and self.on_evaluation is not None:
                        pace = (time.perf_counter() - start) / (self.state.step - first)
                        left = pace * (total - self.state.step) * (not self.state.stopped_early)
                        self.on_evaluation(replace(self.list_evaluations()[-1], seconds_left=left))
                    if stops:
                        raise KeyboardInterrupt
        self.log.close()
        # With FSDP these hold shards, and through them the process group, which must die first.
        self.model, self.features = self.training_model.close(), None
        del self.optimizer, self.ema
        return self.state

    def list_evaluations(self) -> list[Evaluation]:
        """List the evaluations so far; with a linear probe, that of the start as well."""
        per_epoch, total = self.sampler.steps_per_epoch, self.sampler.total_steps
        due = due_steps(self.state.step, total, per_epoch * self.config.run.eval_epochs)
        due[:0] = [0] * self.config.tune.linear_probe
        return list_evaluations(
            self.log.events, due, per_epoch, total / per_epoch, self.metric, self.state.best_step
        )

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one.

        Raises:
            TrainError: The checkpoint is damaged, of another format, or of another model.
        """
        checkpoints = resume.list_checkpoints(self.out)
        if not checkpoints:
            return
        tensors, state = resume.load_checkpoint(checkpoints[max(checkpoints)])
        if state.get("frozen_checksum") != self.frozen_checksum:
            raise TrainError("the model's frozen weights are not those of the run: it had another")
        resume.restore_tensors(tensors, self.model, self.ema.averages, self.optimizer)
        self.training_model.scaler.load_state_dict(state["scaler"])
        self.state = TrainerState.from_json(state["trainer_state"])

    def load_best_weights(self) -> None:
        """Load the best checkpoint's weights, or their averages with EMA, into the model.

        With start_share they are then averaged with those of the start.
        """
        checkpoints = resume.list_checkpoints(self.out)
        best = self.state.best_step
        tensors, _ = resume.load_checkpoint(
            checkpoints[best if best in checkpoints else max(checkpoints)]
        )
        prefix = "ema/" if self.config.tune.ema_decay else "model/"
        # A custom head is not fitted, so that its run has no start to average with.
        share = self.config.tune.start_share if 0 in checkpoints else 0.0
        start = resume.load_checkpoint(checkpoints[0])[0] if share else {}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[prefix + name])
                    if share:
                        parameter.lerp_(start[prefix + name].to(parameter.device), share)

    def _has_constant_features(self) -> bool:
        """Return True if the head's input is the same in every epoch."""
        return (
            self.config.tune.head_only
            and self.config.augment == Augment.none()
            and self.model.config.regularization == Regularization()
        )

    def _iter_batches(self) -> Iterator[Batch]:
        """Yield every micro-batch of this process; nothing if features are cached."""
        if self.features is not None:
            return iter(())
        plans = self.sampler.iter_micro_batches(self.state.step, self.world.rank)
        return self.train_loader.batches(plans)

    def _train_step(self, plan: BatchPlan, batches: Iterator[Batch]) -> None:
        """Compute the gradients of a step and take it; only _update waits for a GPU."""
        start, model = time.perf_counter(), self.model
        model.train()
        weight = self.criterion.weight(self._batch_targets(plan))
        micro_plans = self.sampler.split_step(plan, self.world.rank)
        losses: list[Tensor] = []
        # DDP and FSDP divide the sum of gradients by the number of processes.
        scale = self.world.size / max(weight, _MIN_WEIGHT)
        for index, micro_plan in enumerate(micro_plans):
            batch = None if self.features is not None else next(batches)
            readable = self._drop_unreadable(micro_plan, batch)
            # train_forward computes one blank image for an empty batch, which has a key too.
            keys = dropout.sample_keys(self.config.run.seed, plan.epoch, readable.samples or (0,))
            dropout.set_keys(model, self.world.to_device(keys))
            if batch is None:
                assert self.features is not None
                inputs = self.features.gather(readable)
            else:
                inputs = batch.pixels
            logits = self.training_model(
                inputs, is_last=index == len(micro_plans) - 1, is_head_input=batch is None
            )
            targets = self.world.to_device(self._batch_targets(readable))
            loss = self.device_criterion.sum(logits, targets)
            self.training_model.backward(loss * scale)
            losses.append(loss.detach())
        dropout.set_keys(model, None)
        self._update(plan, losses, weight, start)

    def _update(self, plan: BatchPlan, losses: list[Tensor], weight: float, start: float) -> None:
        """Take the optimizer's step if the loss is finite, and log it.

        The losses and the gradients' norm are read together, once the last kernel of the backward
        pass is queued. This is the only time that a step waits for a GPU.
        """
        number = plan.step + 1
        norm = self.training_model.clip_gradients(self.optimizer, self.config.optim.max_grad_norm)
        total, norm_value = self.world.read_step(losses, norm)
        loss = total / max(weight, _MIN_WEIGHT)
        if not math.isfinite(loss):
            self.optimizer.zero_grad(set_to_none=True)
            raise self._divergence(f"the loss is {loss}", number)
        factor = optim.lr_factor(plan.step, self.sampler.total_steps, self.config)
        optim.set_learning_rate(self.optimizer, factor, self.config)
        self.training_model.step(self.optimizer)
        self.state.step = number
        self.ema.update(self.model, number)
        self.log.write(
            {
                "event": "train",
                "step": number,
                "epoch": number / self.sampler.steps_per_epoch,
                "loss": loss,
                "learning_rate": optim.max_learning_rate(self.optimizer),
                "grad_norm": norm_value,
                "samples": len(plan.samples),
                "seconds": time.perf_counter() - start,
            }
        )

    def _divergence(self, problem: str, step: int) -> TrainError:
        """Return the error for a loss or logits that are not finite."""
        steps = resume.list_checkpoints(self.out)
        remaining = f"the checkpoint of step {max(steps)} is kept" if steps else "no checkpoint yet"
        return TrainError(
            f"{problem} at step {step} of {self.sampler.total_steps}: {remaining}; try a lower "
            f"learning_rate than {self.config.optim.learning_rate:g}, a longer warm-up or "
            "max_grad_norm"
        )

    def _after_step(self, total: int, is_last: bool) -> bool:
        """Evaluate if it is due, save a checkpoint then or at the last step; return the first."""
        step, per_epoch, run = self.state.step, self.sampler.steps_per_epoch, self.config.run
        is_due = step == total or step % (per_epoch * run.eval_epochs) == 0
        if is_due:
            for errors in self.world.all_gather(self.state.train_errors):
                self.state.train_errors.update(errors)
            self.evaluate()
        if is_due or is_last or (run.save_steps and step % run.save_steps == 0):
            self.save()
        return is_due

    def save(self) -> None:
        """Write a checkpoint and the table of metrics."""
        tensors = resume.collect_tensors(self.model, self.ema.averages, self.optimizer)
        tensors = self.training_model.gather_full(tensors)
        with self.world.on_first() as is_first:
            if not is_first:
                return
            steps = sorted([*resume.list_checkpoints(self.out), self.state.step])
            keep = {*steps[-self.config.run.save_total_limit :], self.state.best_or_last}
            keep |= {0} if self.config.tune.start_share else set()
            state = {
                "trainer_state": vars(self.state),
                "frozen_checksum": self.frozen_checksum,
                "scaler": self.training_model.scaler.state_dict(),
            }
            resume.write_checkpoint(self.out, self.state.step, tensors, state, keep)
            self.log.write_table()

    def evaluate(self) -> None:
        """Evaluate the validation set, and update the best step and the patience."""
        if self.eval_loader is None or self.validation is None:
            return
        start = time.perf_counter()
        scores, rows, loss = self._predict(self.eval_loader, self.validation)
        targets = self.validation.targets()[rows]
        values = {"loss": loss, **metrics.task_metrics(targets, scores, self.validation.task)}
        state = self.state
        state.record_evaluation(values[self.metric], loss, self.metric, self.config.run)
        epoch = state.step / self.sampler.steps_per_epoch
        event = {"event": "eval", "step": state.step, "epoch": epoch, **values}
        self.log.write({**event, "seconds": time.perf_counter() - start})

    def _predict(self, loader: PhotoLoader, photos: LabelledPhotos) -> tuple[Any, Any, float]:
        """Return scores (N, C) of the readable photos, their indices (N,), and their mean loss."""
        self.model.eval()
        size = self.config.run.per_device_eval_batch_size
        # With FSDP every forward gathers weights from all processes, so each must run as often.
        # Processes without a photo left compute one again, and its double is dropped below.
        last = len(photos) + (
            -len(photos) % self.world.size if self.training_model.is_sharded else 0
        )
        indices = [i % len(photos) for i in range(self.world.rank, last, self.world.size)]
        logits, samples, errors = [], [], self.state.eval_errors
        with self.ema.swap_in(self.model), torch.inference_mode():
            for batch in loader.evaluation_batches(size, indices):
                samples += list(batch.samples)
                errors.update(batch.failed)
                logits.append(self.training_model.evaluate(batch.pixels).float())
        empty = torch.empty(0, self.model.num_classes, dtype=torch.float32)
        # One copy for all batches, as each copy waits for a GPU.
        local_logits = torch.cat(logits).cpu() if logits else empty
        parts = self.world.all_gather((local_logits, samples, errors))
        all_samples = np.array([n for _, part, _ in parts for n in part], np.int64)
        rows, first = np.unique(all_samples, return_index=True)
        all_logits = torch.cat([part for part, _, _ in parts])[torch.from_numpy(first)]
        for *_, part_errors in parts:
            errors.update(part_errors)
        if not len(rows):
            raise DataError(f"no photo of the validation set can be read: {min(errors.items())[1]}")
        if not all_logits.isfinite().all():
            raise self._divergence("the model's logits are not finite", self.state.step)
        targets = to_soft_targets(photos.targets(), self.model.num_classes)[torch.from_numpy(rows)]
        unweighted = type(self.criterion)(photos.task)
        total = unweighted.sum(all_logits, targets).item()
        loss = total / max(unweighted.weight(targets), _MIN_WEIGHT)
        return logits_to_scores(all_logits, photos.task).numpy(), rows, loss

    def _batch_targets(self, plan: BatchPlan) -> Tensor:
        """Return the targets (B, C) of a plan's photos, mixed like the photos."""
        targets = self.targets[list(plan.samples)]
        if not plan.partners:
            return targets
        weights = torch.tensor(plan.weights, dtype=torch.float32)
        return mix_targets(targets, self.targets[list(plan.partners)], weights)

    def _drop_unreadable(self, plan: BatchPlan, batch: Batch | None) -> BatchPlan:
        """Return a plan without unreadable photos, and record these."""
        if batch is not None:
            plan, errors = batch.plan, dict(batch.failed)
        else:
            assert self.features is not None
            plan, errors = self.features.drop_unreadable(plan), self.features.errors
        self.state.train_errors.update(errors)
        if len(self.state.train_errors) == len(self.training):
            raise DataError(f"no photo can be read: {min(self.state.train_errors.items())[1]}")
        return plan
