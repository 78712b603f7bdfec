"""Every architecture that vitlib knows by name: timm's, open_clip's and transformers'.

All facts are those of the tables by which checkpoints are read. A model_type of transformers has
no size of its own: its published models are entries, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from vitlib.checkpoint.layouts import openclip_models, timm_models
from vitlib.checkpoint.layouts.hf_types import (
    list_containers,
    list_published,
    list_reasons,
    list_types,
)
from vitlib.checkpoint.named_config import (
    build_named_config,
    explain_openclip_refusal,
    find_nearest,
    find_timm,
    read_openclip,
)
from vitlib.config import ViTConfig
from vitlib.errors import ConfigError

TIMM, TRANSFORMERS, OPENCLIP = "timm", "transformers", "open_clip"
_WILDCARDS = "*?["
_SIZES = ("embed_dim", "depth", "num_heads", "mlp_dim")
_SIDES = ("image_size", "patch_size")


@dataclass(frozen=True, kw_only=True)
class ListedArchitecture:
    """An architecture by its name in a library.

    Attributes:
        name: Name in the library: of an architecture, a model_type, a published checkpoint or a
            config.
        library: "timm", "transformers" or "open_clip".
        family: `ViTConfig.family`; empty if vitlib does not compute it, or for any family.
        embed_dim: Width; None if no table says it, as for the next four.
        depth: Number of blocks.
        num_heads: Number of heads.
        mlp_dim: Width of the MLP.
        image_size: Side of the square images, in pixels.
        patch_sizes: Sides of the square patches, in pixels; several if published models of this
            width differ in the patch alone.
        model_type: Of transformers' config.json.
        hub_id: A published checkpoint.
        new_name: Current name, if this is a name of earlier versions.
        reason: Reason why vitlib does not load it; empty if it does.
    """

    name: str
    library: str
    family: str = ""
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_dim: int | None = None
    image_size: int | None = None
    patch_sizes: tuple[int, ...] = ()
    model_type: str = ""
    hub_id: str = ""
    new_name: str = ""
    reason: str = ""

    @property
    def loads(self) -> bool:
        """True if vitlib loads checkpoints of the architecture."""
        return not self.reason

    @property
    def size(self) -> str:
        """The sizes in words, such as "768 wide, 12 blocks, 12 heads, patch 16, 224 pixels"."""
        if self.loads and self.library == TRANSFORMERS and self.embed_dim is None:
            return "any"
        parts = {
            "{} wide": self.embed_dim,
            "{} blocks": self.depth,
            "{} heads": self.num_heads,
            "patch {}": "/".join(map(str, self.patch_sizes)),
            "{} pixels": self.image_size,
        }
        return ", ".join(form.format(value) for form, value in parts.items() if value)

    @property
    def status(self) -> str:
        """The verdict in words: "loads", or "refused" with the reason."""
        renamed = f"now {self.new_name}; " if self.new_name else ""
        return renamed + (f"refused: {self.reason}" if self.reason else "loads")

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes and `loads`, in types that JSON has."""
        return {**asdict(self), "patch_sizes": [*self.patch_sizes], "loads": self.loads}


def list_architectures(pattern: str | None = None) -> tuple[ListedArchitecture, ...]:
    """List the architectures that vitlib knows, by library and name.

    Args:
        pattern: A part of the name, or a pattern with `*`, `?` and `[...]` of the whole name, in
            small or capital letters. None: all.

    Returns:
        The architectures, also those that vitlib refuses.

    Raises:
        ConfigError: No name matches; the message has the nearest names.
    """
    entries = [*_list_timm(), *_list_transformers(), *_list_openclip()]
    if pattern is None:
        return tuple(entries)
    wanted = pattern.lower()
    if any(character in pattern for character in _WILDCARDS):
        matching = [entry for entry in entries if fnmatchcase(entry.name.lower(), wanted)]
    else:
        matching = [entry for entry in entries if wanted in entry.name.lower()]
    if not matching:
        nearest = find_nearest(pattern, (entry.name for entry in entries))
        raise ConfigError(
            f"no architecture is called {pattern!r}: expected a part of a name, or a pattern in "
            f"quotes such as 'vit_*siglip*'{nearest}"
        )
    return tuple(matching)


def _list_timm() -> Iterator[ListedArchitecture]:
    """Yield timm's architectures, then the names of earlier versions."""
    entries = {
        model.name: _describe_timm(model.name, model) for model in timm_models.list_architectures()
    }
    yield from _sort(entries.values())
    old_names = timm_models.list_old_names().items()
    yield from _sort(replace(entries[new], name=old, new_name=new) for old, new in old_names)


def _describe_timm(name: str, model: timm_models.Architecture) -> ListedArchitecture:
    """Describe an architecture of timm; the table has the sizes of some refused ones, too."""
    if not model.reason:
        return _describe_config(name, TIMM, build_named_config(model.name))
    entry = _describe_sizes(name, TIMM, {**model.structure, **model.facts})
    return replace(entry, reason=model.reason)


def _describe_config(name: str, library: str, cfg: ViTConfig) -> ListedArchitecture:
    """Describe an architecture by its config."""
    sizes = {field: getattr(cfg, field) for field in (*_SIZES, *_SIDES)}
    return replace(_describe_sizes(name, library, sizes), family=cfg.family)


def _describe_sizes(name: str, library: str, sizes: Mapping[str, Any]) -> ListedArchitecture:
    """Describe an architecture by the fields of ViTConfig that are its sizes, or some of them."""
    image, patch = (sizes.get(field) for field in _SIDES)
    return ListedArchitecture(
        name=name,
        library=library,
        embed_dim=sizes.get("embed_dim"),
        depth=sizes.get("depth"),
        num_heads=sizes.get("num_heads"),
        mlp_dim=sizes.get("mlp_dim"),
        image_size=image[0] if isinstance(image, tuple) else image,
        patch_sizes=() if patch is None else (patch[0] if isinstance(patch, tuple) else patch,),
    )


def _list_transformers() -> Iterator[ListedArchitecture]:
    """Yield the model types of transformers, then published checkpoints."""
    types = {name: family for name, (family, _) in list_types().items()}
    for name, container in list_containers().items():
        types[name] = types.get(container.model_type, "")
    entries = [
        ListedArchitecture(name=name, library=TRANSFORMERS, family=family, model_type=name)
        for name, family in types.items()
    ]
    entries += [
        ListedArchitecture(name=name, library=TRANSFORMERS, model_type=name, reason=reason)
        for name, reason in list_reasons().items()
    ]
    yield from _sort(entries)
    yield from _sort(
        ListedArchitecture(
            name=row.repository,
            library=TRANSFORMERS,
            family=types[row.model_type],
            embed_dim=row.embed_dim,
            num_heads=row.num_heads,
            mlp_dim=row.mlp_dim,
            patch_sizes=row.patches,
            model_type=row.model_type,
            hub_id=row.repository,
        )
        for row in list_published()
    )


def _list_openclip() -> Iterator[ListedArchitecture]:
    """Yield open_clip's configs."""
    yield from _sort(_describe_openclip(row) for row in openclip_models.load_rows().values())


def _describe_openclip(row: openclip_models.Row) -> ListedArchitecture:
    """Describe the image tower of a config of open_clip."""
    reason = explain_openclip_refusal(row)
    if not reason:
        return _describe_config(row["name"], OPENCLIP, read_openclip(row))
    if not row["timm_model_name"]:
        entry = _describe_sizes(row["name"], OPENCLIP, openclip_models.parse_tower(row))
        return replace(entry, reason=reason)
    model = find_timm(row["timm_model_name"])
    if model is None:
        return ListedArchitecture(name=row["name"], library=OPENCLIP, reason=reason)
    entry = _describe_timm(row["name"], model)
    return replace(entry, library=OPENCLIP, family="", reason=reason)


def _sort(entries: Iterable[ListedArchitecture]) -> list[ListedArchitecture]:
    """Sort entries by name, without regard to capital letters."""
    return sorted(entries, key=lambda entry: entry.name.lower())
