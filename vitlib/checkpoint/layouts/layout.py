"""What every layout can do: find its tensors, read what the model is, write it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from vitlib.checkpoint.families import FAMILY_NAMES
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import Shape
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.config import ViTConfig, to_pair

Json = Callable[[str], "dict[str, Any] | None"]  # one of the checkpoint's JSON files by its name


class ParsedConfig(NamedTuple):
    """What a checkpoint is, and which of that nothing in it says."""

    config: ViTConfig
    assumed: tuple[str, ...] = ()  # fields that the files do not say
    doubtful: tuple[str, ...] = ()  # those of them that can be wrong: load() warns of each
    notes: tuple[str, ...] = ()  # what is there and not used, each a line that load() logs


@dataclass(frozen=True)
class Serialized:
    """A model in a layout: its tensors and what lies beside them."""

    tensors: dict[str, Tensor]
    weights: str = "model.safetensors"  # the file's name; its suffix says the format
    json: dict[str, dict[str, Any]] = field(default_factory=dict)  # by file name
    wrapper: str | None = None  # of a .pth: the key that the state dict stands under


SIDECAR = "vitlib.json"  # what a layout without a config of its own cannot say, for vitlib


def sidecar_size(json: Json) -> tuple[int, int] | None:
    """Pixels (height, width) that vitlib.json gives, or None."""
    size = (json(SIDECAR) or {}).get("image_size")
    return None if size is None else to_pair("image_size", size)


@dataclass(frozen=True)
class Layout:
    """One way that checkpoints name and describe a ViT.

    find: a file's names -> which are which of ours. read: its JSON, the shapes by our names, what
    was found, what the caller states -> what the model is. write: a model's config and tensors ->
    files; raises ConfigError where the layout cannot hold the model. name_of: our name -> the one
    that a file of this model has. prepare: undoes what no table can say before names are looked at.
    size_of: its JSON -> pixels (height, width) of the positions, None where nothing says them.
    finish: tensors by our names and that size -> the tensors of the model.
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


def read_sidecar(json: Json) -> dict[str, Any]:
    """The fields of ViTConfig that save() wrote beside the weights; empty where there are none."""
    said = json(SIDECAR) or {}
    found: dict[str, Any] = {}
    if "num_heads" in said:
        found["num_heads"] = said["num_heads"]
    if "image_size" in said:
        found["image_size"] = sidecar_size(json)
    if said.get("family") in FAMILY_NAMES:
        found["family"] = said["family"]
    if "problem_type" in said:
        found["problem_type"] = said["problem_type"]
    labels = said.get("labels")
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        found["labels"] = tuple(labels)
    return found
