"""Low-rank updates beside frozen linears, and back into them (Hu et al. 2106.09685, section 4.1).

Shapes: (..., K) inputs to (..., N) outputs; r the rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.encoder import Linear
from vitlib.errors import ConfigError
from vitlib.system.torch_state import float64_device
from vitlib.train.config import Tuning
from vitlib.train.optim import HEAD
from vitlib.vit import ViT

_ATTRIBUTES = {"out": "proj"}  # a target's attribute, where it has another name


class LoraLinear(nn.Module):
    """W x + b + (B (A x)) alpha / r: W and b stay, A starts at random and B at 0."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / r
        self.in_features, self.out_features = base.in_features, base.out_features
        base.requires_grad_(False)
        bound = 1 / math.sqrt(base.in_features)  # as the paper's code: nn.Linear's own
        drawn = torch.rand(r, base.in_features, generator=generator, dtype=torch.float32) * 2 - 1
        self.down = nn.Parameter((drawn * bound).to(base.weight))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        low = F.linear(F.linear(x, self.down), self.up)
        return self.base(x) + low * self.scale  # type: ignore[no-any-return]

    def merged(self) -> nn.Linear:
        """The linear that gives the same alone; the sum is taken in float64."""
        with torch.no_grad():
            there = float64_device(self.up.device)
            weights = self.up, self.down, self.base.weight
            up, down, base = (w.to(there, torch.float64) for w in weights)
            self.base.weight.copy_(base + up @ down * self.scale)
        self.base.requires_grad_(True)
        return self.base


def add(model: ViT, tune: Tuning, seed: int) -> None:
    """Put updates beside the linears that `lora_targets` names, freeze all else but the head."""
    if not tune.lora_r:
        return
    for name, parameter in model.named_parameters():
        if not name.startswith(HEAD):
            parameter.requires_grad_(False)
    source = torch.Generator().manual_seed(seed)
    for block in model.blocks[max(tune.layers_to_freeze - 1, 0) :]:
        for target in tune.lora_targets:
            parent = _parent(block, target)
            name = _ATTRIBUTES.get(target, target)
            base: Any = getattr(parent, name, None)
            if type(base) not in (nn.Linear, Linear):
                raise ConfigError(
                    f"lora_targets: {target} is a {type(base).__name__} in a block put in by hand, "
                    "no plain linear: leave it out of lora_targets"
                )
            setattr(parent, name, LoraLinear(base, tune.lora_r, tune.lora_alpha, source))


def merge(model: ViT) -> None:
    """Put every update into its linear; the model is a plain one again."""
    for block in model.blocks:
        for target in ("q", "k", "v", "out", "fc1", "fc2"):
            parent = _parent(block, target)
            name = _ATTRIBUTES.get(target, target)
            part = getattr(parent, name, None)
            if isinstance(part, LoraLinear):
                setattr(parent, name, part.merged())


def _parent(block: Any, target: str) -> Any:
    return getattr(block, "mlp" if target.startswith("fc") else "attn", None)
