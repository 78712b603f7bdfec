"""Facts that no tensor holds: stated by the caller, or shared by all published models.

The tensors of a file do not say the number of heads, the form of GELU or the pooling. Where a
config or a name says them, they are read there. A bare file is compared with the published models
whose tensors have its shapes. Where those agree, their value is right; where they differ, the
caller states it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vitlib.errors import CheckpointError, ConfigError

_SHOWN = 3  # names of published models in a message


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts that the caller states of a checkpoint; None: not stated.

    Attributes:
        architecture: A model's name in timm or open_clip.
        num_heads: Number of heads.
        activation: As in ViTConfig.
        pool: As in ViTConfig.
        saved_as: Name that training code saved with the weights: timm's, or its own.
        published: Name in timm_models.csv of a published model that takes the place of the
            architecture in its config.json: authors leave out what they pass in code.
    """

    architecture: str | None = None
    num_heads: int | None = None
    activation: str | None = None
    pool: str | None = None
    saved_as: str | None = None
    published: str | None = None

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of ViTConfig among them that are stated."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["architecture"], values["saved_as"], values["published"]
        return {name: value for name, value in values.items() if value is not None}

    def check(self, config: object) -> None:
        """Check the facts against the caller's own config.

        Args:
            config: A ViTConfig.

        Raises:
            ConfigError: They contradict each other.
        """
        clashes = [
            f"{name}={value!r}: config= says {getattr(config, name)!r}"
            for name, value in self.to_fields().items()
            if getattr(config, name) != value
        ]
        if clashes:
            raise ConfigError(f"{'; '.join(clashes)}: give one of both")


def resolve_facts(published: Mapping[str, Mapping[str, Any]], facts: Facts) -> dict[str, Any]:
    """Return what all published models of a file's shapes agree on, or the caller states.

    Args:
        published: Name of each published model with these tensors -> its facts, field by field.
            Every model has the same fields.
        facts: What the caller states. A stated fact leaves only the models that have it.

    Returns:
        The fields, empty where nothing is published with these tensors.

    Raises:
        CheckpointError: The models differ in a field that is not stated, or none of them has what
            is stated.
    """
    stated = facts.to_fields()
    models = {
        name: model
        for name, model in published.items()
        if all(model.get(field, value) == value for field, value in stated.items())
    }
    if not models and published:
        raise CheckpointError(
            f"{_join(stated)} is stated, and no published model with these tensors has it: "
            f"{_choices(published)}; for a model of your own give config=ViTConfig(...)"
        )
    if len({tuple(sorted(model.items(), key=str)) for model in models.values()}) > 1:
        raise CheckpointError(
            f"no file says which published model this is: {_choices(models)}: state which with "
            f"{_remedies(models)}"
        )
    return dict(next(iter(models.values()), {}))


PREPROCESSING_REMEDY = (
    "If this is wrong, give profile= (--profile) or image_processor=, or put a "
    "preprocessor_config.json beside the file"
)


def remedy(names: Iterable[str]) -> str:
    """Explain how a caller states fields, in Python and on the command line.

    Args:
        names: Fields of ViTConfig.

    Returns:
        The arguments and options.
    """
    names = list(names)
    single = [name for name in names if name in Facts.__dataclass_fields__]
    rest = [name for name in names if name not in single]
    options = ", ".join("--" + name.replace("_", "-") for name in single)
    remedies = [f"{', '.join(f'{name}=' for name in single)} ({options})"] if single else []
    remedies += [f"config=ViTConfig(...) for {', '.join(rest)}"] if rest else []
    return " or ".join(remedies)


def _choices(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the different sets of facts, each with some of the models that have it."""
    differing = _differing(models)
    by_facts: dict[str, list[str]] = {}
    for name, model in models.items():
        by_facts.setdefault(_join({f: model[f] for f in differing}) or "these", []).append(name)
    return ", or ".join(
        f"{values} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for values, names in by_facts.items()
    )


def _remedies(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the arguments that tell these models apart."""
    open_fields = [name for name in _differing(models) if name in Facts.__dataclass_fields__]
    first = next(iter(models))
    remedies = [f"{name}={next(iter(models.values()))[name]!r}" for name in open_fields]
    named = f"architecture={first!r}"
    options = ", ".join("--" + name.replace("_", "-") for name in [*open_fields, "architecture"])
    return (
        f"{' and '.join(remedies)} or {named} ({options})" if remedies else f"{named} ({options})"
    )


def _differing(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the fields in which the models are not all the same."""
    names = dict.fromkeys(name for model in models.values() for name in model)
    return [name for name in names if len({str(model.get(name)) for model in models.values()}) > 1]


def _join(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
