"""Read the class names from any key of timm's config.json, of timm or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = ("label_names", "labels", "id2label")  # of timm, its older versions, transformers


def read_labels(
    config: Mapping[str, Any], num_classes: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the names of the classes.

    Args:
        config: timm's config.json.
        num_classes: Number of classes of the head; 0: no head, and no names.

    Returns:
        The field `labels` if there is a name for each class, and a line for each unused key.
    """
    if not num_classes:
        return {}, ()
    wrapped = config.get("model_type") == "timm_wrapper"
    task = {"problem_type": config["problem_type"]} if wrapped and "problem_type" in config else {}
    labels, notes = _read_names(config, num_classes)
    if wrapped and labels.get("labels") == tuple(f"LABEL_{i}" for i in range(num_classes)):
        return task, notes
    return labels | task, notes


def _read_names(
    config: Mapping[str, Any], num_classes: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the field `labels`, and a line for each unused key."""
    raw, key = _find_value(config, _NAMES)
    if raw is None:
        return {}, ()
    labels = _sort_by_id(raw)
    if labels is None or len(labels) != num_classes:
        count = f"{len(labels)} names" if labels is not None else "no list of names"
        return {}, (f"{key} is not used: {count} for {num_classes} classes",)
    described, key = _find_value(config, ("label_descriptions",))
    if described is None:
        return {"labels": tuple(labels)}, ()
    texts = _describe(labels, described)
    if texts is None:
        return {"labels": tuple(labels)}, (f"{key} is not used: it has none of the label_names",)
    return {"labels": tuple(texts)}, ()


def _find_value(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Any, str]:
    """Return the value and the path of the first key that the config or its pretrained_cfg has."""
    pretrained = config.get("pretrained_cfg")
    inner = pretrained if isinstance(pretrained, dict) else {}
    for source, path in ((config, ""), (inner, "pretrained_cfg.")):
        for name in names:
            if source.get(name):
                return source[name], f"config.json's {path}{name}"
    return None, ""


def _sort_by_id(raw: Any) -> list[str] | None:
    """Return names sorted by class, from a list or from an object of ids and names."""
    if isinstance(raw, list):
        are_scalars = all(isinstance(name, str | int | float) for name in raw)
        return [str(name) for name in raw] if are_scalars else None
    if not isinstance(raw, dict):
        return None
    for pairs in (raw.items(), ((value, key) for key, value in raw.items())):
        by_id = {
            _parse_id(index): str(name) for index, name in pairs if isinstance(name, str | int)
        }
        if len(by_id) == len(raw) and set(by_id) == set(range(len(raw))):
            return [by_id[index] for index in range(len(raw))]
    return None


def _parse_id(key: Any) -> int | None:
    """Return the number of a class from a number or its text; None for other values."""
    if isinstance(key, bool) or not isinstance(key, int | str):
        return None
    return int(key) if str(key).isascii() and str(key).isdecimal() else None


def _describe(labels: list[str], described: Any) -> list[str] | None:
    """Return a description for each name that has one; None if no name has one."""
    if isinstance(described, list):
        same = len(described) == len(labels) and all(isinstance(text, str) for text in described)
        return list(described) if same else None
    if not isinstance(described, dict):
        return None
    if any(label in described for label in labels):
        return [str(described.get(label, label)) for label in labels]
    texts = _sort_by_id(described)
    return texts if texts is not None and len(texts) == len(labels) else None
