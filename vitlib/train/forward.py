"""Logits with a graph, gradients averaged over the processes, and the step: one process or many.

With DDP every process holds all weights and averages gradients while they are computed (Li et al.
2006.15704); with fsdp each holds a part of everything (shards.py).
"""

from __future__ import annotations

from contextlib import nullcontext
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
from vitlib.train.fused_step import pin_attention, plain_forward, train_forward
from vitlib.vit import ViT


class Logits(nn.Module):
    """All that a run computes with the model, as a module: what DDP wraps, and fsdp shares out."""

    def __init__(self, model: ViT, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, x: Tensor, of_head: bool) -> Tensor:
        """(B, C, H, W) pixels, or of_head: what the head reads -> logits (B, num_classes)."""
        if of_head:
            return head_output(self.model, x)
        return train_forward(self.model, x, precision=self.precision)  # type: ignore[arg-type]

    def plain(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> the model's own logits (B, num_classes)."""
        return plain_forward(self.model, pixels, precision=self.precision)  # type: ignore[arg-type]

    def head_input(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> what forward takes as of_head."""
        return head_input(self.model, pixels)


class Forward:
    """What the loop asks of a model in training. Raises ConfigError for a precision that the device
    does not do, and for fsdp in a process alone.

    model: where the weights are while it trains; with fsdp not the one given.
    """

    def __init__(self, model: ViT, config: TrainConfig, world: World) -> None:
        self.given, self.world, precision = model, world, config.run.precision
        device = world.device
        if precision == "fp16" and device.type != "cuda":
            raise ConfigError("precision='fp16' is for CUDA: use bf16 or fp32 here")
        if precision == "bf16" and device.type == "cuda" and not has_bfloat16(device):
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"precision='bf16': {name} has no bfloat16: use fp16 or fp32 here")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.shared = config.run.fsdp
        self.model = fsdp.taken_from(model) if self.shared else model
        self.parts = Logits(self.model, precision)
        self.logits: nn.Module = self.parts
        if self.shared:
            fsdp.share(self.parts, self.model.blocks, world, "plain", "head_input")
        elif world.size > 1:
            ids = [device] if device.type == "cuda" else None
            self.logits = DistributedDataParallel(self.logits, device_ids=ids)

    def __call__(self, x: Tensor, *, last: bool, of_head: bool) -> Tensor:
        """Logits of a pass; gradients are averaged over processes in the `last` of a step."""
        self.last = last
        x = self.world.to_device(x)
        with self._apart():
            return self.logits(x, of_head)  # type: ignore[no-any-return]

    def _apart(self) -> Any:
        if isinstance(self.logits, DistributedDataParallel) and not self.last:
            return self.logits.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a pass, on top of those before."""
        with self._apart(), pin_attention(loss.device):  # blocks may be computed again
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def cut(self, optimizer: torch.optim.Optimizer, longest: float) -> Tensor:
        """Cut the gradients to a length; return the length before, (), on the device."""
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return fsdp.full(nn.utils.clip_grad_norm_(parameters, longest or float("inf")))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's step, and drop the gradients."""
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the run as files hold them; with fsdp for the first process alone."""
        return fsdp.whole(tensors, self.world) if self.shared else tensors

    def close(self) -> ViT:
        """Let go of the processes' group -> the model given, trained; with fsdp, of use at the
        first process alone."""
        if self.shared:
            fsdp.put_back(self.model, self.given, self.world)
        self.model = self.given
        self.logits = self.parts = Logits(self.given, self.parts.precision)
        return self.given

    def plain(self, pixels: Tensor) -> Tensor:
        """Logits of the model as it is used."""
        return self.parts.plain(self.world.to_device(pixels))

    def head_input(self, pixels: Tensor) -> Tensor:
        """What the head reads of pixels."""
        return self.parts.head_input(self.world.to_device(pixels))
