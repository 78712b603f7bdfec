"""A difference between two modules at one point, and what every search for its cause needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.testing.distance import relative_distance
from vitlib.testing.outputs import to_float64
from vitlib.testing.states import States, Subject

TOKENS = ("embed", "resid_pre", "resid_mid", "resid")  # points of the residual stream
EQUAL = 1e-5  # positions computed in float32 differ by less, in models run in float64
_EXPLAINED = 0.05  # share of a difference that may remain once its cause is removed


@dataclass(frozen=True)
class Case:
    """The first point that differs, and both modules in float64.

    Attributes:
        point: Name of the point.
        model: The model.
        reference: The reference.
        a: Tensors of the model by name.
        b: Tensors of the reference by name.
        images: The images of both, (B, C, H, W).
    """

    point: str
    model: Subject
    reference: Subject
    a: States
    b: States
    images: Tensor

    @property
    def prefix(self) -> str:
        """Prefix of the names of the block, with its dot; empty outside of blocks."""
        return ".".join(self.point.split(".")[:2]) + "." if self.point[:7] == "blocks." else ""

    @property
    def kind(self) -> str:
        """Name of the point without its block."""
        return self.point[len(self.prefix) :]

    @property
    def index(self) -> int:
        """Number of the block; -1 outside of blocks."""
        return int(self.point.split(".")[1]) if self.prefix else -1

    @property
    def depth(self) -> int:
        """Number of blocks of the deeper module."""
        return max(self.model.depth, self.reference.depth)

    @property
    def eps(self) -> float:
        """Relative distance of equal weights that a coarse dtype rounded in two forms."""
        return max(self.model.eps, self.reference.eps)

    def pair(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the tensors of both modules at a point of the same block.

        Args:
            name: Name of the point without the block.

        Returns:
            Both tensors; None where one module does not show it.
        """
        full = self.prefix + name
        return (self.a[full], self.b[full]) if full in self.a and full in self.b else None

    def sides(self) -> Iterator[Side]:
        """Yield both orders of the modules: each as the one that is changed to be as the other."""
        name = self.point
        yield Side(self, self.model, self.reference, self.a, self.b, self.a[name], self.b[name])
        yield Side(self, self.reference, self.model, self.b, self.a, self.b[name], self.a[name])


@dataclass(frozen=True)
class Side:
    """A module that is changed by way of trial, and the other, which the change has to explain.

    Attributes:
        case: The difference.
        own: The module that is changed.
        other: The other module.
        states: Tensors of `own` by name.
        others: Tensors of `other` by name.
        x: The tensor of `own` that differs.
        y: That of `other`.
    """

    case: Case
    own: Subject
    other: Subject
    states: States
    others: States
    x: Tensor
    y: Tensor

    def explains(self, candidate: Tensor | None) -> bool:
        """Return True if a changed tensor of `own` is that of `other`.

        Args:
            candidate: The changed tensor; None counts as no explanation.
        """
        if candidate is None or candidate.shape != self.y.shape:
            return False
        left = relative_distance(candidate, self.y)
        return left <= _EXPLAINED * min(relative_distance(self.x, self.y), 1.0)

    def state(self, name: str) -> Tensor | None:
        """Return a tensor of `own` in the same block.

        Args:
            name: Name of the point without the block.
        """
        return self.states.get(self.case.prefix + name)

    def block(self) -> Any:
        """Return the block of `own`, if that is a ViT of vitlib."""
        vit = self.own.vit
        return None if vit is None or self.case.index < 0 else vit.blocks[self.case.index]


def near(x: Tensor | None, y: Tensor | None) -> bool:
    """Return True if two tensors of float64 runs are equal to rounding in float32.

    Args:
        x: A tensor, or None, which is near nothing.
        y: The tensor that it may be equal to.
    """
    return x is not None and y is not None and relative_distance(x, y) < EQUAL


def match_rows(x: Tensor, y: Tensor) -> list[int] | None:
    """Find the order in which the rows of a matrix are those of another.

    Args:
        x: (T, D).
        y: (T, D).

    Returns:
        The row of `x` that each row of `y` is; None where there is no such order, or no other.
    """
    if x.shape != y.shape:
        return None
    order = torch.cdist(y, x).argmin(dim=1)
    numbers = order.tolist()
    is_order = sorted(numbers) == [*range(len(x))] and numbers != [*range(len(x))]
    return numbers if is_order and near(x[order], y) else None


def differ_in_parameters(case: Case, label: str) -> str | None:
    """Compare weight and bias of the layers whose outputs differ.

    Args:
        case: The difference.
        label: Name of the layer, for the message.

    Returns:
        A sentence, or None where a layer is unknown or both are equal.
    """
    a, b = case.model.part(case.point), case.reference.part(case.point)
    if not isinstance(getattr(a, "weight", None), Tensor) or not hasattr(b, "weight"):
        text = differ_by_offset(case)
        return None if text is None else f"{label}, {text}"
    for name in ("bias", "weight"):
        x, y = getattr(a, name, None), getattr(b, name, None)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            if isinstance(x, Tensor) != isinstance(y, Tensor):
                role = "model" if x is None else "reference"
                return f"{label}, {name}: the {role} has none"
            continue
        text = _compare_parameter(name, to_float64(x), to_float64(y), case.eps)
        if text is not None:
            return _find_block(case, name) or f"{label}, {text}"
    return None


def _find_block(case: Case, name: str) -> str | None:
    """Look for a parameter of the model in the other blocks of the reference."""
    x = getattr(case.model.part(case.point), name, None)
    for index in range(case.depth if case.prefix else 0):
        other = case.reference.part(f"blocks.{index}.{case.kind}")
        y = getattr(other, name, None)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y):
            return (
                f"blocks: block {case.index} of the model has the {name} of block {index} of the "
                "reference: blocks in another order"
            )
    return None


def _compare_parameter(name: str, x: Tensor, y: Tensor, eps: float) -> str | None:
    """Describe how a parameter of the model differs from that of the reference."""
    if x.shape == y.shape and relative_distance(x, y) < max(1e-9, eps):
        return None
    shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
    if x.numel() != y.numel():
        return f"{name}: shapes {shapes}"
    if near(x, -y):
        return f"{name}: the model has the other sign"
    if x.ndim == 2 and (near(x, y.mT.reshape(x.shape)) or near(x.mT.reshape(y.shape), y)):
        return f"{name}: transposed, with the numbers of rows read as columns"
    if x.shape != y.shape:
        return f"{name}: shapes {shapes}"
    if near(x.flatten().sort()[0], y.flatten().sort()[0]):
        return f"{name}: the same numbers in another order"
    for role, value in (("model", x), ("reference", y)):
        if not value.any():
            return f"{name}: zeros in the {role}"
    rows = int((x - y).abs().flatten(1).amax(1).gt(0).sum()) if x.ndim > 1 else 0
    where = f" in {rows} of {len(x)} rows" if rows else ""
    return f"{name}: other numbers{where}, relative {relative_distance(x, y):.2g}"


def differ_by_offset(case: Case) -> str | None:
    """Look for a bias: a difference that is the same for every token.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    for side in case.sides():
        gap = side.y - side.x
        if gap[..., 0].numel() < 2:  # one row is like itself
            return None
        offset = gap.flatten(0, -2).mean(dim=0)
        bias = _bias_of(side.own.part(case.point))
        if relative_distance(offset.expand_as(gap), gap) > 1e-4 or bias is None:
            continue
        if near(offset, -2 * bias):
            return f"bias: the {side.own.role} or the {side.other.role} has the other sign"
        if near(offset, -bias):
            return f"bias: the {side.other.role} has none"
        return "bias: other numbers"
    return None


def _bias_of(part: nn.Module | None) -> Tensor | None:
    """Return the bias of a layer, or None."""
    bias = getattr(part, "bias", None)
    return to_float64(bias) if isinstance(bias, Tensor) else None


def per_channel_ratio(x: Tensor, y: Tensor) -> Tensor | None:
    """Return the factor of each channel by which a tensor is another, if there is such a factor.

    Args:
        x: (..., D).
        y: (..., D).

    Returns:
        (D,) with y = factor * x, or None.
    """
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    factor = (x * y).sum(dim=0) / (x * x).sum(dim=0).clamp_min(torch.finfo(x.dtype).tiny)
    return factor if near(x * factor, y) else None


def is_normalized(x: Tensor, y: Tensor) -> bool:
    """Return True if a tensor is a layer norm of another, with any weight and bias.

    Args:
        x: Tokens, (B, T, D).
        y: The tensor that may be their norm, (B, T, D).
    """
    if x.ndim != 3 or x.shape[0] * x.shape[1] < 4:
        return False
    z = F.layer_norm(x, x.shape[-1:]).flatten(0, 1)
    y = y.flatten(0, 1)
    z, y = z - z.mean(dim=0), y - y.mean(dim=0)
    factor = (z * y).sum(dim=0) / (z * z).sum(dim=0).clamp_min(torch.finfo(z.dtype).tiny)
    return relative_distance(z * factor, y) < 1e-3
