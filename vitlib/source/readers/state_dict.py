"""The state dict in a training checkpoint: found under the keys that training code uses.

Names of keys are data of this file. checkpoint/layouts/networks.py chooses among several networks
in one state dict, and removes prefixes that tools put before names.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from torch import Tensor

from vitlib.errors import CheckpointError, count_noun

MAX_DEPTH = 4
_MAX_NAME = 200  # characters of a model's name
_MAX_VISITED = 1000  # dictionaries that are searched for networks
# Keys in order of preference. DINO publishes its teacher, MSN its target encoder.
NETWORKS = (
    "model",
    "state_dict",
    "module",
    "teacher",
    "target_encoder",
    "encoder",
    "model_ema",
    "student",
    "backbone",
)
# Last parts of the name of a patch projection, in all layouts.
PATCH_WEIGHTS = (
    "patch_embed.proj.weight",
    "patch_embed.projection.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embed.weight",
    "conv1.weight",
    "conv_proj.weight",
    "vision_embed.proj.weight",
    "embedding/kernel",
)
# Names that torch.compile, FSDP and activation checkpointing insert for the modules they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrap(
    path: Path, state: object, prefix: str | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Return the state dict of one network in a PyTorch file.

    Args:
        path: Path of the file, for messages.
        state: Result of torch.load.
        prefix: Prefix of the network to read. If it begins with the keys of dictionaries
            ("model_ema."), they are put before the names of the tensors. Else it selects by the
            names alone, which select_prefix() does.

    Returns:
        The state dict, the keys that lead to it, and descriptions of the other content.

    Raises:
        CheckpointError: There is no state dict, or several and no preference among them.
    """
    stated = _split_prefix(state, prefix) if prefix else []
    wrapper_keys: list[str] = []
    ignored: list[str] = []
    here: dict[str, object] = {}
    for _ in range(MAX_DEPTH + 1):
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            kind = type(state).__name__
            raise CheckpointError(f"{path} holds a {kind}: expected names and tensors")
        here = state
        if stated:
            key = stated[len(wrapper_keys)] if len(wrapper_keys) < len(stated) else None
        else:
            key = _choose_key(path, here, wrapper_keys)
        if key is None:
            break
        ignored += [_describe(n, value, wrapper_keys) for n, value in here.items() if n != key]
        wrapper_keys.append(key)
        state = here[key]
    tensors = {name: value for name, value in here.items() if isinstance(value, Tensor)}
    if not tensors or len(wrapper_keys) > MAX_DEPTH:
        contents = [_describe(name, value, wrapper_keys) for name, value in here.items()]
        raise CheckpointError(
            f"{path} holds {', '.join(contents[:8]) or 'nothing'}: expected a state dict, or one "
            f"under {', '.join(NETWORKS)}"
        )
    ignored += [_describe(n, value, wrapper_keys) for n, value in here.items() if n not in tensors]
    before = "".join(f"{key}." for key in wrapper_keys) if stated else ""
    named = {before + name: tensor for name, tensor in tensors.items()}
    return named, tuple(wrapper_keys), tuple(ignored)


def read_arch(state: object) -> str | None:
    """Return the model's name, which PyTorch's and timm's training scripts save under "arch".

    Args:
        state: Result of torch.load.

    Returns:
        The name; None if there is none, or a very long one.
    """
    arch = state.get("arch") if isinstance(state, dict) else None
    return arch if isinstance(arch, str) and len(arch) <= _MAX_NAME else None


def strip_wrappers(names: Mapping[str, Tensor]) -> dict[str, str]:
    """Remove the names that torch.compile and FSDP insert.

    Args:
        names: Names of the file.

    Returns:
        {name without them: name in the file}. Names stay as they are if two would become equal.
    """
    cut = {_WRAPPERS.sub("", name): name for name in names}
    return cut if len(cut) == len(names) else {name: name for name in names}


def select_prefix(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Select the names that begin with a prefix.

    Args:
        names: Names -> names in the file.
        prefix: The prefix; a dot after it may be left out.

    Returns:
        {name without the prefix: name in the file}.

    Raises:
        CheckpointError: No name begins with it.
    """
    for start in (prefix, f"{prefix}.") if prefix and prefix[-1] not in "./" else (prefix,):
        inner = {n.removeprefix(start): old for n, old in names.items() if n.startswith(start)}
        whole = start[-1:] in ("", ".", "/") or all(name[:1] in "./" for name in inner)
        if inner and whole:
            return {name.lstrip("./"): old for name, old in inner.items()}
    firsts = dict.fromkeys(name.partition(".")[0] for name in names)
    raise CheckpointError(
        f"no tensor's name begins with prefix={prefix!r}: they begin with "
        f"{', '.join(list(firsts)[:8])}"
    )


def _split_prefix(state: object, prefix: str) -> list[str]:
    """Split a prefix into the keys of nested dictionaries; [] if no tensors lie there."""
    keys: list[str] = []
    rest = prefix if prefix.endswith(".") else f"{prefix}."
    while isinstance(state, dict) and len(keys) < MAX_DEPTH:
        fitting = [key for key in state if isinstance(key, str) and rest.startswith(f"{key}.")]
        fitting = [key for key in fitting if isinstance(state[key], dict)]
        if not fitting:
            break
        keys.append(max(fitting, key=len))
        rest, state = rest.removeprefix(f"{keys[-1]}."), state[keys[-1]]
    has_tensors = isinstance(state, dict) and any(isinstance(v, Tensor) for v in state.values())
    return keys if has_tensors else []


def _choose_key(path: Path, state: Mapping[str, object], before: list[str]) -> str | None:
    """Return the key of the network to read; None if its tensors are in `state` itself.

    Raises CheckpointError if several keys hold a ViT and none of NETWORKS is among them.
    """
    # I-JEPA has encoder, target_encoder and predictor. Its publishers and timm read the encoder.
    first = ["encoder"] if "predictor" in state else []
    order = [*NETWORKS[:4], *first, *NETWORKS[4:]]
    vits = dict.fromkeys(keys[0] for keys, _ in _networks_in(state, ()) if keys)
    here = any(isinstance(value, Tensor) for value in state.values())
    if vits and not (here and _is_vit(state)):
        preferred = next((key for key in order if key in vits), None)
        if preferred is None and len(vits) > 1:
            listed = [_describe(key, state[key], before) for key in list(vits)[:8]]
            example = ".".join((*before, next(iter(vits))))
            raise CheckpointError(
                f"{path} holds several networks, {', '.join(listed)}: choose one with "
                f"prefix='{example}.' (on the command line --prefix)"
            )
        return preferred or next(iter(vits))
    for key in order:
        if _holds_tensors(state.get(key)):
            return key
    if here:
        return None
    others: list[str] = [key for key, value in state.items() if _holds_tensors(value)]
    return others[0] if len(others) == 1 else None


def _is_vit(state: Mapping[str, object]) -> bool:
    return any(n.endswith(PATCH_WEIGHTS) for n, value in state.items() if isinstance(value, Tensor))


def _holds_tensors(value: object, depth: int = MAX_DEPTH) -> bool:
    if not isinstance(value, dict) or not depth:
        return False
    here = any(isinstance(item, Tensor) for item in value.values())
    return here or any(_holds_tensors(value.get(key), depth - 1) for key in NETWORKS)


def _describe(name: str, value: object, before: list[str]) -> str:
    """Describe an entry beside the network: its name, number of tensors, and prefix to read it."""
    paths = _networks_in(value, (*before, name))
    if not paths:
        count = sum(isinstance(v, Tensor) for v in value.values()) if isinstance(value, dict) else 0
        return f"{name[:80]} ({_tensors(count)})" if count else name[:80]
    networks = [f"{_tensors(n)}: prefix='{'.'.join(path)[:160]}.'" for path, n in paths[:2]]
    return f"{name[:80]} ({'; '.join(networks)})"


def _networks_in(value: object, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Return the keys and the number of tensors of each ViT in nested dictionaries."""
    networks: list[tuple[tuple[str, ...], int]] = []
    queue: deque[tuple[object, tuple[str, ...]]] = deque([(value, path)])
    for _ in range(_MAX_VISITED):
        if not queue:
            break
        here, keys = queue.popleft()
        if not isinstance(here, dict) or not all(isinstance(key, str) for key in here):
            continue
        if _is_vit(here):
            networks.append((keys, sum(isinstance(item, Tensor) for item in here.values())))
        elif len(keys) < MAX_DEPTH:
            inner = ((item, (*keys, name)) for name, item in here.items() if isinstance(item, dict))
            queue += islice(inner, _MAX_VISITED)
    return networks


def _tensors(count: int) -> str:
    return count_noun(count, "tensor")
