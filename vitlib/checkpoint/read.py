"""Read a checkpoint: its network and layout, config, tensors by vitlib's names, and problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitlib.checkpoint.adapt import unread_norm
from vitlib.checkpoint.families import with_profile
from vitlib.checkpoint.layouts import detect, heads, networks, torchvision
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import Shape, auxiliary_fields
from vitlib.checkpoint.layouts.layout import Layout, ParsedConfig, read_sidecar
from vitlib.checkpoint.layouts.problems import Problems, is_finite, list_problems
from vitlib.checkpoint.layouts.table import NameMatch, read_state
from vitlib.config import ViTConfig
from vitlib.errors import ConfigError, VitlibError
from vitlib.source.locate import Source
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.checkpoint.published import Recipe  # a table for models stated by their id alone

NOTHING_STATED = Facts()


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a source, read and mapped.

    Attributes:
        model: On the meta device: modules and shapes, without memory.
        layout: The layout of the files.
        state: Tensors by vitlib's names, memory-mapped.
        files: Names of the weights files.
        ignored: Tensors that no forward reads, and other content of the files.
        assumed: Fields of the config that nothing in the checkpoint says.
        doubtful: Assumed fields that can be wrong.
        differences: Problems of the tensors, by kind.
        notes: Content that is not used, a line each.
        architecture: Name of the architecture that the caller or the file's name states.
        prefix: Prefix of all names of the network.
        detected_from: The file's tensors, where their names alone said the layout.
        assumes_square: The grid is taken to be square, because nothing says its size.
        recipe: How the authors run the published model that the caller states.
    """

    model: ViT
    layout: Layout
    state: dict[str, Tensor]
    files: tuple[str, ...]
    ignored: tuple[str, ...]
    assumed: tuple[str, ...]
    doubtful: tuple[str, ...]
    differences: Problems
    notes: tuple[str, ...] = ()
    architecture: str | None = None
    prefix: str = ""
    detected_from: dict[str, Tensor] | None = None
    assumes_square: bool = False
    recipe: Recipe | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """Reasons why the tensors are not the model; empty where they are."""
        return self.differences.presence + self.differences.others

    @property
    def also_fits(self) -> tuple[str, ...]:
        """Other layouts that have the same names."""
        if not self.detected_from:
            return ()
        return detect.list_matching_layouts(self.detected_from, self.layout)


def read_checkpoint(
    src: Source,
    config: ViTConfig | None = None,
    *,
    layout: str | None = None,
    profile: str | None = None,
    prefix: str | None = None,
    facts: Facts = NOTHING_STATED,
    head_wanted: bool = True,
) -> Checkpoint:
    """Read and check a source without building a model of its tensors.

    Args:
        src: The files.
        config: The model; None: as the files say.
        layout: The layout of the files; None: by the names of the tensors.
        profile: The library whose numerics to run the tensors with; None: the layout's.
        prefix: Prefix of the network's names; None: the only network, or the preferred.
        facts: What the caller states of a checkpoint whose files do not say it.
        head_wanted: The classifier is read, too.

    Returns:
        The checkpoint. Problems of single tensors are listed in `problems`.

    Raises:
        SourceError: There is nothing to read.
        CheckpointError: The names of the tensors are not a ViT's, or the config contradicts them.
        ConfigError: No ViT has such numbers, or a stated fact contradicts the files.
    """
    all_tensors = src.tensors(prefix)
    try:
        recipe = _find_recipe(facts)
        tensors, network_prefix = networks.extract_network(src, all_tensors, layout, prefix)
        chosen = networks.choose_layout(src, tensors, layout, network_prefix)
        tensors = chosen.prepare(tensors)
        name_match = chosen.find(tensors)
        notes = heads.attach_head(name_match, tensors)
        size = chosen.read_image_size(src.json) if config is None else config.image_size
        state = chosen.finish(read_state(tensors, name_match), size)
        heads.add_head_bias(state)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        parsed, name = _parse_or_take(src, chosen, config, shapes, name_match, facts, recipe)
        cfg = parsed.config
        if profile is not None and profile != chosen.profile:
            cfg = with_profile(cfg, profile)
        state = chosen.absorb(cfg, dict(state), src.json)
    except VitlibError as error:
        raise type(error)(f"{src.name!r}: {error}") from error
    if cfg.final_norm == "none" and "norm.weight" not in state:
        # The model has the module, no forward reads it, and the file does not hold it.
        state |= unread_norm(state, cfg)
    model = build_empty(cfg)
    finite = src.is_finite()  # the reader may have checked every value already
    not_finite = [] if finite else [name for name, t in state.items() if not is_finite(t)]
    differences = list_problems(model, state, name_match, chosen, head_wanted, not_finite)
    # Without a table nothing is resized; a gated MLP shows in the shapes.
    irrelevant = {
        "position_resize": not cfg.positions.embed,
        "activation": cfg.activation == "swiglu",
    }
    assumed = tuple(name for name in parsed.assumed if not irrelevant.get(name, False))
    return Checkpoint(
        model=model,
        layout=chosen,
        state=state,
        files=tuple(path.name for path in src.weights()),
        ignored=(*name_match.ignored, *src.ignored),
        assumed=assumed,
        doubtful=tuple(name for name in parsed.doubtful if name in assumed),
        differences=differences,
        notes=(*parsed.notes, *notes, *_list_author_notes(src, cfg, facts, recipe)),
        prefix=(prefix or "") + network_prefix,
        architecture=name,
        detected_from=None if layout or src.json("config.json") else tensors,
        assumes_square=size is None and cfg.positions.embed,
        recipe=recipe,
    )


def _parse_or_take(
    src: Source,
    layout: Layout,
    config: ViTConfig | None,
    shapes: Mapping[str, Shape],
    name_match: NameMatch,
    facts: Facts,
    recipe: Recipe | None,
) -> tuple[ParsedConfig, str | None]:
    """Parse the model's config, or take the caller's own.

    Returns the model, and the architecture that the caller or the file's name states.
    """
    if layout.name == "torchvision" and facts.architecture is None:
        name = torchvision.parse_file_name(src.weights()[0].name, shapes)
        facts = replace(facts, architecture=name)
    if config is not None:
        facts.check(config)
        return ParsedConfig(_fit_parts(config, shapes)), facts.architecture
    stated = facts if recipe is None else _apply_recipe(recipe, facts, src, layout, shapes)
    stated = replace(stated, saved_as=src.arch)
    return _parse_config(src, layout, shapes, name_match, stated), facts.architecture


def _list_author_notes(
    src: Source, cfg: ViTConfig, facts: Facts, recipe: Recipe | None
) -> list[str]:
    """Return what differs from the authors' own use of a published model, a line each."""
    if recipe is not None:
        return [recipe.note] if recipe.note else []
    if not src.is_hub or facts.pool is not None or cfg.num_classes:
        return []
    from vitlib.checkpoint.published import describe_pool

    line = describe_pool(src.name, cfg.pool)
    return [line] if line else []


def _find_recipe(facts: Facts) -> Recipe | None:
    """Return the recipe of a published model that is stated by its id, if there is one."""
    if facts.architecture is None or "/" not in facts.architecture:
        return None
    from vitlib.checkpoint.published import find_recipe

    return find_recipe(facts.architecture)


def _apply_recipe(
    recipe: Recipe, facts: Facts, src: Source, layout: Layout, shapes: Mapping[str, Shape]
) -> Facts:
    """Return the facts with those of a published model, in the words of its layout."""
    from vitlib.checkpoint.published import apply_recipe

    return apply_recipe(recipe, facts, src.json("config.json") or {}, layout.name, shapes)


def _fit_parts(config: ViTConfig, shapes: Mapping[str, Shape]) -> ViTConfig:
    """Return the caller's config with the parts of its file that no forward must read."""
    parts = auxiliary_fields(shapes)
    if parts["attention_pool"] is not None and config.attention_pool is not None:
        del parts["attention_pool"]  # no tensor says all of it
    return replace(config, **parts)


def _parse_config(
    src: Source, layout: Layout, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """Parse the model's config with the sidecar that save() writes and the caller's facts.

    Raises ConfigError where a stated fact contradicts what the files say.
    """
    parsed = layout.read(src.json, shapes, name_match, facts)
    sidecar = read_sidecar(src.json)
    stated = facts.to_fields()
    # A fact may be stated only where the files are silent, or where it agrees with them.
    open_fields = set(parsed.assumed) - sidecar.keys()
    in_files = {name: sidecar.get(name, getattr(parsed.config, name)) for name in stated}
    clashes = [
        f"{name}={value!r}: the files say {in_files[name]!r}"
        for name, value in stated.items()
        if in_files[name] != value and name not in open_fields
    ]
    if clashes:
        raise ConfigError(f"{'; '.join(clashes)}: leave it out, or give config=ViTConfig(...)")
    extra = stated | sidecar
    config = replace(parsed.config, **extra) if extra else parsed.config
    if config.family != parsed.config.family:
        # The activation is the checkpoint's, where its config says one.
        activation = parsed.config.activation
        config = replace(with_profile(config, layout.profile), activation=activation)
    assumed = tuple(name for name in parsed.assumed if name not in extra)
    doubtful = tuple(name for name in parsed.doubtful if name not in extra)
    return ParsedConfig(config, assumed, doubtful, parsed.notes)


def build_empty(cfg: ViTConfig) -> ViT:
    """Build a model on the meta device.

    Args:
        cfg: The model.

    Returns:
        The modules, whose tensors have shapes and no memory.
    """
    with torch.device("meta"):
        return ViT(cfg)
