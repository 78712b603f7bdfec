"""ViTConfig: one frozen dataclass that describes a ViT.

Every family that vitlib loads is a set of values of it. Sizes are (height, width). Loaders set
every numeric field explicitly from the checkpoint; defaults are only for new models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

from vitlib.config_parts import Norms, Pooling, Rope, check_int, to_part
from vitlib.config_parts import is_number as is_number
from vitlib.config_parts import to_pair as to_pair
from vitlib.errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
PositionResize = Literal[
    "bicubic",
    "bicubic_fp32",
    "bicubic_antialias",
    "bicubic_offset",
    "bicubic_corners",
    "nearest",
    "bilinear",
    "bilinear_antialias",
    "bilinear_corners",
    "sincos",
]
Pool = Literal["cls", "mean", "cls+mean", "map", "pooler", "prefix"]
FinalNorm = Literal["tokens", "pooled", "none"]
RelativePosition = Literal["block", "shared", None]
RelativeResize = Literal["bilinear", "geometric"]
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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ViTConfig:
    """Every size and choice of the trunk, and the labels of its head.

    The last six attributes are derived from the others, so that modules read them as numbers.

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
        patch_bias: Bias of the patch projection. CLIP has none.
        qkv_bias: Bias of queries, keys and values.
        key_bias: Bias of keys. BEiT and DINOv3 have one for queries and values alone.
        proj_bias: Bias of the output of attention and of both layers of the MLP. AIMv2 has none.
        norms: Kind of the norms, and norms inside a block; see config_parts.py.
        pre_norm: Norm between the embedding and the first block, as timm's argument. CLIP has it.
        final_norm: What the final norm applies to: "tokens", "pooled" (CLIP, BEiT, fine-tuned MAE)
            or "none".
        norm_eps: Epsilon of every norm. Hugging Face's ViT and DeiT use 1e-12.
        layer_scale: Initial gamma of LayerScale (2103.17239), DINOv2 1.0; None means no LayerScale.
        class_token: Class token, [CLS].
        dist_token: Distillation token after the class token, as in distilled DeiT.
        num_registers: Register tokens after the class tokens, without added positions. DINOv2 with
            registers has 4.
        pos_embed: Learned position embedding for each patch. BEiT and DINOv3 have none.
        pos_embed_cls: The class tokens have position embeddings, too. DeiT-III has none for them.
        relative_position: BEiT's bias of the scores: a table for each "block", or one "shared".
        relative_resize: Rule that resizes its tables off the learned grid. timm's is "geometric".
        rope: Rotary position embedding, see config_parts.py; None means none.
        position_resize: Rule that resizes pos_embed off the learned grid; see patch_embed.py. AIMv2
            native has "sincos": positions that are computed for each grid.
        pool: What the head reads. "map" is SigLIP's attention pool, "pooler" that of ViT in21k;
            "prefix" is the mean of class tokens and registers (Pixio, whose class tokens are 8).
        attention_pool: The pool that "map" reads, see config_parts.py; None means that the
            checkpoint has none. True means its defaults.
        projection_dim: Width of the projection after pooling, as in CLIP; 0 means no projection.
        num_classes: Classes, or outputs of a regression; 0 means no head.
        dist_head: Logits are the mean of two heads, as in distilled DeiT.
        pooler_dim: Width of the checkpoint's tanh pooler; 0 means that it has none.
        mask_token: The checkpoint has the token of masked pre-training.
        dropout: Rate after positions, attention output and MLP, in training.
        attention_dropout: Rate on the attention probabilities, in training.
        drop_path: Stochastic depth of the last block in training; it rises from 0 at the first.
        labels: One name for each class. Names may repeat: ImageNet has two cranes.
        problem_type: Task as in Hugging Face; multi_label_classification gives sigmoid scores.
        grid_size: Whole patches down and across image_size.
        num_prefix_tokens: Class, distillation and register tokens.
        head_dim: Width of one attention head.
        num_prefix_positions: Rows of the position embedding before those of patches.
        num_positions: All its rows.
        num_features: Width of the vector that the head reads.

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
    patch_bias: bool = True
    qkv_bias: bool = True
    key_bias: bool = True
    proj_bias: bool = True
    norms: Norms = field(default_factory=Norms)
    pre_norm: bool = False
    final_norm: FinalNorm = "tokens"
    norm_eps: float = 1e-6
    layer_scale: float | None = None
    class_token: bool = True
    dist_token: bool = False
    num_registers: int = 0
    pos_embed: bool = True
    pos_embed_cls: bool = True
    relative_position: RelativePosition = None
    relative_resize: RelativeResize = "bilinear"
    rope: Rope | None = None
    position_resize: PositionResize = "bicubic"
    pool: Pool = "cls"
    attention_pool: Pooling | None = None
    projection_dim: int = 0
    num_classes: int = 0
    dist_head: bool = False
    pooler_dim: int = 0
    mask_token: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    labels: tuple[str, ...] = ()
    problem_type: ProblemType = None

    grid_size: tuple[int, int] = field(init=False)
    num_prefix_tokens: int = field(init=False)
    head_dim: int = field(init=False)
    num_prefix_positions: int = field(init=False)
    num_positions: int = field(init=False)
    num_features: int = field(init=False)

    if not TYPE_CHECKING:  # a type checker reads the fields

        def __new__(cls, **values: object) -> ViTConfig:
            """Check the names of fields, for an error that suggests the right one."""
            for name in values.keys() - cls.__dataclass_fields__.keys():
                raise _unknown_field(name)
            return object.__new__(cls)

    def __repr__(self) -> str:
        labels = f", labels={self.labels!r}" if self.labels else ""
        return f"ViTConfig({describe_config(self)}{labels})"

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, to_pair(name, getattr(self, name)))
        object.__setattr__(self, "rope", to_part("rope", Rope, self.rope))
        object.__setattr__(self, "norms", to_part("norms", Norms, self.norms) or Norms())
        pooling = to_part("attention_pool", Pooling, self.attention_pool)
        object.__setattr__(self, "attention_pool", pooling)
        for name in ("in_channels", "embed_dim", "depth", "num_heads"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("mlp_dim", "num_registers", "num_classes", "pooler_dim", "projection_dim"):
            check_int(name, getattr(self, name), at_least=0)
        object.__setattr__(self, "mlp_dim", self.mlp_dim or 4 * self.embed_dim)
        object.__setattr__(self, "labels", tuple(self.labels))
        self._check_choices()
        object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        self._check_consistency()
        grid = self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]
        object.__setattr__(self, "grid_size", grid)
        prefix = int(self.class_token) + int(self.dist_token) + self.num_registers
        object.__setattr__(self, "num_prefix_tokens", prefix)
        self._derive_widths()

    def _derive_widths(self) -> None:
        """Set the attributes that follow from the prefix, the grid and the pool."""
        rows = self.num_prefix_tokens - self.num_registers if self.pos_embed_cls else 0
        width = self.pooler_dim if self.pool == "pooler" else self.embed_dim
        derived = {
            "num_prefix_positions": rows if self.pos_embed else 0,
            "num_positions": rows + self.grid_size[0] * self.grid_size[1],
            "num_features": self.projection_dim or (2 * width if "+" in self.pool else width),
        }
        derived["num_positions"] *= self.pos_embed
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        """Raise ConfigError for a value that its field does not allow."""
        choices = {
            "activation": get_args(Activation),
            "position_resize": get_args(PositionResize),
            "pool": get_args(Pool),
            "final_norm": get_args(FinalNorm),
            "relative_position": get_args(RelativePosition),
            "relative_resize": get_args(RelativeResize),
            "problem_type": get_args(ProblemType),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(choice) for choice in allowed)
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected one of {listed}")
        for name in ("dropout", "attention_dropout", "drop_path"):
            rate = getattr(self, name)
            if not is_number(rate) or not 0 <= rate < 1:
                raise ConfigError(f"{name}={rate!r}: expected a number from 0 up to, not with, 1")
        if not is_number(self.norm_eps) or not 0 < self.norm_eps < 1:
            raise ConfigError(f"norm_eps={self.norm_eps!r}: expected a number between 0 and 1")
        if self.layer_scale is not None and not is_number(self.layer_scale):
            raise ConfigError(f"layer_scale={self.layer_scale!r}: expected a number or None")

    def _check_consistency(self) -> None:
        """Raise ConfigError for values that contradict each other."""
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}"
            )
        if self.image_size[0] < self.patch_size[0] or self.image_size[1] < self.patch_size[1]:
            raise ConfigError(
                f"image_size={self.image_size} is smaller than patch_size={self.patch_size}"
            )
        if not self.class_token and (self.pool not in ("mean", "map") or self.dist_token):
            raise ConfigError("a model without a class token must pool 'mean' or 'map', not distil")
        if self.position_resize == "sincos" and self.embed_dim % 4:
            raise ConfigError(
                f"position_resize='sincos', embed_dim={self.embed_dim}: expected a multiple of 4"
            )
        if self.pool == "map" and not self.attention_pool:
            raise ConfigError("pool='map' needs attention_pool=True")
        if self.pool == "pooler" and not self.pooler_dim:
            raise ConfigError("pool='pooler' needs pooler_dim, the width of the pooler")
        if self.relative_position and (self.rope or self.num_registers):
            raise ConfigError("relative_position goes without rope and without registers")
        if self.rope and self.head_dim % 4:
            raise ConfigError(
                f"rope with a head width of {self.head_dim}: expected heads of a multiple of 4"
            )
        if self.rope:
            self.rope.check_registers(self.num_registers)
        if self.dist_head and not (self.dist_token and self.num_classes and self.pool == "cls"):
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


def _refuse_assignment(config: ViTConfig, name: str, value: object) -> None:  # noqa: ARG001
    """Refuse to set a field; the frozen dataclass's own __setattr__ fails without saying why."""
    if name == "use_cache":  # transformers' Trainer sets it on any model; no ViT has a cache
        return
    if name not in ViTConfig.__dataclass_fields__:
        raise _unknown_field(name)
    raise FrozenInstanceError(
        f"ViTConfig.{name} cannot be set: dataclasses.replace(config, {name}={value!r:.40}) "
        "makes another config, and ViT(config) a model of it"
    )


type.__setattr__(ViTConfig, "__setattr__", _refuse_assignment)


def _unknown_field(name: str) -> ConfigError:
    """Return the error for a name that no field has, with the nearest."""
    names = ViTConfig.__dataclass_fields__
    # A name such as rope_theta begins with that of a group.
    groups = [group for group in names if name.startswith(f"{group}_")]
    close = groups or get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?" if close else "help(ViTConfig) lists all"
    return ConfigError(f"ViTConfig has no field {name!r}: {hint}")


def config_to_json(cfg: ViTConfig) -> dict[str, Any]:
    """Return the fields of a config as JSON holds them.

    Args:
        cfg: The model's config.

    Returns:
        Fields by name, without those that are derived; groups as objects, tuples as lists.
    """
    values = asdict(cfg)
    init = [field.name for field in fields(cfg) if field.init]
    return {n: list(values[n]) if isinstance(values[n], tuple) else values[n] for n in init}


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
        if entry.init and entry.name != "labels" and value != getattr(usual, entry.name):
            entries[entry.name] = value
    return ", ".join(f"{name}={value!r}" for name, value in entries.items())


def resolve_block_indices(indices: int | Sequence[int] | None, count: int, name: str) -> set[int]:
    """Resolve a choice of blocks, as in timm, to their indices.

    Args:
        indices: None means all blocks, a number the last so many, a list their indices from 0,
            negative ones from the end.
        count: Number of blocks of the model.
        name: The argument's name, for the message.

    Returns:
        Indices in 0..count - 1.

    Raises:
        ConfigError: An index is out of range.
    """
    if indices is None:
        return set(range(count))
    if isinstance(indices, Integral) and not isinstance(indices, bool):
        last = int(indices)
        if not 1 <= last <= count:
            raise ConfigError(f"{name}={last}: expected 1 to {count}, the last so many blocks")
        return set(range(count - last, count))
    blocks = list(indices) if isinstance(indices, Iterable) else [indices]
    if isinstance(indices, str | bool) or not all(
        isinstance(i, Integral) and -count <= int(i) < count for i in blocks
    ):
        raise ConfigError(
            f"{name}={indices!r}: expected numbers of blocks, 0 to {count - 1}, or from the end, "
            f"-1 to {-count}"
        )
    return {int(i) % count for i in blocks}
