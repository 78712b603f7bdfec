"""Parameter groups of an optimizer: rates that fall with depth, no decay of tokens and norms.

How data flows: names of modules freeze parameters, each of the others has a layer by its name, and
parameters of one layer and one weight decay become a group. Sources: Clark et al. 2003.10555 and
Bao et al. 2106.08254 (rates that fall with depth); Touvron et al. 2012.12877 (weight decay).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from torch import nn

from vitlib.errors import ConfigError, is_number
from vitlib.vit import ViT

_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_EMBEDDING = ("patch_embed.", "norm_pre.", "attn_position.")
# A name, and behind it the index or the slice of a list: norm, blocks[2], blocks[:4].
_PART = re.compile(r"(\w+)(?:\[(-?\d*)(?:(:)(-?\d*))?\])?")
_SHOWN = 3  # names of a group in the table


class ParameterGroups(list[dict[str, Any]]):
    """Groups for an optimizer of torch; printing them gives a table.

    Attributes:
        num_frozen: Number of values in parameters that do not train.
    """

    num_frozen = 0

    def __repr__(self) -> str:
        header = ("layer", "lr", "lr_scale", "weight_decay", "parameters", "names")
        rows = [header, *map(_row, self)]
        if self.num_frozen:
            rows.append(("frozen", "", "", "", f"{self.num_frozen:,}", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0])]
            cells += [
                cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)
            ]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        return "\n".join(lines)


def parameter_groups(
    model: ViT,
    *,
    lr: float = 1e-4,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    freeze: str = "",
) -> ParameterGroups:
    """Group the trainable parameters by learning rate and weight decay, for any optimizer of torch.

    Biases, norms, LayerScale, tokens, positions and their tables have no weight decay. Print the
    groups to see them as a table.

    Args:
        model: The model. The parameters that `freeze` names get no gradients any more.
        lr: Learning rate of the head, 0 or more.
        weight_decay: Weight decay of matrices, 0 or more.
        layer_decay: Factor of the learning rate from one layer to the layer below it, above 0 and
            at most 1. Layers are the embedding, each block, and all above the blocks.
        freeze: Modules or parameters that do not train, separated by commas; lists take an index or
            a slice: "patch_embed,blocks[:4]".

    Returns:
        Groups, from the pixels to the head, with `params`, their `names`, `weight_decay`, and `lr`
        already multiplied by `lr_scale`, which is stated as in timm.

    Raises:
        ConfigError: A name in `freeze` is not in the model, nothing is left to train, or a number
            is out of range.
    """
    if not isinstance(model, ViT):
        raise ConfigError(
            f"parameter_groups of a {type(model).__name__}: expected a ViT; of a model that holds "
            "one, give the ViT and add a group for the rest"
        )
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not is_number(value) or value < 0:
            raise ConfigError(f"{name}={value!r}: expected a number of at least 0")
    if not is_number(layer_decay) or not 0 < layer_decay <= 1:
        raise ConfigError(f"layer_decay={layer_decay!r}: expected a number above 0, at most 1")
    freeze_named(model, freeze)
    depth = len(model.blocks)
    by_key: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decays = layer_index(name, depth), has_weight_decay(name, parameter)
        if (layer, decays) not in by_key:
            scale = layer_decay ** (depth + 1 - layer)
            by_key[layer, decays] = {
                "params": [],
                "names": [],
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": weight_decay if decays else 0.0,
            }
        by_key[layer, decays]["params"].append(parameter)
        by_key[layer, decays]["names"].append(name)
    if not by_key:
        raise ConfigError("nothing is left to train: freeze fewer layers")
    groups = ParameterGroups(by_key[key] for key in sorted(by_key))
    groups.num_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return groups


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return True for a matrix; False for biases, norms, tokens, positions and their tables.

    Args:
        name: Name of the parameter in a ViT.
        parameter: The parameter.
    """
    is_position = "_token" in name or "pos_embed" in name or name.startswith("attn_position.")
    return parameter.ndim > 1 and not is_position and not name.endswith("probe")


def layer_index(name: str, depth: int) -> int:
    """Return the layer of a parameter, counted from the pixels.

    Args:
        name: Name of the parameter.
        depth: Number of blocks.

    Returns:
        0 for the embedding, 1 to depth for the blocks, depth + 1 for all above.
    """
    block = _BLOCK.match(name)
    if block:
        return int(block[1]) + 1
    return 0 if name.startswith(_EMBEDDING) else depth + 1


def freeze_named(model: nn.Module, names: str) -> None:
    """Turn off gradients of the parameters of named modules.

    Args:
        model: Changed in place.
        names: Modules or parameters, separated by commas, with an index or a slice of a list:
            "patch_embed,blocks[:4],norm.weight".

    Raises:
        ConfigError: A name is not in the model.
    """
    if not isinstance(names, str):
        raise ConfigError(f"freeze={names!r}: expected names, such as 'patch_embed,blocks[:4]'")
    chosen = [part for text in names.split(",") if text.strip() for part in _find(model, text)]
    for part in chosen:  # all names are right
        part.requires_grad_(False)


def _find(model: nn.Module, text: str) -> Iterator[nn.Module | nn.Parameter]:
    """Find the modules, or the parameter, that a name or a slice stands for."""
    parts: list[nn.Module | nn.Parameter] = [model]
    for step in text.strip().split("."):
        match = _PART.fullmatch(step)
        if match is None:
            raise ConfigError(
                f"freeze={text.strip()!r}: expected a name, or a list's index or slice, such as "
                "'blocks[2]' or 'blocks[:4]'"
            )
        parts = [_child(part, match[1], text.strip()) for part in parts]
        if match[2] is not None:
            parts = [item for part in parts for item in _items(part, match, text.strip())]
    yield from parts


def _child(part: nn.Module | nn.Parameter, name: str, text: str) -> nn.Module | nn.Parameter:
    """Return a module or parameter by its name, or raise ConfigError that lists what is there."""
    named: dict[str, nn.Module | nn.Parameter] = {}
    if isinstance(part, nn.Module):
        named = {**dict(part.named_children()), **dict(part.named_parameters(recurse=False))}
    if name in named:
        return named[name]
    trained = [key for key, item in named.items() if _count(item)]
    paths = [] if isinstance(part, nn.Parameter) else [n for n, _ in part.named_parameters()]
    inside = [path for path in paths if path.endswith(f".{name}")]
    close = inside if len(inside) == 1 else get_close_matches(name, trained, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if trained and trained[0] == "0":
        trained = [f"0 to {len(trained) - 1}, as [0], [:2]"]
    raise ConfigError(
        f"freeze={text!r}: no module {name!r}: expected one of {', '.join(trained) or 'none'}{hint}"
    )


def _items(
    part: nn.Module | nn.Parameter, match: re.Match[str], text: str
) -> list[nn.Module | nn.Parameter]:
    """Return the entries of a list that an index or a slice stands for."""
    if not isinstance(part, nn.ModuleList | nn.ParameterList | nn.Sequential):
        raise ConfigError(f"freeze={text!r}: {match[1]} is no list: expected its name alone")
    items, count = list(part), len(part)
    start, stop = (int(match[n]) if match[n] else None for n in (2, 4))
    is_slice = match[3] is not None
    last = count if is_slice else count - 1
    if any(not -count <= n <= last for n in (start, stop) if n is not None) or (
        start is None and not is_slice
    ):
        raise ConfigError(f"freeze={text!r}: {match[1]} has entries 0 to {count - 1}")
    if not is_slice:
        return [items[start or 0]]
    first, end, _ = slice(start, stop).indices(count)
    if first > end:
        raise ConfigError(
            f"freeze={text!r}: the slice ends before it starts: expected [start:stop], such as "
            f"{match[1]}[{end}:{first}]"
        )
    return items[first:end]


def _count(item: nn.Module | nn.Parameter) -> int:
    """Count the values of a parameter, or of all parameters of a module."""
    parameters = [item] if isinstance(item, nn.Parameter) else list(item.parameters())
    return sum(parameter.numel() for parameter in parameters)


def _row(group: dict[str, Any]) -> tuple[str, ...]:
    """Return a group as cells of the table."""
    names = group["names"]
    block = _BLOCK.match(names[0])
    layer = f"blocks.{block[1]}" if block else "embedding"
    if layer == "embedding" and not names[0].startswith(_EMBEDDING):
        layer = "head"
    short = [name.removeprefix(block[0] if block else "") for name in names]
    more = f", … {len(short) - _SHOWN} more" if len(short) > _SHOWN else ""
    return (
        layer,
        f"{group['lr']:.3g}",
        f"{group['lr_scale']:.4g}",
        f"{group['weight_decay']:g}",
        f"{sum(parameter.numel() for parameter in group['params']):,}",
        ", ".join(short[:_SHOWN]) + more,
    )
