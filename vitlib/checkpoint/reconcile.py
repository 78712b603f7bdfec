"""Bring the config of a model in agreement with modules that were put in by hand.

A ViT is built from its config, and a user may then change its modules: another head, fewer blocks,
another patch projection, an attention of his own. `reconcile` reads the config back from the
modules; `foreign_parts` lists the parts that no config describes, and so no file can hold.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.encoder import Attention, Linear
from vitlib.errors import ConfigError, first_line
from vitlib.patch_embed import PatchEmbed
from vitlib.scores import num_outputs
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")

# Attributes that no forward in eval mode reads: of training, of the noise it draws.
_OF_TRAINING = {"training", "dropout", "drop_path", "dropout_keys", "gradient_checkpointing"}
_SIMPLE = (int, float, str, bool, tuple, type(None))


def reconcile(model: ViT) -> ViTConfig:
    """Set `model.config` to what the model's modules are now.

    The depth, the number of classes, the channels, the patch, the grid and the tokens before the
    patches are those of the modules. A head put in by hand has no labels, unless they were set
    after it: `model.config = dataclasses.replace(model.config, labels=(...))`.

    Args:
        model: A ViT whose modules may have been changed; only its config changes.

    Returns:
        The config.

    Raises:
        ConfigError: The modules cannot work together, or do not say what they are.
    """
    cfg = model.config
    fields = _blocks(model) | _embedding(model) | _head(model)
    changed = {name: value for name, value in fields.items() if getattr(cfg, name) != value}
    if changed:
        model.config = replace(cfg, **changed)
        count = model.config.num_classes
        if cfg.labels and count and not model.config.labels:
            logger.warning("a head put in by hand: its %d classes are LABEL_0, LABEL_1, …", count)
    return model.config


def _blocks(model: ViT) -> dict[str, Any]:
    """Return the fields that the blocks have: their number, and their heads if all are alike."""
    fields: dict[str, Any] = {"depth": len(model.blocks)}
    parts = [getattr(block, "attn", None) for block in model.blocks]
    heads = {a.num_heads for a in parts if isinstance(a, Attention)}
    widths = {a.num_heads * a.head_dim for a in parts if isinstance(a, Attention)}
    if len(heads) == 1 and widths == {model.config.embed_dim}:
        fields["num_heads"] = heads.pop()
    return fields


def _embedding(model: ViT) -> dict[str, Any]:
    """Return the fields that the patch embedding has, where it is vitlib's."""
    embed: Any = model.patch_embed
    channels = getattr(getattr(embed, "proj", None), "in_channels", None)
    fields: dict[str, Any] = {"in_channels": channels} if isinstance(channels, int) else {}
    if not isinstance(embed, PatchEmbed):
        return fields
    cfg, (h, w), (p, q) = model.config, embed.grid_size, embed.patch_size
    rows = 0 if embed.pos_embed is None else embed.pos_embed.shape[1]
    tokens = int(embed.cls_token is not None) + int(embed.dist_token is not None)
    if rows and rows != h * w + embed.num_prefix_positions:
        raise ConfigError(
            f"patch_embed has {rows} positions for {h}x{w} patches and "
            f"{embed.num_prefix_positions} class tokens: set patch_embed.grid_size to the grid "
            "that they are of"
        )
    step = getattr(embed.proj, "stride", (p, q))  # patches may overlap
    if tuple(step) != (p, q):
        raise ConfigError(
            f"patch_embed.proj takes a patch every {step[0]}x{step[1]} pixels, patch_embed says "
            f"{p}x{q}: set patch_embed.patch_size and patch_embed.grid_size to what it does"
        )
    if ((h, w), (p, q)) != (cfg.grid_size, cfg.patch_size):
        fields |= {"patch_size": (p, q), "image_size": (h * p, w * q)}
    return fields | {
        "class_token": embed.cls_token is not None,
        "dist_token": embed.dist_token is not None,
        "num_registers": 0 if embed.reg_token is None else embed.reg_token.shape[1],
        "pos_embed": rows > 0,
        "pos_embed_cls": embed.num_prefix_positions > 0 if rows and tokens else cfg.positions.cls,
    }


def _head(model: ViT) -> dict[str, Any]:
    """Return the fields that the head has."""
    cfg, head = model.config, model.head
    width = _width(model, head, "head")
    if model.head_dist is not None:
        other = _width(model, model.head_dist, "head_dist")
        if other != width:
            raise ConfigError(
                f"head gives {width or 'no'} classes and head_dist {other}: give both as many, or "
                "call model.reset_classifier(...)"
            )
    labels = cfg.labels if len(cfg.labels) == width else ()
    if labels == model.loaded_labels and type(head) is not Linear:
        labels = ()
    return {"num_classes": width, "labels": labels, "dist_head": model.head_dist is not None}


def _width(model: ViT, head: object, name: str) -> int:
    """Return the number of classes of a head, by running it where its modules do not say.

    Raises ConfigError where it cannot read the vector, or gives no row of classes.
    """
    expected = model.config.num_features
    if not isinstance(head, nn.Module):
        raise ConfigError(f"{name} is {head!r}: expected a module; nn.Identity() is no head")
    reads = getattr(head, "in_features", None)
    if isinstance(reads, int) and reads not in (0, expected):  # 0: a lazy layer
        raise ConfigError(
            f"{name} reads {reads} numbers, the model gives it {expected}: give it "
            f"{expected}, as in nn.Linear({expected}, ...)"
        )
    width = num_outputs(head)
    if width is not None:
        return width
    weight = next(head.parameters(), next(model.parameters()))
    row = torch.zeros(1, expected, dtype=weight.dtype, device=weight.device)
    training = head.training
    try:
        with torch.no_grad():
            output = head.eval()(row)
    except Exception as error:
        reason = first_line(error)
        raise ConfigError(
            f"{name} cannot read a vector of {expected} numbers, (1, {expected}): {reason}"
        ) from error
    finally:
        head.train(training)
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 1:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"{name} gives {shape}: expected a tensor (images, classes)")
    return output.shape[1]


def foreign_parts(model: ViT) -> list[str]:
    """List the parts of a reconciled model that are not what its config says.

    Such parts compute, but no layout describes them: a file of the model would be read as another.
    Hooks are not parts.

    Args:
        model: The model.

    Returns:
        Each as "path (class)".
    """
    with torch.device("meta"):
        expected = ViT(model.config)
    modules = dict(model.named_modules(remove_duplicate=False))
    listed: list[str] = []

    def is_listed(path: str) -> bool:
        return any(path == part or path.startswith(f"{part}.") for part in listed)

    reference = dict(expected.named_modules())
    for path in [*reference, *modules]:
        if is_listed(path):
            continue
        there, like = modules.get(path), reference.get(path)
        if there is None or like is None or not _is_same(there, like):
            listed.append(path)
            if not path:
                break
    shapes = {name: t.shape for name, t in expected.state_dict().items()}
    own = {name: t.shape for name, t in model.state_dict().items()}
    for name in [*shapes, *own]:
        owner = name.rpartition(".")[0]
        if own.get(name) != shapes.get(name) and not is_listed(owner) and name not in listed:
            if name == "head.bias" and name not in own:
                continue  # a head without a bias is one with a bias of zeros
            listed.append(name)
    names = {path: type(modules[path]).__name__ for path in listed if path in modules}
    return [f"{p or 'the model'} ({names[p]})" if p in names else p for p in listed]


def _is_same(module: nn.Module, like: nn.Module) -> bool:
    """Return True if a module computes what vitlib's own does: same class, numbers and methods."""
    kind, base = type(module), type(like)
    if base in (Linear, nn.Linear):
        base = nn.Linear
    elif isinstance(like, nn.LayerNorm):
        base = nn.LayerNorm
    elif isinstance(like, nn.Conv2d):
        base = nn.Conv2d
    if not issubclass(kind, base) or any(_overrides(kind, base, type(like))):
        return False
    hides = any(callable(v) and callable(getattr(kind, n, None)) for n, v in vars(module).items())
    actual, expected = _numbers(module), _numbers(like)
    return not hides and all(actual.get(n) == value for n, value in expected.items())


def _overrides(kind: type, base: type, stock: type) -> Iterator[bool]:
    """Yield True for a class between `kind` and `base` that overrides something of `base`."""
    for cls in kind.__mro__[: kind.__mro__.index(base)]:
        if cls is not stock:
            yield any(
                hasattr(base, name) and name not in ("__init__", "__repr__")
                for name, value in vars(cls).items()
                if callable(value) or isinstance(value, property)
            )


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a module's forward reads, besides tensors and modules."""
    return {
        name: value
        for name, value in vars(module).items()
        if name[0] != "_" and name not in _OF_TRAINING and isinstance(value, _SIMPLE)
    }
