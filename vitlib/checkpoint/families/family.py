"""The form of a family's facts: each file of this folder fills in one `Family`.

Facts of transformers 5.23, timm 1.0.31, torchvision 0.28, open_clip 3.3 and the families' own code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from vitlib.checkpoint.layouts.table import NameMatch, Table
from vitlib.config import ViTConfig
from vitlib.image.configs.transform import EvalTransform

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]  # a parsed config.json, or a part of it
Mismatch = tuple[str, Any, Any]  # key of config.json, its value, the value in the tensors
State = dict[str, Tensor]
CLS = {"pool": "cls", "final_norm": "tokens"}
MEAN = {"pool": "mean", "final_norm": "tokens"}


@dataclass(frozen=True, kw_only=True)
class HfType:
    """One `model_type` of transformers: what its files hold and mean.

    Attributes:
        model_type: The value of this key in config.json.
        class_name: Of the transformers classes: <class_name>Model, <class_name>For….
        prefix: Of every tensor but the heads', in files that hold a head.
        trunk: Attribute of the class's models that computes all tokens; "": the model itself;
            None: the attribute that its class names as its base model.
        run_arguments: (transformers' model, ViTConfig, number of images) -> further arguments of
            its forward.
        names: vitlib's names -> names in files.
        more_names: Rows that depend on the config: a gated MLP, shared position tables.
        numbers: Field of ViTConfig -> the key of config.json and transformers' default for it.
        fixed: Fields of ViTConfig that hold for every model of this type.
        base: Pooling and final norm of the base model.
        head: Those of the classifier; None: the library has no classifier of this type.
        base_pools: Further pools that the base model has -> their final norm.
        head_pools: Further pools that the classifier has -> their final norm.
        activation: `hidden_act`, where config.json has none.
        gated: The MLP is gated, where config.json has no use_gated_mlp.
        nested: model_type of files whose numbers are under vision_config.
        projects: There is a class with a projection and no classifier.
        reads_head_dim: transformers takes the attention's width from the key head_dim.
        masked_norm: Models of masked patches have a second norm, outside the prefix.
        bare_fields: Fields of published models that no tensor says and that differ from `numbers`,
            for files without a config.json.
        read_more: (config, fields so far) -> fields that this type says in keys of its own.
        write_more: ViTConfig -> keys of config.json that this type has of its own.
        write_shapes: (ViTConfig, shapes of the tensors to write) -> keys that only shapes say.
        read_size: config -> pixels (height, width) of the positions; None: the key image_size.
        infer_pooling: (matched names or None, has a head) -> pool, final_norm and other fields that
            names say.
        list_mismatches: (config.json, the ViT's part, shapes, matched names) -> mismatches.
        allowed: ViTConfig -> field -> values that a class of this type computes, beyond the usual.
        absorb: (ViTConfig, tensors by vitlib's names, config.json) rewrites tensors that the type's
            class shares between heads, or computes: a table of positions.
    """

    model_type: str
    class_name: str
    prefix: str
    names: Table
    numbers: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]
    trunk: str | None = None
    run_arguments: Callable[[Any, ViTConfig, int], dict[str, Any]] = lambda *_: {}
    more_names: Callable[[ViTConfig], Table] = lambda _: {}
    base: Mapping[str, Any] = field(default_factory=lambda: CLS)
    head: Mapping[str, Any] | None = field(default_factory=lambda: CLS)
    base_pools: Mapping[str, str] = field(default_factory=dict)
    head_pools: Mapping[str, str] = field(default_factory=dict)
    activation: str = "gelu"
    gated: bool = False
    nested: str | None = None
    projects: bool = False
    reads_head_dim: bool = False
    masked_norm: bool = False
    bare_fields: Mapping[str, Any] = field(default_factory=dict)
    read_more: Callable[[Config, Config], dict[str, Any]] = lambda *_: {}
    write_more: Callable[[ViTConfig], dict[str, Any]] = lambda _: {}
    write_shapes: Callable[[ViTConfig, Shapes], dict[str, Any]] = lambda *_: {}
    read_size: Callable[[Config], tuple[int, int]] | None = None
    infer_pooling: Callable[[NameMatch | None, bool], Mapping[str, Any]] = lambda *_: {}
    list_mismatches: Callable[[Config, Config, Shapes, NameMatch], list[Mismatch]] = lambda *_: []
    allowed: Callable[[ViTConfig], dict[str, tuple[Any, ...]]] = lambda _: {}
    absorb: Callable[[ViTConfig, State, Config], None] = lambda *_: None

    def variant(
        self,
        model_type: str,
        *,
        defaults: Mapping[str, Any] | None = None,
        without: tuple[str, ...] = (),
        numbers: Mapping[str, tuple[str, Any]] | None = None,
        fixed: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> HfType:
        """Describe another model_type by what differs from this one.

        Args:
            model_type: The other type.
            defaults: Other defaults, by key of config.json.
            without: Keys of config.json that the other type does not read.
            numbers: Further entries of `numbers`.
            fixed: Further entries of `fixed`.
            **changes: Other attributes.

        Returns:
            The other type.
        """
        defaults = defaults or {}
        retained = {
            name: (key, defaults.get(key, default))
            for name, (key, default) in self.numbers.items()
            if key not in without
        }
        return replace(
            self,
            model_type=model_type,
            numbers=retained | dict(numbers or {}),
            fixed={**self.fixed, **(fixed or {})},
            **{"reads_head_dim": False, "bare_fields": {}, **changes},
        )


@dataclass(frozen=True, kw_only=True)
class Container:
    """A model of several parts: where in its config.json the ViT's config lies.

    Attributes:
        key: Of config.json.
        model_type: Of the nested config, where it names none.
        any_type: The nested config names its type; False: it is always `model_type`.
        absent: The nested config, where there is none.
        overriding: A second key, whose values win over the first's.
        convert_older: config.json -> the nested config of an older form, which has no `key`; None:
            there is none.
    """

    key: str = "vision_config"
    model_type: str
    any_type: bool = True
    absent: Mapping[str, Any] = field(default_factory=dict)
    overriding: str | None = None
    convert_older: Callable[[Config], Config | None] = lambda _: None


def two_towers(model_type: str, *, overriding: str | None = None) -> Container:
    """Describe a model of a text and a vision tower.

    Args:
        model_type: Of the vision tower.
        overriding: A second key of the vision tower's config, whose values win.

    Returns:
        The model.
    """
    return Container(model_type=model_type, any_type=False, overriding=overriding)


class Published(NamedTuple):
    """Published models of one type and shape, for files without a config.json.

    Attributes:
        model_type: Of config.json.
        embed_dim: Width.
        mlp_dim: Width of the MLP.
        num_heads: Number of heads.
        patches: Sides of the patches, in pixels.
        activation: hidden_act or "swiglu"; "" is the type's default.
        repository: A hub id of one of them, for messages.
    """

    model_type: str
    embed_dim: int
    mlp_dim: int
    num_heads: int
    patches: tuple[int, ...]
    activation: str
    repository: str


# Width, width of the MLP and number of heads of the sizes that most families publish.
TINY, SMALL, BASE = (192, 768, 3), (384, 1536, 6), (768, 3072, 12)
LARGE, HUGE, GIANT = (1024, 4096, 16), (1280, 5120, 16), (1408, 6144, 16)


@dataclass(frozen=True, kw_only=True)
class OriginalCode:
    """Files of a family's own code, whose names are not those of DeiT, DINO and their successors.

    Attributes:
        is_own: Names of a file -> True if this code writes such names, and no other does.
        names: vitlib's names -> names in a file of this model.
        spellings: Tables by which files are read, the first before all.
        ignored: How names begin that no forward reads; with a leading "*", how they end.
        other_modality: A part of the names of tensors of another modality, such as text.
        read: (fields by the tensors, shapes by the file's names, facts of the published models with
            these tensors, empty if there are none) -> fields that the code fixes. It sets
            "open_pool" if the code pools nothing.
        allowed: ViTConfig -> field -> values that the code computes.
        computed: ViTConfig -> tensors that the code saves and vitlib computes, by their names.
        check: Raises CheckpointError if such a tensor of a file is not what vitlib computes.
        choose_transform: ViTConfig -> name of its evaluation transform: the family's, or one of
            `Family.transform_variants`.
        turns_pairs: Its rotary angles turn neighbouring channels, where vitlib's turn halves.
    """

    is_own: Callable[[Collection[str]], bool]
    names: Callable[[ViTConfig], Table]
    spellings: tuple[Table, ...]
    read: Callable[[Config, Shapes, Config], dict[str, Any]]
    allowed: Callable[[ViTConfig], dict[str, tuple[Any, ...]]]
    ignored: tuple[str, ...] = ()
    other_modality: str = ""
    computed: Callable[[ViTConfig], State] = lambda _: {}
    check: Callable[[Mapping[str, Tensor]], None] = lambda _: None
    choose_transform: Callable[[ViTConfig], str] = lambda cfg: cfg.family
    turns_pairs: bool = True


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that is known of one family of ViT.

    Attributes:
        name: `ViTConfig.family`.
        title: For people.
        hf: How transformers describes it; None where it has no class of its own.
        hf_variants: Further model types of transformers that are this family.
        choose_variant: ViTConfig -> the one of them that it is written as; None: as `hf`.
        hf_containers: model_type of models of which this family is a part -> where it lies.
        hf_names: Further tables by which files of transformers are read, the first before all.
        hf_starts: How names begin that files of this family have, where these are read by its
            names alone, because a name means something else in other families.
        hf_published: Published models, for files without a config.json.
        hf_twin: Family whose published files may have the same tensors as this one's.
        hf_marks: How names begin that only files of this family have.
        to_hf: (config, state) -> config of the same function as a class of transformers computes
            it. The state is changed in place.
        numerics: Library -> fields of ViTConfig in which it differs from the library's usual. Files
            of transformers have those of their HfType; "hf" here serves profile="hf".
        num_heads: Width -> number of heads, where it differs from other families'.
        timm_architecture: A model of timm's that is built so.
        original_wrapper: The key in its own code's .pth under which the state dict stands.
        original_marks: How names begin that only its own code's files have.
        original: How its own code names tensors, where the names are no others'.
        libraries: Libraries that have models of this family.
        timm_only: Only timm's names tell this family from others; its class there computes it.
        timm_word: A word that timm's names of this family have, and no other family's.
        transforms: Library -> evaluation transform, where it differs from the library's usual one.
        transform_variants: Name -> `transforms` of models that differ from the others in these
            alone: DINO, SigLIP 2, torchvision's linear SWAG weights.
        uniform_libraries: Libraries whose published checkpoints of this family all have the
            transform above. A checkpoint that states none then needs no warning.
    """

    name: str
    title: str
    hf: HfType | None = None
    hf_variants: tuple[HfType, ...] = ()
    choose_variant: Callable[[ViTConfig], HfType | None] = lambda _: None
    hf_containers: Mapping[str, Container] = field(default_factory=dict)
    hf_names: tuple[Table, ...] = ()
    hf_starts: tuple[str, ...] = ()
    hf_published: tuple[Published, ...] = ()
    hf_twin: str = ""
    hf_marks: tuple[str, ...] = ()
    to_hf: Callable[[ViTConfig, State], ViTConfig] = lambda cfg, _: cfg
    numerics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_heads: Mapping[int, int] = field(default_factory=dict)
    timm_architecture: str = "vit_base_patch16_224"
    original_wrapper: str | None = None
    original_marks: tuple[str, ...] = ()
    original: OriginalCode | None = None
    libraries: tuple[str, ...] = ("hf", "timm", "original")
    timm_only: bool = False
    timm_word: str = ""
    transforms: Mapping[str, EvalTransform] = field(default_factory=dict)
    transform_variants: Mapping[str, Mapping[str, EvalTransform]] = field(default_factory=dict)
    uniform_libraries: tuple[str, ...] = ()

    def choose_hf(self, cfg: ViTConfig) -> HfType | None:
        """Return the model type of transformers that a model is written as.

        Args:
            cfg: The model, of this family.

        Returns:
            The type; None where transformers has none.
        """
        return self.choose_variant(cfg) or self.hf
