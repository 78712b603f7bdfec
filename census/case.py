"""What a zoo gives the census: cases, and the numbers that its own library computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One model of a zoo.

    Attributes:
        name: A tag, the name of a config or a variant; unique in its zoo and the same every run.
        architecture: The library's name of the model; rows are grouped by it.
        expected: "equal" or "refused", as vitlib's tables promise for the library's own folder.
        also: Further names of the zoo that this case stands for: their folders have the same
            tensors, and a config that differs in preprocessing alone.
    """

    name: str
    architecture: str
    expected: str = "equal"
    also: tuple[str, ...] = ()


@dataclass
class Answer:
    """What the library computes in float32 from the weights that it saved; None: not comparable.

    Attributes:
        pixels: (2, C, H, W), normal, seeded by the case's name.
        logits: (2, num_classes), where the model has a head.
        pooled: (2, F), what the head reads.
        tokens: (2, T, D), every token after the final norm, prefix tokens first.
    """

    pixels: Tensor
    logits: Tensor | None = None
    pooled: Tensor | None = None
    tokens: Tensor | None = None
