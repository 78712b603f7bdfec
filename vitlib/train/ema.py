"""Exponential moving average of the weights (EMA; Tarvainen and Valpola 1703.01780).

The averages are evaluated and saved in place of the weights; training goes on from the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of a model's trainable weights.

    Attributes:
        averages: Averages by the parameter's name; empty with a decay of 0.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the present weights.

        Args:
            model: The model.
            decay: Decay of a step, 0 to 1; 0 for no averages.
        """
        self.decay = decay
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.averages: dict[str, Tensor] = {}
        if decay:
            self.averages = {n: p.detach().clone() for n, p in trainable.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the weights.

        Args:
            model: The model.
            step: Steps taken, at least 1.
        """
        if not self.averages:
            return
        # A ramp: with the full decay, the random first weights of the head would stay for long.
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if name in self.averages:
                self.averages[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def swap_in(self, model: nn.Module) -> Iterator[None]:
        """Put the averages into the model while the context is open.

        Args:
            model: The model; its weights take the averages' place meanwhile.

        Yields:
            Nothing.
        """
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        """Exchange weights and averages in place, so that the optimizer keeps its parameters."""
        for name, parameter in model.named_parameters():
            if name in self.averages:
                weights = parameter.detach().clone()
                parameter.copy_(self.averages[name])
                self.averages[name].copy_(weights)
