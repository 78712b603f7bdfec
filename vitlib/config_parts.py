"""Groups of fields of ViTConfig that only some families use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from vitlib.errors import ConfigError

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Rope:
    """Rotary position embedding over both axes of the grid (2104.09864).

    Attributes:
        theta: Base of the periods. With "centers" the longest period is theta, DINOv3 100; with
            "index" it is 2 pi theta, EVA-02 10000.
        coords: Position of a patch on an axis: its centre in -1..1 ("centers", DINOv3), or its
            number from 0 ("index", EVA-02, RoPE-ViT, Perception Encoder).
        offset: Added to the number of a patch. Perception Encoder has 1.
        reference_grid: Grid (h, w) to which numbers of patches are rescaled on another grid; None
            leaves them as they are. EVA-02 has 16x16.
        axes: Axis of the first half of the frequencies: "ij" down, "xy" across.
        learned: The frequencies of each block and head are parameters, each for a direction of its
            own (RoPE-ViT's "mixed", 2403.13298). theta gives their initial values.
        class_token: The angles of the class token are parameters, too (MLCD).
        register_theta: Base of the periods of registers, which stand on a square grid of their own
            in row-major order (ViT-5: 100). None: registers have no angles.

    Raises:
        ConfigError: A value is not allowed.
    """

    theta: float = 100.0
    coords: Literal["centers", "index"] = "centers"
    offset: float = 0.0
    reference_grid: tuple[int, int] | None = None
    axes: Literal["ij", "xy"] = "ij"
    learned: bool = False
    class_token: bool = False
    register_theta: float | None = None

    def __post_init__(self) -> None:
        if not is_number(self.theta) or self.theta <= 0 or not is_number(self.offset):
            raise ConfigError(
                f"Rope(theta={self.theta!r}, offset={self.offset!r}): expected a positive number, "
                "and a number"
            )
        if self.reference_grid is not None:
            grid = to_pair("reference_grid", self.reference_grid)
            object.__setattr__(self, "reference_grid", grid)
        _check_literals(self)
        if self.register_theta is not None and (
            not is_number(self.register_theta)
            or self.register_theta <= 0
            or self.coords != "index"
            or self.learned
        ):
            raise ConfigError(
                f"Rope(register_theta={self.register_theta!r}): expected a positive number, with "
                "coords='index' and learned=False"
            )
        if self.coords == "centers" and (self.offset or self.reference_grid or self.learned):
            raise ConfigError(
                "Rope(coords='centers') goes without offset, reference_grid and learned: expected "
                "coords='index'"
            )

    @property
    def register_rope(self) -> Rope | None:
        """Rotation of the registers on their own grid; None where they have none."""
        if self.register_theta is None:
            return None
        return Rope(theta=self.register_theta, coords=self.coords, axes=self.axes)

    def check_registers(self, count: int) -> None:
        """Check that registers which have angles fill a square grid.

        Args:
            count: Number of registers.

        Raises:
            ConfigError: They do not.
        """
        if self.register_theta is not None and math.isqrt(count) ** 2 != count:
            raise ConfigError(
                f"num_registers={count} with Rope(register_theta={self.register_theta:g}): "
                "expected a square number, as 4"
            )

    def __repr__(self) -> str:
        return _describe_changes(self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Norms:
    """Kind of a model's norms, and the norms that only some families have.

    Attributes:
        kind: "layer" (1607.06450), or "rms" without mean and bias (1910.07467): AIMv2, ViT-5.
        patch: Norm after the patch projection, before positions are added. AIMv2 has it.
        qk: Norm of queries and keys (2302.05442): of each "head", Sapiens2 and ViT-5, or of the
            whole "width", InternViT-6B.
        attn: Norm of the attended values, before their projection: BEiT-3, EVA-02 CLIP.
        mlp: Norm of the hidden layer of the MLP (2110.09456): EVA-02, BEiT-3.
        post: Norms after each branch in place of before it: EVA-02-E.

    Raises:
        ConfigError: A value is not allowed.
    """

    kind: Literal["layer", "rms"] = "layer"
    patch: bool = False
    qk: Literal["head", "width", None] = None
    attn: bool = False
    mlp: bool = False
    post: bool = False

    def __post_init__(self) -> None:
        _check_literals(self)

    def __repr__(self) -> str:
        return _describe_changes(self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Pooling:
    """Attention pool of a model: a learned query over its tokens (2106.04560, SigLIP).

    Attributes:
        num_heads: Heads of the pool; 0 means as many as the trunk has. Perception Encoder has 8.
        mlp_dim: Hidden width of its MLP; 0 means that of the trunk.
        prefix_tokens: The pool reads class tokens and registers, too.
        q_proj: The learned query is projected. AIMv2 takes it as it is.
        mlp: A norm and an MLP follow the attention. AIMv2 has none; the output projection then has
            a bias whether those of the blocks have one or not.

    Raises:
        ConfigError: A value is not allowed.
    """

    num_heads: int = 0
    mlp_dim: int = 0
    prefix_tokens: bool = True
    q_proj: bool = True
    mlp: bool = True

    def __post_init__(self) -> None:
        check_int("Pooling.num_heads", self.num_heads, at_least=0)
        check_int("Pooling.mlp_dim", self.mlp_dim, at_least=0)
        _check_literals(self)

    def __repr__(self) -> str:
        return _describe_changes(self)


def to_part(name: str, kind: type[Part], value: object) -> Part | None:
    """Return a group of fields, of whichever form a caller or a JSON file gives it in.

    Args:
        name: Name of the field of ViTConfig, for the message.
        kind: Class of the group.
        value: The group, its fields by name, or None. True means its defaults, and False None.

    Returns:
        The group, or None.

    Raises:
        ConfigError: The value is anything else, or has an unknown field.
    """
    if value is None or value is False:
        return None
    if isinstance(value, kind):
        return value
    values: dict[str, Any] = {} if value is True else dict(value) if isinstance(value, dict) else {}
    known = get_type_hints(kind)
    if value is not True and (not isinstance(value, dict) or values.keys() - known.keys()):
        raise ConfigError(
            f"{name}={value!r:.80}: expected {kind.__name__}({', '.join(sorted(known))}), or None"
        )
    return kind(**values)


def upgrade_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a ViTConfig in a JSON file, of this version or an older one.

    Args:
        values: The fields by name. Older files have rope_theta in place of rope.

    Returns:
        The fields, lists as tuples.
    """
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if "rope_theta" in fields:
        theta = fields.pop("rope_theta")
        fields["rope"] = None if theta is None else {"theta": theta}
    return fields


def _describe_changes(part: Any) -> str:
    """Return a group as the call that makes it, without fields that have their defaults."""
    usual = type(part).__dataclass_fields__
    values = {name: getattr(part, name) for name in usual}
    changes = [f"{n}={value!r}" for n, value in values.items() if value != usual[n].default]
    return f"{type(part).__name__}({', '.join(changes)})"


def _check_literals(part: object) -> None:
    """Raise ConfigError for a choice or a bool that has another value."""
    for name, hint in get_type_hints(type(part)).items():
        allowed = (True, False) if hint is bool else get_args(hint)
        value = getattr(part, name)
        is_choice = hint is bool or all(isinstance(choice, str | None) for choice in allowed)
        if allowed and is_choice and not any(value is c or value == c for c in allowed):
            listed = ", ".join(map(str, allowed))
            raise ConfigError(f"{type(part).__name__}({name}={value!r}): expected one of {listed}")


def is_number(value: object) -> bool:
    """Return True for a finite int or float; a bool is not one.

    Args:
        value: Anything.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # An int may be too large for a float.
    return abs(value) < 1e300 and math.isfinite(value)


def check_int(name: str, value: object, *, at_least: int) -> int:
    """Check a whole number.

    Args:
        name: Name of the field, for the message.
        value: Anything; a bool is no number.
        at_least: The smallest number that is allowed.

    Returns:
        The number.

    Raises:
        ConfigError: The value is no whole number, or too small or too large.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name}={value!r}: expected a whole number of at least {at_least}")
    # Far more than fits in memory; larger sizes overflow in torch.
    if value >= 2**31:
        raise ConfigError(f"{name}={value}: expected less than 2**31")
    return value


def to_pair(name: str, value: object) -> tuple[int, int]:
    """Return a size as (height, width).

    Args:
        name: Name of the field, for the message.
        value: An int for a square, or two.

    Returns:
        Height and width.

    Raises:
        ConfigError: The value is anything else, or a side is below 1.
    """
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2:
        raise ConfigError(f"{name}={value!r}: expected one whole number or (height, width)")
    return check_int(name, sides[0], at_least=1), check_int(name, sides[1], at_least=1)
