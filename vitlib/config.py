"""ViTConfig: one frozen dataclass that describes a ViT.

Every family that vitlib loads is a set of values of it. Sizes are (height, width). Loaders set
every numeric field explicitly from the checkpoint; defaults are only for new models.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal, get_args

from vitlib.config_parts import (
    LEADING_TOKENS,
    PARTS,
    SHORT_NAMES,
    Biases,
    Norms,
    Outputs,
    Pooling,
    Positions,
    Regularization,
    Rope,
    Tokens,
    group_short_names,
    to_part,
)
from vitlib.errors import ConfigError, check_int, is_number, to_pair

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Pool = Literal[
    "cls", "mean", "cls+mean", "cls+reg", "cls+2reg", "cls+3reg", "map", "pooler", "prefix"
]
FinalNorm = Literal["tokens", "pooled", "none"]
ProblemType = Literal[
    "single_label_classification", "multi_label_classification", "regression", None
]

# name: embed_dim, depth, num_heads, mlp_dim.
# Ti: Touvron 2012.12877 table 1; S: the same, and Steiner 2106.10270; B, L, H: Dosovitskiy
# 2010.11929 table 1; g: Zhai 2106.04560 table 2.
SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
}


DERIVED = (
    "grid_size", "num_prefix_tokens", "head_dim", "num_prefix_positions", "num_positions",
    "num_features",
)  # fmt: skip


class _Derived:
    """Numbers that follow from the fields, so that modules read them as attributes.

    Attributes:
        grid_size: Whole patches down and across image_size.
        num_prefix_tokens: Class, distillation and register tokens.
        head_dim: Width of one attention head.
        num_prefix_positions: Rows of the position embedding before those of patches.
        num_positions: All its rows.
        num_features: Width of the vector that the head reads.
    """

    __slots__ = DERIVED
    grid_size: tuple[int, int]
    num_prefix_tokens: int
    head_dim: int
    num_prefix_positions: int
    num_positions: int
    num_features: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ViTConfig(_Derived):
    """Every size and choice of the trunk, and the labels of its head.

    Choices that only some families make are in groups, which config_parts.py describes. A field of
    a group also has a short name, as in timm: cfg.num_registers is cfg.tokens.registers, and
    ViTConfig(num_registers=4) and dataclasses.replace(cfg, num_registers=4) set it. SHORT_NAMES
    lists them.

    Attributes:
        family: Family whose names the weights are written under; see checkpoint/families/.
        image_size: Pixels (height, width) that the position grid was learned on; an int means a
            square.
        patch_size: Pixels (height, width) of a patch; an int means a square.
        in_channels: Channels of an image.
        embed_dim: Width of the residual stream, D.
        depth: Number of blocks.
        num_heads: Attention heads; embed_dim is a multiple of it.
        mlp_dim: Hidden width of the MLP (with swiglu, of one half); 0 becomes 4 * embed_dim.
        activation: Of the MLP: "gelu" is the erf form; "swiglu" is that of DINOv2-giant and DINOv3.
        layer_scale: Initial gamma of LayerScale (2103.17239), DINOv2 1.0; None means no LayerScale.
        norm_eps: Epsilon of every norm. Hugging Face's ViT and DeiT use 1e-12.
        pre_norm: Norm between the embedding and the first block, as timm's argument. CLIP has it.
        final_norm: What the final norm applies to: "tokens", "pooled" (CLIP, BEiT, fine-tuned MAE)
            or "none".
        norms: Kind of the norms, and norms inside a block.
        biases: Layers that have a bias.
        tokens: Class token, distillation token and registers, which come before the patches.
        positions: Learned positions, and the rule that resizes them off the learned grid.
        rope: Rotary position embedding; None means none.
        pool: What the head reads. "map" is SigLIP's attention pool, "pooler" that of ViT in21k;
            "prefix" the mean of [CLS] and registers (Pixio); "cls+2reg" [CLS] and two (RADIO).
        attention_pool: The pool that "map" reads; None means that the checkpoint has none. True
            means its defaults.
        outputs: Layers between the pool and the logits: pooler, projection, a second head.
        num_classes: Classes, or outputs of a regression; 0 means no head.
        labels: One name for each class. Names may repeat: ImageNet has two cranes.
        problem_type: Task as in Hugging Face; multi_label_classification gives sigmoid scores.
        regularization: Rates of dropout and of stochastic depth, in training.

    Raises:
        ConfigError: The values cannot be those of a ViT.
    """

    family: str = "vit"
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    in_channels: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 0
    activation: Activation = "gelu"
    layer_scale: float | None = None
    norm_eps: float = 1e-6
    pre_norm: bool = False
    final_norm: FinalNorm = "tokens"
    norms: Norms = field(default_factory=Norms)
    biases: Biases = field(default_factory=Biases)
    tokens: Tokens = field(default_factory=Tokens)
    positions: Positions = field(default_factory=Positions)
    rope: Rope | None = None
    pool: Pool = "cls"
    attention_pool: Pooling | None = None
    outputs: Outputs = field(default_factory=Outputs)
    num_classes: int = 0
    labels: tuple[str, ...] = ()
    problem_type: ProblemType = None
    regularization: Regularization = field(default_factory=Regularization)

    if not TYPE_CHECKING:  # a type checker reads the fields, not their short names

        def __getattr__(self, name: str) -> object:
            """Return the field of a group by its short name."""
            if name not in SHORT_NAMES:
                raise AttributeError(f"ViTConfig has no attribute {name!r}")
            group, entry = SHORT_NAMES[name]
            return getattr(getattr(self, group), entry)

    def __reduce__(self) -> tuple[Any, ...]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return partial(ViTConfig, **values), ()

    def __repr__(self) -> str:
        labels = f", labels={self.labels!r}" if self.labels else ""
        return f"ViTConfig({describe_config(self)}{labels})"

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, to_pair(name, getattr(self, name)))
        for name, (kind, is_optional) in PARTS.items():
            part = to_part(name, kind, getattr(self, name))
            object.__setattr__(self, name, part if part or is_optional else kind())
        for name in ("in_channels", "embed_dim", "depth", "num_heads"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("mlp_dim", "num_classes"):
            check_int(name, getattr(self, name), at_least=0)
        object.__setattr__(self, "mlp_dim", self.mlp_dim or 4 * self.embed_dim)
        object.__setattr__(self, "labels", tuple(self.labels))
        self._check_choices()
        self._check_consistency()
        self._derive()

    def _derive(self) -> None:
        """Set the attributes that follow from the fields."""
        tokens, outputs = self.tokens, self.outputs
        grid = self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]
        rows = int(tokens.cls) + int(tokens.dist) if self.positions.cls else 0
        derived = {
            "grid_size": grid,
            "head_dim": self.embed_dim // self.num_heads,
            "num_prefix_tokens": int(tokens.cls) + int(tokens.dist) + tokens.registers,
            "num_prefix_positions": rows if self.positions.embed else 0,
            "num_positions": (rows + grid[0] * grid[1]) * self.positions.embed,
            "num_features": outputs.projection_dim or self._pooled_width(),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _pooled_width(self) -> int:
        """Return the width of the pooled vector."""
        width = self.outputs.pooler_dim if self.pool == "pooler" else self.embed_dim
        return width * (2 if self.pool == "cls+mean" else LEADING_TOKENS.get(self.pool, 1))

    def _check_choices(self) -> None:
        """Raise ConfigError for a value that its field does not allow."""
        choices = {
            "activation": get_args(Activation),
            "pool": get_args(Pool),
            "final_norm": get_args(FinalNorm),
            "problem_type": get_args(ProblemType),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(choice) for choice in allowed)
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected one of {listed}")
        if not is_number(self.norm_eps) or not 0 < self.norm_eps < 1:
            raise ConfigError(f"norm_eps={self.norm_eps!r}: expected a number between 0 and 1")
        if self.layer_scale is not None and not is_number(self.layer_scale):
            raise ConfigError(f"layer_scale={self.layer_scale!r}: expected a number or None")

    def _check_consistency(self) -> None:
        """Raise ConfigError for values that contradict each other."""
        tokens, positions, outputs = self.tokens, self.positions, self.outputs
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}"
            )
        if self.image_size[0] < self.patch_size[0] or self.image_size[1] < self.patch_size[1]:
            raise ConfigError(
                f"image_size={self.image_size} is smaller than patch_size={self.patch_size}"
            )
        if not tokens.cls and (self.pool not in ("mean", "map") or tokens.dist):
            raise ConfigError("a model without a class token must pool 'mean' or 'map', not distil")
        if LEADING_TOKENS.get(self.pool, 1) > 1 + (not tokens.dist) * tokens.registers:
            raise ConfigError(f"pool={self.pool!r} needs as many registers, and no dist_token")
        if positions.resize == "sincos" and self.embed_dim % 4:
            raise ConfigError(
                f"position_resize='sincos', embed_dim={self.embed_dim}: expected a multiple of 4"
            )
        if self.final_norm == "pooled" and self._pooled_width() != self.embed_dim:
            raise ConfigError(
                f"final_norm='pooled' with pool={self.pool!r}: expected a pool of embed_dim values"
            )
        if self.pool == "map" and not self.attention_pool:
            raise ConfigError("pool='map' needs attention_pool=True")
        if self.pool == "pooler" and not outputs.pooler_dim:
            raise ConfigError("pool='pooler' needs pooler_dim, the width of the pooler")
        if positions.relative and (self.rope or tokens.registers):
            raise ConfigError("relative_position goes without rope and without registers")
        head_dim = self.embed_dim // self.num_heads
        if self.rope and head_dim % 4:
            raise ConfigError(
                f"rope with a head width of {head_dim}: expected heads of a multiple of 4"
            )
        if self.rope:
            self.rope.check_registers(tokens.registers)
        if outputs.dist_head and not (tokens.dist and self.num_classes and self.pool == "cls"):
            raise ConfigError("dist_head needs dist_token, num_classes and pool='cls'")
        if self.labels and len(self.labels) != self.num_classes:
            raise ConfigError(f"{len(self.labels)} labels for num_classes={self.num_classes}")

    @classmethod
    def named(
        cls,
        name: str,
        *,
        image_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        num_classes: int | None = None,
    ) -> ViTConfig:
        """Return the config of a model size of the papers, or of a published architecture.

        Args:
            name: A letter and a patch in pixels, as in "B/16" (letters are Ti, S, B, L, H and g);
                or a name of timm's or open_clip's that `vitlib list` prints.
            image_size: Pixels, (height, width) or an int for a square; None: the published size.
            in_channels: Channels of an image.
            num_classes: Number of classes; 0 means no head. None: no head, but the embedding in
                configs of open_clip.

        Returns:
            The config.

        Raises:
            ConfigError: There is no such model, or vitlib does not compute it.
        """
        size, _, patch = str(name).partition("/")
        if size not in SIZES or not patch.isdecimal() or len(patch) > 4:
            from vitlib.checkpoint.named_config import build_named_config  # the tables of names

            return build_named_config(
                name, image_size=image_size, in_channels=in_channels, num_classes=num_classes
            )
        embed_dim, depth, num_heads, mlp_dim = SIZES[size]
        return cls(
            image_size=to_pair("image_size", 224 if image_size is None else image_size),
            patch_size=(int(patch), int(patch)), in_channels=in_channels, embed_dim=embed_dim,
            depth=depth, num_heads=num_heads, mlp_dim=mlp_dim,
            num_classes=0 if num_classes is None else num_classes,
        )  # fmt: skip


_init = ViTConfig.__init__


@wraps(_init)
def _init_by_short_names(config: ViTConfig, **values: Any) -> None:
    """Set the fields, given by their own names or by short names; suggest one for a typo."""
    for name in values.keys() - ViTConfig.__dataclass_fields__.keys() - SHORT_NAMES.keys():
        raise _unknown_field(name)
    _init(config, **group_short_names(values))


def _refuse_assignment(config: ViTConfig, name: str, value: object) -> None:  # noqa: ARG001
    """Refuse to set a field; the frozen dataclass's own __setattr__ fails without saying why."""
    if name == "use_cache":  # transformers' Trainer sets it on any model; no ViT has a cache
        return
    if name not in ViTConfig.__dataclass_fields__ and name not in SHORT_NAMES:
        raise _unknown_field(name)
    raise FrozenInstanceError(
        f"ViTConfig.{name} cannot be set: dataclasses.replace(config, {name}={value!r:.40}) "
        "makes another config, and ViT(config) a model of it"
    )


# A dataclass makes both methods itself; a type checker reads those.
type.__setattr__(ViTConfig, "__init__", _init_by_short_names)
type.__setattr__(ViTConfig, "__setattr__", _refuse_assignment)


def _unknown_field(name: str) -> ConfigError:
    """Return the error for a name that no field has, with the nearest."""
    names = (*ViTConfig.__dataclass_fields__, *SHORT_NAMES)
    # A name such as rope_theta begins with that of a group.
    groups = [group for group in PARTS if name.startswith(f"{group}_")]
    close = groups or get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?" if close else "help(ViTConfig) lists all"
    return ConfigError(f"ViTConfig has no field {name!r}: {hint}")


def config_to_json(cfg: ViTConfig) -> dict[str, Any]:
    """Return the fields of a config as JSON holds them.

    Args:
        cfg: The model's config.

    Returns:
        Fields by name, those of a group by their short names where they have one; other groups as
        objects, tuples as lists.
    """
    groups = {group for group, _ in SHORT_NAMES.values()}
    values = {name: value for name, value in asdict(cfg).items() if name not in groups}
    values |= {name: getattr(cfg, name) for name in SHORT_NAMES}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def describe_config(cfg: ViTConfig) -> str:
    """Describe a config in one line for repr().

    Args:
        cfg: The model's config.

    Returns:
        Sizes, and each other field that differs from its default, without labels.
    """
    sizes = ("family", "image_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    entries, usual = {name: getattr(cfg, name) for name in sizes}, ViTConfig()
    for entry in fields(cfg):
        value = getattr(cfg, entry.name)
        if entry.name != "labels" and value != getattr(usual, entry.name):
            entries[entry.name] = value
    return ", ".join(f"{name}={value!r}" for name, value in entries.items())
