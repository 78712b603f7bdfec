"""TrainConfig: every setting of a run, which a file, flags and Python all fill.

ALIASES maps the names of Azure ML's image classification component, whose model card vitlib
follows, to the names in settings.py. Nothing here imports torch, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from reprlib import repr as shown  # short, however large the value
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vitlib.errors import ConfigError, is_number
from vitlib.train.augment import Augment
from vitlib.train.settings import NEUTRAL, Loss, Optimizer, Runtime, Tuning
from vitlib.train.yaml_file import parse_yaml


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of a run but the model and the photos.

    Attributes:
        optim: The optimizer and its learning rate.
        tune: The weights that train, and the model's behaviour in training.
        loss: The loss function.
        run: Length of the run, its batches, data and checkpoints.
        augment: Changes of photos in training.

    Raises:
        ConfigError: A value is out of range, or two settings exclude each other.
    """

    optim: Optimizer = field(default_factory=Optimizer)
    tune: Tuning = field(default_factory=Tuning)
    loss: Loss = field(default_factory=Loss)
    run: Runtime = field(default_factory=Runtime)
    augment: Augment = field(default_factory=Augment)

    def __new__(cls, *_: object, **arguments: object) -> TrainConfig:
        """Refuse settings where parts are expected, with a clearer message than TypeError's."""
        for name in arguments.keys() - PARTS.keys():
            is_setting = name in [*setting_parts(), *ALIASES, *SHORT_NAMES]
            remedy = f"TrainConfig.from_dict({{{name!r}: ...}})" if is_setting else _suggest(name)
            raise ConfigError(f"TrainConfig({name}=...): expected parts such as optim=: {remedy}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for part_name, part_type in PARTS.items():
            if not isinstance(getattr(self, part_name), part_type):
                raise ConfigError(
                    f"{part_name}={shown(getattr(self, part_name))}: expected "
                    f"{part_type.__name__}(...); settings by name go to TrainConfig.from_dict"
                )
        for name, low, high in _RANGES:
            value = self.value(name)
            if value is not None and not (is_number(value) and low <= value <= high):
                bound = f"{low} or more" if high == math.inf else f"{low} to {high}"
                raise ConfigError(f"{name}={shown(value)}: expected a number, {bound}")
        for part in (self.optim, self.tune, self.loss, self.run):
            hints = get_type_hints(type(part))
            for item in fields(part):
                _check_type(item.name, getattr(part, item.name), hints[item.name])
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raise ConfigError for settings that exclude each other."""
        if self.run.max_steps == 0:
            raise ConfigError("max_steps=0: expected 1 or more, or -1 to count epochs")
        if self.tune.head_only and (self.tune.lora_r or self.tune.layers_to_freeze):
            raise ConfigError("head_only trains no block: leave lora_r and layers_to_freeze out")
        if self.loss.weighted_loss and (self.loss.class_weights or self.loss.positive_weights):
            raise ConfigError(
                "weighted_loss computes the weights: leave out weighted_loss, or class_weights and "
                "positive_weights"
            )
        if not self.run.num_train_epochs and not self.tune.linear_probe:
            raise ConfigError("num_train_epochs=0: expected 1 or more, or linear_probe as well")
        if self.tune.start_share and not self.tune.linear_probe:
            raise ConfigError("start_share is of linear_probe's weights: expected it as well")
        if self.tune.linear_probe and self.run.fsdp:
            raise ConfigError("linear_probe needs all weights in each process: leave fsdp out")
        changed = [
            f"{item.name}={shown(value)}"
            for part in (self.optim, self.tune, self.loss, self.run)
            for item in fields(part)
            if item.name not in NEUTRAL and (value := getattr(part, item.name)) != item.default
        ]
        if self.run.auto and (changed or self.augment != Augment()):
            given = ", ".join(changed or ["augment"])
            raise ConfigError(f"auto chooses by the photos: leave auto out, or {given}")
        if not self.tune.lora_targets and self.tune.lora_r:
            raise ConfigError("lora_targets is empty: expected some of q, k, v, out, fc1, fc2")

    def list_unused(self) -> list[str]:
        """Return one line for each setting that another setting leaves without effect.

        Returns:
            The lines, each with both settings and their values.
        """
        defaults = {item.name: item.default for part in PARTS.values() for item in fields(part)}
        return [
            f"{name}={shown(self.value(name))} does nothing with {by}={self.value(by)}"
            for names, by, values in _USED_WITH
            for name in names
            if self.value(by) not in values and self.value(name) != defaults[name]
        ]

    def value(self, name: str) -> Any:
        """Return a setting by its name alone; no two parts share a name.

        Args:
            name: A setting, such as "learning_rate".

        Returns:
            Its value.
        """
        return getattr(getattr(self, setting_parts()[name]), name)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return {part: {setting: value}} for a file, tuples as lists.

        Returns:
            Every setting, by part.
        """

        def listify(value: Any) -> Any:
            return [listify(v) for v in value] if isinstance(value, tuple) else value

        return {
            part: {name: listify(value) for name, value in values.items()}
            for part, values in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build a config from names; settings that are absent have their defaults.

        Args:
            values: {setting: value} or {part: {setting: value}}; aliases are allowed. "augment" may
                also be the name of a preset, which single settings of the part then override.

        Returns:
            The config.

        Raises:
            ConfigError: A setting does not exist (the message names the nearest), is given twice,
                or has a value of another type.
        """
        parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        names: set[str] = set()
        for name, value in _flatten(values):
            if name == "augment":
                if not isinstance(value, str):
                    raise ConfigError(
                        f"augment={shown(value)}: expected a set's name such as light, or settings "
                        "of it below"
                    )
                preset = dataclasses.asdict(Augment.from_preset(value))
                parts["augment"] = preset | parts["augment"]
                continue
            part = setting_parts().get(name)
            if part is None and name in PARTS:
                raise ConfigError(f"{name}={shown(value)}: expected settings of this part below it")
            if part is None:
                raise ConfigError(f"no setting {name!r}: {_suggest(name)}")
            if name in names:
                raise ConfigError(f"{name} is given twice")
            names.add(name)
            parts[part][name] = _convert(name, value, get_type_hints(PARTS[part])[name])
        return cls(**{part: PARTS[part](**settings) for part, settings in parts.items()})

    def with_changes(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return a config in which some settings have other values.

        Args:
            values: As in from_dict. A preset of "augment" replaces the whole part.

        Returns:
            The new config.

        Raises:
            ConfigError: As in from_dict.
        """
        changes = dict(_flatten(values))
        unchanged = {
            name: self.value(name)
            for name, part in setting_parts().items()
            if part != "augment" or "augment" not in changes
        }
        return TrainConfig.from_dict({**unchanged, **changes})


PARTS: dict[str, Any] = {
    "optim": Optimizer, "tune": Tuning, "loss": Loss, "run": Runtime, "augment": Augment
}  # fmt: skip
# Settings, and the values of another setting without which they have no effect.
_USED_WITH: tuple[tuple[tuple[str, ...], str, Sequence[Any]], ...] = (
    (("momentum", "nesterov"), "optim", ("sgd",)),
    (("adam_beta1", "adam_beta2", "adam_epsilon"), "optim", ("adamw",)),
    (("lr_power",), "lr_scheduler_type", ("polynomial",)),
    (("lr_end",), "lr_scheduler_type", ("cosine", "linear", "polynomial")),
    (("lora_alpha", "lora_targets"), "lora_r", range(1, 4097)),
)
_INF, _MANY = math.inf, 10**9
# Setting, smallest and largest value. None passes where the field allows it.
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("learning_rate", 0, _INF), ("weight_decay", 0, _INF), ("layer_decay", 0, 1),
    ("adam_beta1", 0, 0.999999), ("adam_beta2", 0, 0.999999), ("adam_epsilon", 0, _INF),
    ("momentum", 0, 1), ("max_grad_norm", 0, _INF), ("warmup_ratio", 0, 1),
    ("warmup_steps", 0, _MANY), ("lr_end", 0, 1), ("lr_power", 0, _INF),
    ("layers_to_freeze", 0, _MANY), ("lora_r", 0, 4096), ("start_share", 0, 1),
    ("lora_alpha", 0, _INF), ("drop_path", 0, 0.99), ("dropout", 0, 0.99),
    ("attention_dropout", 0, 0.99), ("ema_decay", 0, 1), ("image_size", 0, 8192),
    ("label_smoothing_factor", 0, 0.99), ("weighted_loss", 0, 2), ("num_train_epochs", 0, _MANY),
    ("max_steps", -1, _MANY), ("per_device_train_batch_size", 1, _MANY),
    ("per_device_eval_batch_size", 1, _MANY), ("gradient_accumulation_steps", 1, _MANY),
    ("seed", 0, 2**32 - 1), ("dataloader_num_workers", 0, 256), ("validation_split", 0, 0.9),
    ("eval_epochs", 1, _MANY), ("early_stopping_patience", 0, _MANY),
    ("early_stopping_threshold", 0, _INF), ("save_steps", 0, _MANY), ("save_total_limit", 1, _MANY),
)  # fmt: skip

# Names of Azure ML's component -> names of settings, and its values -> values of settings.
ALIASES: dict[str, str] = {
    "number_of_epochs": "num_train_epochs",
    "training_batch_size": "per_device_train_batch_size",
    "validation_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_step": "gradient_accumulation_steps",
    "number_of_workers": "dataloader_num_workers",
    "optimizer": "optim",
    "learning_rate_scheduler": "lr_scheduler_type",
    "random_seed": "seed",
    "image_width": "image_size",
    "image_height": "image_size",
    "early_stopping_delay": "early_stopping_patience",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
}
# Short names of settings, in files and as flags.
SHORT_NAMES = {
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
}
_VALUES: dict[str, dict[Any, Any]] = {
    "lr_scheduler_type": {
        "warmup_linear": "linear", "warmup_cosine": "cosine", "warmup_polynomial": "polynomial",
        "warmup_constant": "constant",
    },
    "optim": {"adamw_hf": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw"},
    "precision": {16: "fp16", 32: "fp32", "16": "fp16", "32": "fp32"},
    "weighted_loss": {False: 0, True: 1},
    "image_size": {-1: 0},
}  # fmt: skip


def setting_parts() -> dict[str, str]:
    """Return the name of the part that each setting belongs to."""
    return {item.name: part for part, part_type in PARTS.items() for item in fields(part_type)}


def read_yaml(text: str, name: str) -> TrainConfig:
    """Parse a settings file.

    Args:
        text: The content of the file.
        name: Name of the file, for messages.

    Returns:
        The config.

    Raises:
        ConfigError: The text is no YAML, or from_dict refuses its settings.
    """
    values = parse_yaml(text, name)
    try:
        return TrainConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _flatten(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (setting, value) pairs: parts opened, aliases replaced, equal pairs once."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if key in PARTS and isinstance(value, Mapping):
            pairs += _flatten(value)
            continue
        # YAML's value of a part whose lines are deleted.
        if key in PARTS and value is None:
            continue
        # Azure ML's single switch for all augmentation.
        if key == "apply_augmentations":
            if value not in (True, False):
                raise ConfigError(f"{key}={shown(value)}: expected true or false")
            key, value = "augment", "card" if value else "none"
        name = ALIASES.get(key, SHORT_NAMES.get(key, str(key)))
        if name in _VALUES and isinstance(value, int | str):
            value = _VALUES[name].get(value, value)
        # image_width and image_height are one setting here: equal values are no contradiction.
        if (name, value) not in pairs:
            pairs.append((name, value))
    return pairs


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Convert a value from a file or flag to the type of its field; _check_type does the rest."""
    if hint != unwrap_optional(hint) and (value is None or str(value).lower() in ("none", "null")):
        return None
    hint = unwrap_optional(hint)
    if get_origin(hint) is tuple:
        if isinstance(value, str):
            value = [part for part in value.replace(",", " ").split() if part]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name}={shown(value)}: expected a list")
        inner, *rest = get_args(hint)
        if rest != [...] and len(value) != 1 + len(rest):
            raise ConfigError(f"{name}={shown(value)}: expected {1 + len(rest)} numbers")
        return tuple(_convert(name, item, inner) for item in value)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"{name}={shown(value)}: expected a number") from error
    return value


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ConfigError for a value that is not of its field's type."""
    if value is None and hint != unwrap_optional(hint):
        return
    hint = unwrap_optional(hint)
    if get_origin(hint) is tuple:
        for item in value:
            _check_type(name, item, get_args(hint)[0])
    elif get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ConfigError(f"{name}={shown(value)}: expected one of {choices}")
    elif hint is bool and not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: expected true or false")
    elif hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{name}={shown(value)}: expected a whole number")
    elif hint is float and not is_number(value):
        raise ConfigError(f"{name}={shown(value)}: expected a number")
    elif hint is str and not isinstance(value, str):
        raise ConfigError(f"{name}={shown(value)}: expected text")


def unwrap_optional(hint: Any) -> Any:
    """Return the type T of a hint `T | None`, and any other hint as it is.

    Args:
        hint: The type hint of a setting.

    Returns:
        The hint without None.
    """
    inner = [item for item in get_args(hint) if item is not type(None)]
    return inner[0] if get_origin(hint) is UnionType else hint


def _suggest(name: str) -> str:
    """Return a hint for a setting that does not exist."""
    from difflib import get_close_matches

    close = get_close_matches(name, [*setting_parts(), *ALIASES], 3, 0.5)
    return f"did you mean {' or '.join(close)}?" if close else "`vitlib finetune --help` lists all"
