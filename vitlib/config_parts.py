"""Groups of fields of ViTConfig that only some families use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from vitlib.errors import ConfigError, check_int, is_number, to_pair

Part = TypeVar("Part", bound="_Part")
# Pools of the first tokens alone -> the number of these tokens, which are joined to one vector.
LEADING_TOKENS = {"pooler": 1, "cls+reg": 2, "cls+2reg": 3, "cls+3reg": 4}
PositionResize = Literal[
    "bicubic", "bicubic_fp32", "bicubic_antialias", "bicubic_antialias_square", "bicubic_offset",
    "bicubic_corners", "nearest", "bilinear", "bilinear_antialias", "bilinear_corners",
    "bilinear_square", "bilinear_corners_square", "sincos",
]  # fmt: skip
RelativePosition = Literal["block", "shared", None]
RelativeResize = Literal["bilinear", "geometric"]


_get_hints: Any = cache(get_type_hints)  # it evaluates each annotation


class _Part:
    """Base of the groups: checks choices, and shows in repr() what is not usual."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        hints = _get_hints(type(self))
        for name in self.__dataclass_fields__:
            value, hint = getattr(self, name), hints[name]
            allowed = (True, False) if hint is bool else get_args(hint)
            is_choice = hint is bool or all(isinstance(choice, str | None) for choice in allowed)
            if allowed and is_choice and not any(value is c or value == c for c in allowed):
                listed = ", ".join(map(str, allowed))
                call = f"{type(self).__name__}({name}={value!r})"
                raise ConfigError(f"{call}: expected one of {listed}")

    def __repr__(self) -> str:
        usual = self.__dataclass_fields__
        values = {name: getattr(self, name) for name in usual}
        changes = [f"{n}={value!r}" for n, value in values.items() if value != usual[n].default]
        return f"{type(self).__name__}({', '.join(changes)})"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Rope(_Part):
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
        _Part.__post_init__(self)
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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Norms(_Part):
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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Pooling(_Part):
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
        _Part.__post_init__(self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Biases(_Part):
    """Layers that have a bias.

    Attributes:
        patch: The patch projection. CLIP has none.
        qkv: Queries, keys and values.
        key: Keys. BEiT and DINOv3 have a bias for queries and values alone.
        proj: The output of attention, and both layers of the MLP. AIMv2 has none.

    Raises:
        ConfigError: A value is not allowed.
    """

    patch: bool = True
    qkv: bool = True
    key: bool = True
    proj: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Tokens(_Part):
    """Tokens before those of patches, and the token of masked pre-training.

    Attributes:
        cls: Class token, [CLS].
        dist: Distillation token after the class token, as in distilled DeiT.
        registers: Number of register tokens (2309.16588) after these, without positions. DINOv2
            with registers has 4.
        mask: The checkpoint has the token of masked pre-training.

    Raises:
        ConfigError: A value is not allowed.
    """

    cls: bool = True
    dist: bool = False
    registers: int = 0
    mask: bool = False

    def __post_init__(self) -> None:
        check_int("Tokens.registers", self.registers, at_least=0)
        _Part.__post_init__(self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Positions(_Part):
    """Learned positions: an embedding that is added to tokens, or a bias of the scores.

    Attributes:
        embed: Position embedding for each patch. BEiT and DINOv3 have none.
        cls: Class and distillation tokens have position embeddings, too. DeiT-III has none for
            them.
        resize: Rule that resizes the embedding off the learned grid; see patch_embed.py. AIMv2
            native has "sincos": positions that are computed for each grid.
        relative: BEiT's bias of the scores: a table for each "block", or one "shared".
        relative_resize: Rule that resizes its tables off the learned grid. timm's is "geometric".

    Raises:
        ConfigError: A value is not allowed.
    """

    embed: bool = True
    cls: bool = True
    resize: PositionResize = "bicubic"
    relative: RelativePosition = None
    relative_resize: RelativeResize = "bilinear"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Outputs(_Part):
    """Layers between the pool and the logits, beside the head.

    Attributes:
        pooler_dim: Width of the checkpoint's tanh pooler; 0 means that it has none.
        projection_dim: Width of the projection after pooling, as in CLIP; 0 means no projection.
        dist_head: Logits are the mean of two heads, as in distilled DeiT.

    Raises:
        ConfigError: A value is not allowed.
    """

    pooler_dim: int = 0
    projection_dim: int = 0
    dist_head: bool = False

    def __post_init__(self) -> None:
        check_int("Outputs.pooler_dim", self.pooler_dim, at_least=0)
        check_int("Outputs.projection_dim", self.projection_dim, at_least=0)
        _Part.__post_init__(self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Regularization(_Part):
    """Rates that are in force in training alone, each from 0 up to 1.

    Attributes:
        dropout: After positions, attention output and MLP.
        attention_dropout: On the attention probabilities.
        drop_path: Stochastic depth (1603.09382) of the last block; it rises from 0 at the first.

    Raises:
        ConfigError: A rate is not allowed.
    """

    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in type(self).__dataclass_fields__:
            rate = getattr(self, name)
            if not is_number(rate) or not 0 <= rate < 1:
                call = f"Regularization({name}={rate!r})"
                raise ConfigError(f"{call}: expected a number from 0 up to, not with, 1")


# Fields of ViTConfig that are groups: their class, and if the field may be None.
PARTS: dict[str, tuple[type[_Part], bool]] = {
    "rope": (Rope, True),
    "norms": (Norms, False),
    "biases": (Biases, False),
    "tokens": (Tokens, False),
    "positions": (Positions, False),
    "attention_pool": (Pooling, True),
    "outputs": (Outputs, False),
    "regularization": (Regularization, False),
}

# The name of a group's field beside the fields of ViTConfig: as in timm, transformers and the
# tables of checkpoint/, whose files have one flat list of values.
SHORT_NAMES: dict[str, tuple[str, str]] = {
    "patch_bias": ("biases", "patch"), "qkv_bias": ("biases", "qkv"),
    "key_bias": ("biases", "key"), "proj_bias": ("biases", "proj"),
    "class_token": ("tokens", "cls"), "dist_token": ("tokens", "dist"),
    "num_registers": ("tokens", "registers"), "mask_token": ("tokens", "mask"),
    "pos_embed": ("positions", "embed"), "pos_embed_cls": ("positions", "cls"),
    "position_resize": ("positions", "resize"), "relative_position": ("positions", "relative"),
    "relative_resize": ("positions", "relative_resize"),
    "pooler_dim": ("outputs", "pooler_dim"), "projection_dim": ("outputs", "projection_dim"),
    "dist_head": ("outputs", "dist_head"), "dropout": ("regularization", "dropout"),
    "attention_dropout": ("regularization", "attention_dropout"),
    "drop_path": ("regularization", "drop_path"),
}  # fmt: skip


def group_short_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of ViTConfig, those with a short name in their groups.

    Args:
        values: Fields by their own names or by short names. A short name overrides the group.

    Returns:
        Fields by their own names.

    Raises:
        ConfigError: A value is not allowed.
    """
    fields = {name: value for name, value in values.items() if name not in SHORT_NAMES}
    changes: dict[str, dict[str, Any]] = {}
    for name in values.keys() & SHORT_NAMES.keys():
        group, entry = SHORT_NAMES[name]
        changes.setdefault(group, {})[entry] = values[name]
    for group, entries in changes.items():
        kind = PARTS[group][0]
        fields[group] = replace(to_part(group, kind, fields.get(group)) or kind(), **entries)
    return fields


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
    known = kind.__dataclass_fields__
    if value is not True and (not isinstance(value, dict) or values.keys() - known.keys()):
        raise ConfigError(
            f"{name}={value!r:.80}: expected {kind.__name__}({', '.join(sorted(known))}), or None"
        )
    return kind(**values)
