"""The names of classes wherever timm and transformers keep them in timm's config.json."""

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
        num_classes: Of the head; 0: there is none, and no name is looked for.

    Returns:
        The field `labels` where there is a name for each class, and what is there and not used.
    """
    if not num_classes:
        return {}, ()
    wrapped = config.get("model_type") == "timm_wrapper"  # of transformers, which names all classes
    task = {"problem_type": config["problem_type"]} if wrapped and "problem_type" in config else {}
    labels, notes = _read_names(config, num_classes)
    if wrapped and labels.get("labels") == tuple(f"LABEL_{i}" for i in range(num_classes)):
        return task, notes
    return labels | task, notes


def _read_names(
    config: Mapping[str, Any], num_classes: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the field `labels`, and say what is there and not used."""
    raw, where = _first(config, _NAMES)
    if raw is None:
        return {}, ()
    labels = _in_order(raw)
    if labels is None or len(labels) != num_classes:
        count = f"{len(labels)} names" if labels is not None else "no list of names"
        return {}, (f"{where} is not used: {count} for {num_classes} classes",)
    described, where = _first(config, ("label_descriptions",))
    if described is None:
        return {"labels": tuple(labels)}, ()
    texts = _describe(labels, described)
    if texts is None:
        return {"labels": tuple(labels)}, (f"{where} is not used: it has none of the label_names",)
    return {"labels": tuple(texts)}, ()


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Any, str]:
    """Return the first of the names that the config, or its pretrained_cfg, has, and its path."""
    pretrained = config.get("pretrained_cfg")
    inner = pretrained if isinstance(pretrained, dict) else {}
    for source, path in ((config, ""), (inner, "pretrained_cfg.")):
        for name in names:
            if source.get(name):
                return source[name], f"config.json's {path}{name}"
    return None, ""


def _in_order(raw: Any) -> list[str] | None:
    """Return names by class: of a list, of an object by ids, or of an object of ids by names."""
    if isinstance(raw, list):
        plain = all(isinstance(name, str | int | float) for name in raw)
        return [str(name) for name in raw] if plain else None
    if not isinstance(raw, dict):
        return None
    for pairs in (raw.items(), ((value, key) for key, value in raw.items())):
        by_id = {_id(key): str(name) for key, name in pairs if isinstance(name, str | int)}
        if len(by_id) == len(raw) and set(by_id) == set(range(len(raw))):
            return [by_id[index] for index in range(len(raw))]
    return None


def _id(key: Any) -> int | None:
    """Return the number of a class, of a number or its text; None for any other."""
    if isinstance(key, bool) or not isinstance(key, int | str):
        return None
    return int(key) if str(key).isascii() and str(key).isdecimal() else None


def _describe(labels: list[str], described: Any) -> list[str] | None:
    """Return a description for each name that has one; None where none has."""
    if isinstance(described, list):
        same = len(described) == len(labels) and all(isinstance(text, str) for text in described)
        return list(described) if same else None
    if not isinstance(described, dict):
        return None
    if any(label in described for label in labels):
        return [str(described.get(label, label)) for label in labels]
    texts = _in_order(described)
    return texts if texts is not None and len(texts) == len(labels) else None
