"""The form of a layout: match its names, read its config, write it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from vitlib.checkpoint.families import FAMILY_NAMES
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import Shape
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.config import ViTConfig
from vitlib.errors import to_pair

LayoutName = Literal["hf", "timm", "meta", "torchvision", "openclip", "jax", "vitlib"]
Json = Callable[[str], "dict[str, Any] | None"]  # name -> one of the checkpoint's JSON files


class ParsedConfig(NamedTuple):
    """A model as its files describe it.

    Attributes:
        config: The model.
        assumed: Fields that the files do not say.
        doubtful: Assumed fields that can be wrong: load() logs each.
        notes: Content of the files that is not used, each a line that load() logs.
    """

    config: ViTConfig
    assumed: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Serialized:
    """A model in a layout: tensors and JSON files.

    Attributes:
        tensors: By the file's names.
        weights: Name of the weights file; the suffix says the format.
        json: JSON files by name.
        wrapper: Key of a .pth under which the state dict stands.
    """

    tensors: dict[str, Tensor]
    weights: str = "model.safetensors"
    json: dict[str, dict[str, Any]] = field(default_factory=dict)
    wrapper: str | None = None


SIDECAR = "vitlib.json"  # what the layout's own files cannot say, for vitlib


def sidecar_size(json: Json) -> tuple[int, int] | None:
    """Read the image size from vitlib.json.

    Args:
        json: The checkpoint's JSON files by name.

    Returns:
        Pixels (height, width), or None.
    """
    size = (json(SIDECAR) or {}).get("image_size")
    return None if size is None else to_pair("image_size", size)


@dataclass(frozen=True)
class Layout:
    """The names and the config by which one library stores a ViT.

    Attributes:
        name: Of the layout.
        profile: The library whose numerics and preprocessing its files are run with.
        find: Names of a file -> the names matched with vitlib's.
        read: (JSON files, shapes by vitlib's names, matched names, stated facts) -> the model.
        write: (config, tensors) -> files; raises ConfigError where it cannot hold them.
        file_name: (vitlib's name, config) -> the name in a file of this model.
        prepare: Changes of tensors before their names are matched, which no table can express.
        read_image_size: JSON files -> pixels (height, width) of the positions; None: not said.
        finish: (tensors by vitlib's names, image size) -> the tensors of the model.
        absorb: (config, tensors by vitlib's names, JSON files) -> the tensors, where the library's
            code orders or shares them otherwise.
    """

    name: str
    profile: str
    find: Callable[[Iterable[str]], NameMatch]
    read: Callable[[Json, Mapping[str, Shape], NameMatch, Facts], ParsedConfig]
    write: Callable[[ViTConfig, dict[str, Tensor]], Serialized]
    file_name: Callable[[str, ViTConfig], str]
    prepare: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    read_image_size: Callable[[Json], tuple[int, int] | None] = sidecar_size
    finish: Callable[[dict[str, Tensor], tuple[int, int] | None], dict[str, Tensor]] = (
        lambda state, _: state
    )
    absorb: Callable[[ViTConfig, dict[str, Tensor], Json], dict[str, Tensor]] = (
        lambda _, state, __: state
    )


def read_sidecar(json: Json) -> dict[str, Any]:
    """Read the fields of ViTConfig that save() wrote into vitlib.json.

    Args:
        json: The checkpoint's JSON files by name.

    Returns:
        The fields; empty where there is no such file.
    """
    content = json(SIDECAR) or {}
    names = ("num_heads", "problem_type")
    fields: dict[str, Any] = {name: content[name] for name in names if name in content}
    if "image_size" in content:
        fields["image_size"] = sidecar_size(json)
    if content.get("family") in FAMILY_NAMES:
        fields["family"] = content["family"]
    labels = content.get("labels")
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        fields["labels"] = tuple(labels)
    return fields
