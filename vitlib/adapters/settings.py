"""Settings of the parts that are added to a model: sizes and places, each checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from vitlib.errors import ConfigError, check_int, is_number

Settings = TypeVar("Settings", "PromptSettings", "AdapterSettings", "LoraSettings")

MAX_RANK = 4096
MAX_SIZE = 1_000_000  # of prompts, and of the width of an adapter
BRANCHES = ("attn", "mlp")
# Linear layers of a block by the names that `on` takes -> their attributes of attn or mlp.
LINEARS = {
    "q": "q",
    "k": "k",
    "v": "v",
    "o": "proj",
    "out": "proj",
    "proj": "proj",
    "fc1": "fc1",
    "fc2": "fc2",
}


@dataclass(frozen=True)
class PromptSettings:
    """Prompts: learned tokens without a position, after the prefix tokens (2203.12119).

    Attributes:
        count: Number of prompts.
        deep: Each block takes prompts of its own (VPT-deep). False: those of the first block go
            through all blocks (VPT-shallow).

    Raises:
        ConfigError: A value is not allowed.
    """

    count: int
    deep: bool = False

    def __post_init__(self) -> None:
        check_size("prompts: count", self.count, MAX_SIZE)
        check_bool("prompts: deep", self.deep)


@dataclass(frozen=True)
class AdapterSettings:
    """Bottleneck adapters.

    Attributes:
        dim: Width of the bottleneck.
        on: Branches that have one: "attn", "mlp" or both; None: both, and "mlp" for parallel ones.
        parallel: False: behind the branch, before the residual (1902.00751). True: beside the MLP
            (2205.13535).
        scale: Factor of the adapter's output; None becomes 1, and 0.1 for parallel ones, as in the
            papers.

    Raises:
        ConfigError: A value is not allowed.
    """

    dim: int
    on: tuple[str, ...] | None = None
    parallel: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        check_size("adapters: dim", self.dim, MAX_SIZE)
        check_bool("adapters: parallel", self.parallel)
        usual = ("mlp",) if self.parallel else BRANCHES
        names = usual if self.on is None else parse_names("adapters", self.on, BRANCHES)
        if self.parallel and names != ("mlp",):
            raise ConfigError(f"adapters: on={self.on!r}: expected 'mlp' for parallel adapters")
        scale = self.scale
        if scale is None:
            scale = 0.1 if self.parallel else 1.0
        if not is_number(scale) or scale == 0:
            raise ConfigError(f"adapters: scale={scale!r}: expected a number other than 0")
        object.__setattr__(self, "on", names)
        object.__setattr__(self, "scale", float(scale))


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank updates of linear layers (2106.09685).

    Attributes:
        rank: Rank of an update.
        on: Layers of each block: "qv", "q k v o fc1 fc2", or a list of names. "o", "out" and "proj"
            are the output projection of attention.
        alpha: Updates are scaled by alpha / rank.

    Raises:
        ConfigError: A value is not allowed.
    """

    rank: int
    on: tuple[str, ...] = ("q", "v")
    alpha: float = 16.0

    def __post_init__(self) -> None:
        check_size("lora: rank", self.rank, MAX_RANK)
        names = parse_names("lora", self.on, tuple(LINEARS))
        if not is_number(self.alpha) or self.alpha <= 0:
            raise ConfigError(f"lora: alpha={self.alpha!r}: expected a positive number")
        attributes = dict.fromkeys(LINEARS[name] for name in names)
        object.__setattr__(self, "on", tuple(attributes))
        object.__setattr__(self, "alpha", float(self.alpha))


@dataclass(frozen=True)
class Adaptation:
    """All parts that were added to a model.

    Attributes:
        prompts: Prompts; None: none.
        adapters: Bottleneck adapters; None: none.
        lora: Low-rank updates; None: none.
    """

    prompts: PromptSettings | None = None
    adapters: AdapterSettings | None = None
    lora: LoraSettings | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the settings of each part that there is, as JSON holds them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_adaptation(
    prompts: object = None, adapters: object = None, lora: object = None
) -> Adaptation:
    """Check the arguments of `adapt`.

    Args:
        prompts: Number of prompts, or fields of PromptSettings by name; None: none.
        adapters: Width of adapters, or fields of AdapterSettings by name; None: none.
        lora: Rank of updates, or fields of LoraSettings by name; None: none.

    Returns:
        The settings.

    Raises:
        ConfigError: There are none, or a value is not allowed.
    """
    adaptation = Adaptation(
        _read("prompts", PromptSettings, prompts),
        _read("adapters", AdapterSettings, adapters),
        _read("lora", LoraSettings, lora),
    )
    if adaptation == Adaptation():
        raise ConfigError(
            "nothing to add: give prompts=10, adapters=dict(dim=64) or lora=dict(rank=8)"
        )
    return adaptation


def _read(name: str, kind: type[Settings], value: object) -> Settings | None:
    """Return the settings of one part, of which a number alone is the first field."""
    if value is None:
        return None
    names = [entry.name for entry in fields(kind)]
    if not isinstance(value, Mapping):
        value = {names[0]: value}
    if names[0] not in value or not value.keys() <= set(names):
        raise ConfigError(
            f"{name}={dict(value)!r:.80}: expected {names[0]}, and of {', '.join(names[1:])} some"
        )
    return kind(**value)


def check_size(name: str, value: object, largest: int) -> None:
    """Check a whole number from 1.

    Args:
        name: Its name, for the message.
        value: Anything.
        largest: The largest number that is allowed.

    Raises:
        ConfigError: It is none.
    """
    if check_int(name, value, at_least=1) > largest:
        raise ConfigError(f"{name}={value!r}: expected at most {largest}")


def check_bool(name: str, value: object) -> None:
    """Check a switch.

    Args:
        name: Its name, for the message.
        value: Anything.

    Raises:
        ConfigError: It is neither True nor False.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: expected True or False")


def parse_names(part: str, on: object, names: tuple[str, ...]) -> tuple[str, ...]:
    """Read which layers or branches a part is for.

    Args:
        part: Name of the part, for the message.
        on: Names in a string, with spaces or, where all have one letter, without; or a list.
        names: Names that there are.

    Returns:
        The names, in their order.

    Raises:
        ConfigError: There is no name, one is none of these, or one comes twice.
    """
    words: list[Any]
    if isinstance(on, str):
        words = on.replace(",", " ").split()
    else:
        words = [*on] if isinstance(on, list | tuple) else [on]
    chosen: list[str] = []
    for word in words:
        letters = [word] if word in names else list(word) if isinstance(word, str) else [word]
        if not all(isinstance(name, str) and name in names for name in letters):
            raise ConfigError(f"{part}: on={on!r:.80}: expected some of {', '.join(names)}")
        chosen += letters
    if len(chosen) != len({*chosen}) or not chosen:
        raise ConfigError(f"{part}: on={on!r:.80}: expected some of {', '.join(names)}, each once")
    return tuple(chosen)
