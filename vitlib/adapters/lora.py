"""LoRA: trainable low-rank updates of frozen linear layers (Hu et al. 2106.09685, section 4.1).

Shapes: (..., K) inputs to (..., N) outputs; r the rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.encoder import Linear
from vitlib.system.torch_state import float64_device


class LoraLinear(nn.Module):
    """W x + b + (B (A x)) alpha / r: W and b are frozen, A starts at random and B at 0."""

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        alpha: float,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Wrap a linear layer.

        Args:
            base: The layer, which is frozen.
            r: Rank of the update.
            alpha: The update is scaled by alpha / r.
            generator: Source of A's first values; None: torch's global one.
            device: Device of the update; None: that of the layer. On "meta" nothing is drawn.
        """
        super().__init__()
        self.base, self.scale = base, alpha / r
        self.in_features, self.out_features = base.in_features, base.out_features
        base.requires_grad_(False)
        self.down = nn.Parameter(base.weight.new_zeros(r, base.in_features, device=device))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, r, device=device))
        if not self.down.is_meta:
            # As in the paper's code: nn.Linear's own.
            bound = 1 / math.sqrt(base.in_features)
            shape = self.down.shape
            noise = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            with torch.no_grad():
                self.down.copy_((noise * 2 - 1) * bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its update.

        Args:
            x: (..., K).

        Returns:
            (..., N).
        """
        output: Tensor = self.base(x)
        return output + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """Compute the update alone.

        Args:
            x: (..., K).

        Returns:
            (..., N).
        """
        return F.linear(F.linear(x, self.down), self.up) * self.scale

    def merged_weight(self) -> Tensor:
        """Add the update to the weights, in float64.

        Returns:
            The sum, (N, K) float64.
        """
        device = float64_device(self.up.device)
        weights = self.up, self.down, self.base.weight
        up, down, base = (w.detach().to(device, torch.float64) for w in weights)
        return base + up @ down * self.scale

    def merge(self) -> nn.Linear:
        """Write the merged weights into the layer.

        Returns:
            The base layer, which alone now computes the same and trains again.
        """
        with torch.no_grad():
            self.base.weight.copy_(self.merged_weight())
        self.base.requires_grad_(True)
        return self.base


def is_wrappable(layer: object) -> bool:
    """Return True for a layer whose arithmetic LoraLinear knows.

    Args:
        layer: Any object.
    """
    return type(layer) in (nn.Linear, Linear)


def layer_parent(block: nn.Module, name: str) -> nn.Module | None:
    """Return the module of a block that has a linear layer.

    Args:
        block: A block.
        name: Attribute of the layer: q, k, v, proj, fc1 or fc2.

    Returns:
        Its attention or MLP; None for a custom block without.
    """
    parent = getattr(block, "mlp" if name.startswith("fc") else "attn", None)
    return parent if isinstance(parent, nn.Module) else None
