"""LoRA: trainable low-rank updates of frozen linear layers (Hu et al. 2106.09685, section 4.1).

At the end of a run the updates are merged into the weights, so the checkpoint has no trace of them.

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
from vitlib.train.optim import HEAD
from vitlib.train.settings import Tuning
from vitlib.vit import ViT

# Names in lora_targets -> attributes of a block's attn or mlp.
_ATTRIBUTES = {"q": "q", "k": "k", "v": "v", "out": "proj", "fc1": "fc1", "fc2": "fc2"}


class LoraLinear(nn.Module):
    """W x + b + (B (A x)) alpha / r: W and b are frozen, A starts at random and B at 0."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator) -> None:
        """Wrap a linear layer.

        Args:
            base: The layer, which is frozen.
            r: Rank of the update.
            alpha: The update is scaled by alpha / r.
            generator: Source of A's first values.
        """
        super().__init__()
        self.base, self.scale = base, alpha / r
        self.in_features, self.out_features = base.in_features, base.out_features
        base.requires_grad_(False)
        # As in the paper's code: nn.Linear's own.
        bound = 1 / math.sqrt(base.in_features)
        noise = torch.rand(r, base.in_features, generator=generator, dtype=torch.float32) * 2 - 1
        self.down = nn.Parameter((noise * bound).to(base.weight))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its update.

        Args:
            x: (..., K).

        Returns:
            (..., N).
        """
        low = F.linear(F.linear(x, self.down), self.up)
        output: Tensor = self.base(x)
        return output + low * self.scale

    def merge(self) -> nn.Linear:
        """Add the update to the weights, in float64.

        Returns:
            The base layer, which alone now computes the same and trains again.
        """
        with torch.no_grad():
            device = float64_device(self.up.device)
            weights = self.up, self.down, self.base.weight
            up, down, base = (w.to(device, torch.float64) for w in weights)
            self.base.weight.copy_(base + up @ down * self.scale)
        self.base.requires_grad_(True)
        return self.base


def add_updates(model: ViT, tune: Tuning, seed: int) -> None:
    """Wrap the layers of lora_targets, and freeze all else but the head.

    Args:
        model: Changed in place.
        tune: Its lora_* settings; a rank of 0 does nothing.
        seed: Seed of the first values.

    Raises:
        ConfigError: A target is no linear layer in some block.
    """
    if not tune.lora_r:
        return
    for name, parameter in model.named_parameters():
        if not name.startswith(HEAD):
            parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks[max(tune.layers_to_freeze - 1, 0) :]:
        for target in tune.lora_targets:
            parent, name = _parent(block, target), _ATTRIBUTES[target]
            base: Any = getattr(parent, name, None)
            if type(base) not in (nn.Linear, Linear):
                raise ConfigError(
                    f"lora_targets: {target} is a {type(base).__name__} in a block put in by hand, "
                    "no plain linear: leave it out of lora_targets"
                )
            setattr(parent, name, LoraLinear(base, tune.lora_r, tune.lora_alpha, generator))


def merge_updates(model: ViT) -> None:
    """Merge every update into its layer, which removes all LoraLinear modules.

    Args:
        model: Changed in place.
    """
    for block in model.blocks:
        for target, name in _ATTRIBUTES.items():
            parent = _parent(block, target)
            layer = getattr(parent, name, None)
            if isinstance(layer, LoraLinear):
                setattr(parent, name, layer.merge())


def _parent(block: Any, target: str) -> Any:
    """Return the module of a block that has the target layer; None for a custom block."""
    return getattr(block, "mlp" if target.startswith("fc") else "attn", None)
