"""Types that a zoo passes to the census: its cases, and the outputs of its own library."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One model of a zoo.

    Attributes:
        name: A tag, the name of a config or a variant. It is unique in its zoo and the same in
            every run.
        architecture: The library's name of the model. The page groups rows by it.
        expected: "equal" or "refused", as vitlib's tables predict for the library's own folder.
        also: Further names of the zoo that this case stands for. Their folders have the same
            tensors, and their configs differ in preprocessing alone.
    """

    name: str
    architecture: str
    expected: str = "equal"
    also: tuple[str, ...] = ()


@dataclass
class ReferenceOutputs:
    """Outputs that the library computes in float32 from its saved weights.

    An output is None if vitlib has none to compare with it.

    Attributes:
        pixels: (2, C, H, W), the input: normally distributed, seeded by the case's name.
        logits: (2, num_classes), if the model has a head.
        pooled: (2, F), the input of the head.
        tokens: (2, T, D), all tokens after the final norm, prefix tokens first.
    """

    pixels: Tensor
    logits: Tensor | None = None
    pooled: Tensor | None = None
    tokens: Tensor | None = None
