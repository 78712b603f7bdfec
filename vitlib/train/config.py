"""How to train, as data: nested frozen dataclasses that a file, flags and Python all fill.

Names are those of transformers' TrainingArguments where it has one; ALIASES has those of the model
card's fine-tuning component. Nothing here imports torch: the command line shows every setting
without it.

Sources: Loshchilov and Hutter 1711.05101 (AdamW), 1608.03983 (cosine); Clark et al. 2003.10555
(learning rates that fall with depth); Hu et al. 2106.09685 (LoRA); Szegedy et al. 1512.00567 (label
smoothing); Polyak averages as in Tarvainen and Valpola 1703.01780 (EMA).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from reprlib import repr as shown  # short, however large the value
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vitlib.config import is_number
from vitlib.errors import ConfigError
from vitlib.train.augment import Augment, option
from vitlib.train.yaml_file import values_of

OptimizerName = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "linear", "polynomial", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
Split = Literal["stratified", "fifth"]
BadImage = Literal["fail", "skip"]
Cache = Literal["auto", "memory", "none"]
FitMode = Literal["checkpoint", "squash"]
Init = Literal["mimetic", "normal"]
LoraTarget = Literal["q", "k", "v", "out", "fc1", "fc2"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights move."""

    optim: OptimizerName = option("adamw", "AdamW, or SGD with momentum.")
    learning_rate: float = option(1e-4, "Of the head; lower down: layer_decay.")
    weight_decay: float = option(0.05, "Not on biases, norms, tokens, positions and LayerScale.")
    layer_decay: float = option(0.75, "Each block's rate as a share of the next one's; 1: equal.")
    adam_beta1: float = option(0.9, "How slowly AdamW's mean of gradients follows.")
    adam_beta2: float = option(0.999, "The same of their squares.")
    adam_epsilon: float = option(1e-8, "Under the fraction of AdamW's step.")
    momentum: float = option(0.9, "Of sgd.")
    nesterov: bool = option(True, "Of sgd.")
    max_grad_norm: float = option(1.0, "Gradients longer than this are shortened; 0: never.")
    lr_scheduler_type: Schedule = option("cosine", "How the rate falls after the warm-up.")
    warmup_ratio: float = option(0.1, "Share of the steps in which the rate rises from 0.")
    warmup_steps: int = option(0, "The same in steps, before the ratio.")
    lr_end: float = option(0.0, "What the rate falls to, as a share of learning_rate.")
    lr_power: float = option(2.0, "Of polynomial.")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Which weights move, and what is done to them."""

    head_only: bool = option(False, "Train the head alone; without augmentation in seconds.")
    layers_to_freeze: int = option(0, "The first so many of the embedding and the blocks.")
    lora_r: int = option(0, "Rank of low-rank updates in place of full ones; 0: full ones.")
    lora_alpha: float = option(16.0, "Their scale is lora_alpha / lora_r.")
    lora_targets: tuple[LoraTarget, ...] = option(("q", "v"), "Of q k v out fc1 fc2.")
    drop_path: float | None = option(
        None, "Stochastic depth of the last block; rises from 0. Default: the checkpoint's."
    )
    dropout: float | None = option(
        None, "Of the embedding and each branch. Default: the checkpoint's."
    )
    attention_dropout: float | None = option(
        None, "Of the attention probabilities. Default: the checkpoint's."
    )
    gradient_checkpointing: bool = option(False, "Less memory, a third more arithmetic.")
    ema_decay: float = option(0.0, "Averages of the weights are the model; 0: none.")
    image_size: int = option(0, "Pixels of a side; 0: the checkpoint's.")
    init: Init = option(
        "mimetic", "A new model's first weights: as trained ones look, or DeiT's normal of 0.02."
    )
    fit: FitMode = option(
        "checkpoint", "How photos get there: as the checkpoint does, or squash: whole, uncropped."
    )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is made small."""

    label_smoothing_factor: float = option(0.0, "Share of a label that the other classes get.")
    weighted_loss: int = option(
        0, "For rare classes: 1 by the root of their rarity, 2 by their rarity, 0 not."
    )
    class_weights: tuple[float, ...] = option((), "A weight a class, in the labels' order.")
    positive_weights: tuple[float, ...] = option((), "Multi-label: of each class's positives.")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How long, how many at a time, from what, and what is kept."""

    num_train_epochs: int = option(15, "Times that each photo is seen.")
    max_steps: int = option(-1, "Steps in place of epochs.")
    per_device_train_batch_size: int = option(32, "Photos a process and pass.")
    per_device_eval_batch_size: int = option(32, "The same in evaluation.")
    gradient_accumulation_steps: int = option(1, "Passes a step.")
    fsdp: bool = option(
        False, "Share weights, gradients and averages out among the processes (FSDP2)."
    )
    precision: Precision = option("fp32", "Of the arithmetic; weights stay fp32. fp16 is for CUDA.")
    seed: int = option(42, "Of everything that is drawn.")
    dataloader_num_workers: int = option(0, "Processes that read photos; 0: threads of this one.")
    cache: Cache = option("auto", "Keep photos in memory: where they fit, always, never.")
    on_bad_image: BadImage = option("fail", "Stop at a photo that cannot be read, or leave it out.")
    validation_split: float = option(0.2, "Share held out where no validation set is given.")
    split: Split = option("stratified", "By class and seed, or every fifth row.")
    eval_epochs: int = option(1, "Epochs from one evaluation to the next.")
    metric_for_best_model: str = option(
        "", "Default: accuracy; multi-label: iou; regression: root_mean_squared_error. Or loss."
    )
    greater_is_better: bool | None = option(None, "Default: unless it is a loss or an error.")
    early_stopping_patience: int = option(0, "Evaluations without a better one; 0: never stop.")
    early_stopping_threshold: float = option(0.0, "By how much better it must be.")
    save_steps: int = option(0, "A checkpoint each so many steps beside each evaluation's.")
    save_total_limit: int = option(2, "Of them, the last so many are kept.")
    tensorboard: bool = option(False, "Write events for it too.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything about a run but the model and the photos.

    Raises ConfigError for what no run can have.
    """

    optim: Optimizer = field(default_factory=Optimizer)
    tune: Tuning = field(default_factory=Tuning)
    loss: Loss = field(default_factory=Loss)
    run: Runtime = field(default_factory=Runtime)
    augment: Augment = field(default_factory=Augment)

    def __new__(cls, *_: object, **given: object) -> TrainConfig:
        """Refuse settings where their parts are expected, before Python's TypeError does."""
        for name in given.keys() - PARTS.keys():
            known = name in setting_parts() or name in ALIASES
            like = f"TrainConfig.from_dict({{{name!r}: ...}})" if known else _near(name)
            raise ConfigError(f"TrainConfig({name}=...): expected parts such as optim=: {like}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for part_name, part_kind in PARTS.items():
            if not isinstance(getattr(self, part_name), part_kind):
                raise ConfigError(
                    f"{part_name}={shown(getattr(self, part_name))}: expected "
                    f"{part_kind.__name__}(...); settings by name go to TrainConfig.from_dict"
                )
        for name, low, high in _RANGES:
            value = self.value(name)
            if value is not None and not (is_number(value) and low <= value <= high):
                bound = f"{low} or more" if high == math.inf else f"{low} to {high}"
                raise ConfigError(f"{name}={shown(value)}: expected a number, {bound}")
        for part in (self.optim, self.tune, self.loss, self.run):
            hints = get_type_hints(type(part))
            for one in fields(part):
                _check_kind(one.name, getattr(part, one.name), hints[one.name])
        if self.run.max_steps == 0:
            raise ConfigError("max_steps=0: expected 1 or more; -1: epochs say how many")
        if self.tune.head_only and (self.tune.lora_r or self.tune.layers_to_freeze):
            raise ConfigError("head_only trains no block: leave lora_r and layers_to_freeze out")
        if self.loss.weighted_loss and (self.loss.class_weights or self.loss.positive_weights):
            raise ConfigError("weighted_loss counts the weights itself: give them or it")
        if not self.tune.lora_targets and self.tune.lora_r:
            raise ConfigError("lora_targets is empty: expected some of q, k, v, out, fc1, fc2")

    def unused(self) -> list[str]:
        """A line for each setting that another one leaves without effect."""
        defaults = {one.name: one.default for kind in PARTS.values() for one in fields(kind)}
        return [
            f"{name}={shown(self.value(name))} does nothing with {by}={self.value(by)}"
            for names, by, values in _USED_WITH
            for name in names
            if self.value(by) not in values and self.value(name) != defaults[name]
        ]

    def value(self, name: str) -> Any:
        """A setting by its name alone: no two parts share one."""
        return getattr(getattr(self, setting_parts()[name]), name)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """For a file: {part: {setting: value}}, tuples as lists."""

        def plain(value: Any) -> Any:
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {
            part: {name: plain(value) for name, value in values.items()}
            for part, values in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """{setting: value} or {part: {setting: value}}, aliases welcome; what is absent is default.

        Raises ConfigError for a setting that does not exist (and names the nearest), is given
        twice or is of another kind.
        """
        found: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        seen: set[str] = set()
        for name, value in _flat(values):
            if name == "augment":  # a preset, beside which single settings count
                if not isinstance(value, str):
                    raise ConfigError(
                        f"augment={shown(value)}: expected a set's name such as light, or settings "
                        "of it below"
                    )
                preset = dataclasses.asdict(Augment.named(value))
                found["augment"] = preset | found["augment"]
                continue
            part = setting_parts().get(name)
            if part is None and name in PARTS:
                raise ConfigError(f"{name}={shown(value)}: expected settings of this part below it")
            if part is None:
                raise ConfigError(f"no setting {name!r}: {_near(name)}")
            if name in seen:
                raise ConfigError(f"{name} is given twice")
            seen.add(name)
            found[part][name] = _as_kind(name, value, get_type_hints(PARTS[part])[name])
        return cls(**{part: PARTS[part](**given) for part, given in found.items()})

    def with_changes(self, values: Mapping[str, Any]) -> TrainConfig:
        """The same but for these settings, by names or aliases. Errors as in from_dict."""
        asked = dict(_flat(values))
        kept = {
            name: self.value(name)
            for name, part in setting_parts().items()
            if part != "augment" or "augment" not in asked  # a preset comes in place of all of it
        }
        return TrainConfig.from_dict({**kept, **asked})


PARTS: dict[str, Any] = {
    "optim": Optimizer, "tune": Tuning, "loss": Loss, "run": Runtime, "augment": Augment
}  # fmt: skip
# Settings, and the values of another one without which they do nothing.
_USED_WITH: tuple[tuple[tuple[str, ...], str, Sequence[Any]], ...] = (
    (("momentum", "nesterov"), "optim", ("sgd",)),
    (("adam_beta1", "adam_beta2", "adam_epsilon"), "optim", ("adamw",)),
    (("lr_power",), "lr_scheduler_type", ("polynomial",)),
    (("lr_end",), "lr_scheduler_type", ("cosine", "linear", "polynomial")),
    (("lora_alpha", "lora_targets"), "lora_r", range(1, 4097)),
)
_INF, _MANY = math.inf, 10**9
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("learning_rate", 0, _INF), ("weight_decay", 0, _INF), ("layer_decay", 0, 1),
    ("adam_beta1", 0, 0.999999), ("adam_beta2", 0, 0.999999), ("adam_epsilon", 0, _INF),
    ("momentum", 0, 1), ("max_grad_norm", 0, _INF), ("warmup_ratio", 0, 1),
    ("warmup_steps", 0, _MANY), ("lr_end", 0, 1), ("lr_power", 0, _INF),
    ("layers_to_freeze", 0, _MANY), ("lora_r", 0, 4096),
    ("lora_alpha", 0, _INF), ("drop_path", 0, 0.99), ("dropout", 0, 0.99),
    ("attention_dropout", 0, 0.99), ("ema_decay", 0, 1), ("image_size", 0, 8192),
    ("label_smoothing_factor", 0, 0.99), ("weighted_loss", 0, 2), ("num_train_epochs", 1, _MANY),
    ("max_steps", -1, _MANY), ("per_device_train_batch_size", 1, _MANY),
    ("per_device_eval_batch_size", 1, _MANY), ("gradient_accumulation_steps", 1, _MANY),
    ("seed", 0, 2**32 - 1), ("dataloader_num_workers", 0, 256), ("validation_split", 0, 0.9),
    ("eval_epochs", 1, _MANY), ("early_stopping_patience", 0, _MANY),
    ("early_stopping_threshold", 0, _INF), ("save_steps", 0, _MANY), ("save_total_limit", 1, _MANY),
)  # fmt: skip

# The model card's names -> ours, and what its values become where they differ.
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
    """Each setting's part."""
    return {one.name: part for part, kind in PARTS.items() for one in fields(kind)}


def read_yaml(text: str, name: str) -> TrainConfig:
    """The text of a settings file. Raises ConfigError for what is none."""
    values = values_of(text, name)
    try:
        return TrainConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(setting, value) pairs, parts opened and aliases replaced."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if key in PARTS and isinstance(value, Mapping):
            found += _flat(value)
            continue
        if key in PARTS and value is None:  # a part whose lines are all taken out
            continue
        if key == "apply_augmentations":  # the card's one switch for all of it
            if value not in (True, False):
                raise ConfigError(f"{key}={shown(value)}: expected true or false")
            key, value = "augment", "card" if value else "none"
        name = ALIASES.get(key, str(key))
        if name in _VALUES and isinstance(value, int | str):
            value = _VALUES[name].get(value, value)
        if (name, value) not in found:  # image_width and image_height are one
            found.append((name, value))
    return found


def _as_kind(name: str, value: Any, kind: Any) -> Any:
    """A value as a file or a flag gives it -> as the field holds it."""
    if kind != unwrap_optional(kind) and (value is None or str(value).lower() in ("none", "null")):
        return None
    kind = unwrap_optional(kind)
    if get_origin(kind) is tuple:
        if isinstance(value, str):
            value = [part for part in value.replace(",", " ").split() if part]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name}={shown(value)}: expected a list")
        inner, *rest = get_args(kind)
        if rest != [...] and len(value) != 1 + len(rest):
            raise ConfigError(f"{name}={shown(value)}: expected {1 + len(rest)} numbers")
        return tuple(_as_kind(name, one, inner) for one in value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"{name}={shown(value)}: expected a number") from error
    return value


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Raises ConfigError for a value of another kind than its field's."""
    if value is None and kind != unwrap_optional(kind):
        return
    kind = unwrap_optional(kind)
    if get_origin(kind) is tuple:
        for one in value:
            _check_kind(name, one, get_args(kind)[0])
    elif get_origin(kind) is Literal:
        if value not in get_args(kind):
            listed = ", ".join(map(str, get_args(kind)))
            raise ConfigError(f"{name}={shown(value)}: expected one of {listed}")
    elif kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: expected true or false")
    elif kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{name}={shown(value)}: expected a whole number")
    elif kind is float and not is_number(value):
        raise ConfigError(f"{name}={shown(value)}: expected a number")
    elif kind is str and not isinstance(value, str):
        raise ConfigError(f"{name}={shown(value)}: expected text")


def unwrap_optional(kind: Any) -> Any:
    """The kind of a setting that may be None, where it is not."""
    inner = [one for one in get_args(kind) if one is not type(None)]
    return inner[0] if get_origin(kind) is UnionType else kind


def _near(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, [*setting_parts(), *ALIASES], 3, 0.5)
    return f"did you mean {' or '.join(close)}?" if close else "`vitlib finetune --help` lists all"
