"""Files of the parts that were added to a model, which are put on its base again.

How data flows: a delta holds the tensors of the added parts and all that trains, under the names of
the adapted model. Its header has the settings of the parts and the SHA-256 of all other tensors,
which are those of the base. A file is not trusted: its settings are checked, the parts are built
without memory, and every name, shape and number is compared before tensors are copied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitlib.config import ViTConfig, config_to_json
from vitlib.config_parts import SHORT_NAMES
from vitlib.errors import CheckpointError, ConfigError, SourceError, VitlibError
from vitlib.system.atomic import expand_home
from vitlib.system.torch_state import (
    isolate_torch_settings,
    outside_inference_mode,
    preserve_rng_state,
)
from vitlib.vit import ViT

HEADER = "vitlib_delta"
FORMAT_VERSION = 2  # version 1 had no settings of the base
MAX_HEADER_BYTES = 32 * 2**20  # names and labels; those of ImageNet-21k take 0.5 MiB
_HEAD_LINEARS = {f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")}
# Fields of a config that say nothing of what the base computes: of the head, names of tensors,
# first values, and rates of training.
_OTHER_FIELDS = ("family", "layer_scale", "num_classes", "labels", "problem_type", "pool")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@isolate_torch_settings()
def save_delta(model: ViT, path: str | os.PathLike[str]) -> None:
    """Write what was added to a model, and all else of it that trains, without its base.

    Written are the added parts, the head, every parameter that requires a gradient, and buffers of
    modules with such parameters. The file also has the SHA-256 of all other tensors, the settings
    of the base (epsilon, activation, rule of positions and so on), vitlib's version, the settings
    of the parts, and number and names of the classes. It is whole or not there.

    Args:
        model: A model from `vitlib.adapt` or `vitlib.load_delta`.
        path: The file, in safetensors' format; an older one is replaced.

    Raises:
        ConfigError: Nothing was added to the model, or it has functions that no file holds.
        CheckpointError: A number is not finite.
        SourceError: The file cannot be written.
    """
    from safetensors.torch import save_file

    from vitlib import __version__
    from vitlib.adapters.adaptation import base_names
    from vitlib.system.atomic import open_atomic
    from vitlib.system.hashing import hash_tensors

    if not isinstance(model, ViT) or model.adaptation is None:
        raise ConfigError(
            "save_delta: expected a model of vitlib.adapt; vitlib.save writes a model whole"
        )
    if getattr(model, "token_functions", ()) or any(
        getattr(getattr(block, "attn", None), "attend", None) is not None for block in model.blocks
    ):
        raise ConfigError(
            "save_delta: the model has attention or token functions of its own, which no file "
            "holds: save the model before with_attention() and with_tokens()"
        )
    state, names = model.state_dict(), base_names(model)
    written = {n for n, original in names.items() if original is None} | trained_names(model)
    tensors = {n: state[n].detach().cpu().clone().contiguous() for n in sorted(written)}
    if bad := not_finite(tensors):
        raise CheckpointError(f"{', '.join(bad)}: NaN or infinity: expected finite weights")
    base = {original: state[n] for n, original in names.items() if n not in written and original}
    file_path = to_path(path)
    cfg, classes = model.config, model.num_classes
    header = {
        "format": FORMAT_VERSION,
        "version": __version__,
        "base_sha256": hash_tensors(base),
        "base": base_settings(cfg),
        "parts": model.adaptation.to_json(),
        "head": {
            "num_classes": classes,
            "pool": cfg.pool,
            "labels": list(cfg.labels) if len(cfg.labels) == classes else [],
            "problem_type": cfg.problem_type,
        },
    }
    # One entry: safetensors writes several in a random order, and two files would differ.
    with open_atomic(file_path) as file:
        save_file(tensors, file.name, {HEADER: json.dumps(header)})


def to_path(path: object) -> Path:
    """Return the path of a file, with the user's folder for a leading `~`.

    Args:
        path: Anything.

    Raises:
        ConfigError: It is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"path={path!r:.80}: expected the path of a file, such as 'delta.safetensors'"
        )
    return expand_home(path)


def base_settings(config: ViTConfig) -> dict[str, Any]:
    """List what a base computes with its weights: all of a config but the head and training.

    Args:
        config: Config of the base, or of the model that was adapted.

    Returns:
        Fields by name, as JSON holds them.
    """
    of_training = {name for name, (group, _) in SHORT_NAMES.items() if group == "regularization"}
    left_out = {*_OTHER_FIELDS, "dist_head", *of_training}
    kept = {name: v for name, v in config_to_json(config).items() if name not in left_out}
    settings: dict[str, Any] = json.loads(json.dumps(kept))  # tuples become lists, as in a file
    return settings


def trained_names(model: nn.Module) -> set[str]:
    """List the tensors of the head, and of modules that train.

    Args:
        model: An adapted model.

    Returns:
        Names of the head's tensors, of parameters that require a gradient, and of buffers beside
        such parameters.
    """
    from vitlib.adapters.adaptation import HEAD

    names = {name for name in model.state_dict() if name.startswith(HEAD)}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        trained = [n for n, p in module._parameters.items() if p is not None and p.requires_grad]
        names |= {prefix + name for name in (*trained, *(module._buffers if trained else ()))}
    return names & model.state_dict().keys()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that hold NaN or infinity.

    Args:
        tensors: Tensors by name.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype in _FLOATS}
    return [name for name, tensor in floats.items() if not bool(torch.isfinite(tensor).all())]


class Delta(NamedTuple):
    """The content of a file.

    Attributes:
        tensors: Tensors by the names of the adapted model, memory-mapped.
        base_sha256: Of the base's other tensors.
        base: Settings of the base, as `base_settings` lists them.
        parts: Settings of the parts, not checked.
        head: Number of classes, pool, labels and task, not checked.
        version: Version of vitlib that wrote it.
    """

    tensors: dict[str, Tensor]
    base_sha256: str
    base: dict[str, Any]
    parts: dict[str, Any]
    head: dict[str, Any]
    version: str


@isolate_torch_settings()
@outside_inference_mode()
@preserve_rng_state()
def load_delta(model: ViT, path: str | os.PathLike[str]) -> ViT:
    """Make a model of a base and the parts that `save_delta` wrote.

    Args:
        model: The base, which is not changed. Only weights that the file does not hold must be
            those that the parts were trained on: another head is replaced.
        path: The file.

    Returns:
        A new model with frozen weights in the memory of the base's, as `vitlib.adapt` makes it.
        What the file holds is trainable, in the dtype of the file.

    Raises:
        SourceError: There is no such file.
        CheckpointError: It is no delta, damaged, or one of another base.
        ConfigError: The model is no ViT, or has added parts already.
    """
    from vitlib.adapters.adaptation import add_parts, base_names, check_plain, copy_over_frozen
    from vitlib.adapters.settings import read_adaptation
    from vitlib.system.hashing import hash_tensors

    check_plain(model, "load_delta")
    file = to_path(path)
    delta = read_delta(file)
    adapted = copy_over_frozen(model)
    try:
        add_parts(adapted, read_adaptation(**delta.parts), torch.device("meta"))
        set_head(adapted, delta)
    except (KeyError, TypeError, ValueError, RuntimeError, VitlibError) as error:
        raise CheckpointError(f"{file} does not fit the model: {error}") from error
    check_tensors(file, adapted, delta.tensors)
    names = base_names(adapted)
    replaced = {names[name] for name in delta.tensors}
    base = {name: t for name, t in model.state_dict().items() if name not in replaced}
    # A head of the base that the delta has none of.
    base = {name: t for name, t in base.items() if name in names.values()}
    if hash_tensors(base) != delta.base_sha256:
        raise CheckpointError(
            f"{file} is a delta of another base: its weights (SHA-256 {delta.base_sha256[:12]}) "
            "are not those of the model; load the checkpoint that it was trained on, in the same "
            "dtype"
        )
    check_settings(file, delta.base, base_settings(model.config))
    for name, tensor in delta.tensors.items():
        assign(adapted, name, tensor)
    return adapted


def read_delta(path: Path) -> Delta:
    """Read a file, without taking memory for what it says.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        SourceError: There is no such file.
        CheckpointError: It is no delta, or damaged.
    """
    from safetensors import safe_open

    from vitlib.source.readers.safetensors import read_safetensors

    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} has a header of {size} bytes: expected a file of vitlib.save_delta"
        )
    tensors = read_safetensors(path).tensors
    with safe_open(path, framework="pt") as opened:
        text = (opened.metadata() or {}).get(HEADER)
    if text is None:
        raise CheckpointError(
            f"{path} is no delta: expected a file of vitlib.save_delta; vitlib.load opens a "
            "checkpoint"
        )
    try:
        header = json.loads(text)
        if header["format"] != FORMAT_VERSION:
            raise ValueError(f"format {header['format']!r:.20}, expected {FORMAT_VERSION}")
        digest, version = header["base_sha256"], header["version"]
        settings = header["base"], header["parts"], header["head"]
        if not all(isinstance(part, dict) for part in settings):
            raise TypeError("no settings")
        return Delta(tensors, str(digest), *settings, str(version))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} has a header that cannot be read ({reason:.80}): save it again"
        ) from error


def set_head(model: ViT, delta: Delta) -> None:
    """Give a model the classes of a delta, and a head of their number.

    Args:
        model: The adapted model, changed in place.
        delta: The file.

    Raises:
        ConfigError: The classes contradict the tensors, or the head has other modules.
    """
    from vitlib.adapters.adaptation import HEAD

    head = delta.head
    count, pool, labels = head["num_classes"], head["pool"], tuple(head["labels"])
    if not all(isinstance(label, str) for label in labels):
        raise ConfigError("labels: expected names of classes")
    shapes = {n: tuple(t.shape) for n, t in delta.tensors.items() if n.startswith(HEAD)}
    own = {n: tuple(t.shape) for n, t in model.state_dict().items() if n.startswith(HEAD)}
    if shapes != own:
        is_linear = isinstance(model.head, nn.Linear | nn.Identity)
        if not (is_linear and shapes.keys() <= _HEAD_LINEARS):
            raise ConfigError(
                "its head is no linear layer: give the model a head of the same modules first"
            )
        # Memory is taken for no more classes than the file holds rows of.
        if shapes.get("head.weight", (0,))[0] != count:
            raise ConfigError(f"{count!r:.20} classes and a head of {shapes}")
        model.reset_classifier(count, pool)
    elif pool != model.config.pool:
        model.config = replace(model.config, pool=pool)
    if count == model.num_classes:
        model.config = replace(
            model.config, num_classes=count, labels=labels, problem_type=head["problem_type"]
        )


def check_tensors(path: Path, model: ViT, tensors: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a file with those of the model that its settings make.

    Args:
        path: The file, for the message.
        model: The adapted model, whose added parts may be on the meta device.
        tensors: The file's tensors.

    Raises:
        CheckpointError: A name, shape or dtype differs, or a number is not finite; all are listed.
    """
    from vitlib.adapters.adaptation import HEAD, base_names

    state, names = model.state_dict(), base_names(model)
    needed = {n for n, original in names.items() if original is None or n.startswith(HEAD)}
    problems = [f"{name} is missing" for name in sorted(needed - tensors.keys())]
    for name, tensor in tensors.items():
        if name not in state:
            problems.append(f"{name:.80} is not known")
        elif tensor.shape != state[name].shape:
            shape, expected = tuple(tensor.shape), tuple(state[name].shape)
            problems.append(f"{name} is {shape}, expected {expected}")
        elif state[name].is_floating_point() and tensor.dtype not in _FLOATS:
            problems.append(f"{name} is {tensor.dtype}, expected floats")
    problems += [f"{name:.80} has NaN or infinity" for name in not_finite(tensors)]
    if problems:
        listed = "; ".join(problems[:20]) + ("; …" if len(problems) > 20 else "")
        raise CheckpointError(f"{path} does not fit the model: {listed}")


def check_settings(path: Path, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Compare the settings of the base that a delta was trained on with those of a model.

    Args:
        path: The file, for the message.
        expected: The settings in the file.
        got: Those of the model.

    Raises:
        CheckpointError: One differs: the same weights would compute something else.
    """
    names = [n for n in (*expected, *got) if expected.get(n) != got.get(n)]
    if names:
        listed = "; ".join(
            f"{name:.40} {expected.get(name)!r:.60}, in the model {got.get(name)!r:.60}"
            for name in dict.fromkeys(names[:8])
        )
        raise CheckpointError(
            f"{path} is a delta of a base with other settings: {listed}; load the checkpoint that "
            "it was trained on"
        )


def assign(model: ViT, name: str, tensor: Tensor) -> None:
    """Put a copy of a tensor into a model.

    Args:
        model: The model, changed in place.
        name: Name of a parameter, which then trains, or of a buffer.
        tensor: The new value.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    value = tensor.to(model.device, copy=True)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value)
