"""Logits with a graph, averaged gradients, and the optimizer's step: one process or many.

With DDP every process holds all weights, and gradients are averaged while they are computed (Li et
al. 2006.15704). With FSDP each process holds a shard of everything (fsdp.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitlib.errors import ConfigError
from vitlib.fast.cuda_attention import has_bfloat16
from vitlib.train import fsdp
from vitlib.train.config import TrainConfig
from vitlib.train.distributed import World
from vitlib.train.feature_cache import head_input, head_output
from vitlib.train.fused_step import eval_forward, pin_attention, train_forward
from vitlib.train.settings import Precision
from vitlib.vit import ViT


class Logits(nn.Module):
    """Every computation of a run with the model, as one module for DDP and FSDP to wrap."""

    def __init__(self, model: ViT, precision: Precision) -> None:
        """Wrap a model.

        Args:
            model: The model.
            precision: Precision of training.
        """
        super().__init__()
        self.model = model
        self.precision: Precision = precision

    def forward(self, x: Tensor, is_head_input: bool) -> Tensor:
        """Compute logits with a graph.

        Args:
            x: Pixels (B, C, H, W), or the result of head_input.
            is_head_input: x is the result of head_input.

        Returns:
            (B, num_classes).
        """
        if is_head_input:
            return head_output(self.model, x)
        return train_forward(self.model, x, precision=self.precision)

    def evaluate(self, pixels: Tensor) -> Tensor:
        """Compute the model's own logits, without the fused forward of training.

        Args:
            pixels: (B, C, H, W).

        Returns:
            (B, num_classes).
        """
        return eval_forward(self.model, pixels, precision=self.precision)

    def head_input(self, pixels: Tensor) -> Tensor:
        """Compute what forward takes with is_head_input.

        Args:
            pixels: (B, C, H, W).

        Returns:
            See feature_cache.head_input.
        """
        return head_input(self.model, pixels)


class TrainingModel:
    """The model of a run in this process: forward, backward and the optimizer's step.

    Attributes:
        model: Module that holds the weights while it trains; with FSDP a copy of the caller's.
    """

    def __init__(self, model: ViT, config: TrainConfig, world: World) -> None:
        """Wrap a model for DDP or FSDP.

        Args:
            model: The caller's model.
            config: Its precision and fsdp.
            world: The processes.

        Raises:
            ConfigError: The device does not support the precision, or fsdp is set in a process that
                torchrun did not start.
        """
        self.caller_model, self.world, precision = model, world, config.run.precision
        device = world.device
        if precision == "fp16" and device.type != "cuda":
            raise ConfigError("precision='fp16' is for CUDA: use bf16 or fp32 here")
        if precision == "bf16" and device.type == "cuda" and not has_bfloat16(device):
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"precision='bf16': {name} has no bfloat16: use fp16 or fp32 here")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.is_sharded = config.run.fsdp
        self.model = fsdp.move_parameters(model) if self.is_sharded else model
        self.logits = Logits(self.model, precision)
        self.wrapped: nn.Module = self.logits
        if self.is_sharded:
            fsdp.shard(self.logits, self.model.blocks, world, "evaluate", "head_input")
        elif world.size > 1:
            ids = [device] if device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.logits, device_ids=ids)

    def __call__(self, x: Tensor, *, is_last: bool, is_head_input: bool) -> Tensor:
        """Compute the logits of a micro-batch.

        Args:
            x: Pixels (B, C, H, W), or the result of head_input.
            is_last: This is the last micro-batch of a step; its backward averages gradients over
                the processes.
            is_head_input: x is the result of head_input.

        Returns:
            (B, num_classes).
        """
        self.is_last = is_last
        x = self.world.to_device(x)
        with self._sync_context():
            logits: Tensor = self.wrapped(x, is_head_input)
        return logits

    def _sync_context(self) -> AbstractContextManager[Any]:
        """Return DDP's no_sync() for all but the last micro-batch, which then averages once."""
        if isinstance(self.wrapped, DistributedDataParallel) and not self.is_last:
            return self.wrapped.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch.

        Args:
            loss: ().
        """
        # Checkpointed blocks compute their forward again in here, with the same kernels.
        with self._sync_context(), pin_attention(loss.device):
            scaled: Any = self.scaler.scale(loss)
            scaled.backward()

    def clip_gradients(self, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Clip the gradients by their norm.

        Args:
            optimizer: Its parameters' gradients are scaled in place.
            max_norm: Largest norm; 0 for no limit.

        Returns:
            The norm before clipping, (), on the device.
        """
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return fsdp.full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's step and drop the gradients.

        Args:
            optimizer: The optimizer.
        """
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def gather_full(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return full tensors for a file.

        Args:
            tensors: Tensors of the run.

        Returns:
            The same without FSDP; with it, full tensors in the first process alone.
        """
        return fsdp.gather_full(tensors, self.world) if self.is_sharded else tensors

    def close(self) -> ViT:
        """Drop every reference to the process group.

        Returns:
            The caller's model, trained; with FSDP it has weights in the first process alone.
        """
        if self.is_sharded:
            fsdp.restore_parameters(self.model, self.caller_model, self.world)
        self.model = self.caller_model
        self.wrapped = self.logits = Logits(self.caller_model, self.logits.precision)
        return self.caller_model

    def evaluate(self, pixels: Tensor) -> Tensor:
        """Compute the model's own logits.

        Args:
            pixels: (B, C, H, W) on any device.

        Returns:
            (B, num_classes).
        """
        return self.logits.evaluate(self.world.to_device(pixels))

    def head_input(self, pixels: Tensor) -> Tensor:
        """Compute the input of the head.

        Args:
            pixels: (B, C, H, W) on any device.

        Returns:
            See feature_cache.head_input.
        """
        return self.logits.head_input(self.world.to_device(pixels))
