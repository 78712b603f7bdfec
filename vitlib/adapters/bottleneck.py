"""Bottleneck adapters: D -> dim -> D with a residual, behind a branch or beside the MLP.

Sources: Houlsby et al. 1902.00751, figure 2 (behind); Chen et al. 2205.13535, section 3.2 (beside).
Shapes: as in vitlib/encoder.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.encoder import Linear


class BottleneckAdapter(nn.Module):
    """Adapter behind a branch: x + scale * up(gelu(down(x))), with x the output of the branch.

    It stands in the slot of the branch's LayerScale, which it calls first. The up projection starts
    at 0: so does the adapter's output.

    Args:
        base: LayerScale of the branch; None where the model has none.
        like: A tensor of the dtype and on the device that the adapter gets.
        width: Channels of the branch, D.
        dim: Channels of the bottleneck.
        scale: Factor of the adapter's output.
    """

    def __init__(
        self, base: nn.Module | None, like: Tensor, width: int, dim: int, scale: float
    ) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        # The constructors initialise nothing on the meta device.
        self.down = Linear(width, dim, device=like.device, dtype=like.dtype)
        self.up = Linear(dim, width, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Adapt the output of a branch, (B, Q, D) -> (B, Q, D).

        Args:
            x: Output of the branch, (B, Q, D).
        """
        x = x if self.base is None else self.base(x)
        return x + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """Compute the adapter's own output, (B, Q, D) -> (B, Q, D).

        Args:
            x: Input of the down projection, (B, Q, D).
        """
        # A training step in bfloat16 leaves autocast before the residual.
        return self.up(self.activate(self.down(x.to(self.down.weight.dtype)))) * self.scale

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation.

        Args:
            x: Output of the down projection, (B, Q, dim).
        """
        return F.gelu(x)


class ParallelAdapter(BottleneckAdapter):
    """Adapter beside the MLP: mlp(x) + scale * up(relu(down(x))), with x the tokens after norm2."""

    base: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Run the MLP and the adapter beside it, (B, Q, D) -> (B, Q, D).

        Args:
            x: Normalised tokens, (B, Q, D).
        """
        output: Tensor = self.base(x)
        return output + self.update(x)

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation.

        Args:
            x: Output of the down projection, (B, Q, dim).
        """
        return F.relu(x)
