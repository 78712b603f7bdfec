"""Training checkpoints -> the one state dict in them, by the names it has there.

What a network lies under is data here; which of several networks under one key is read, and what
tools put before names, is found in layouts/networks.py.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from torch import Tensor

from vitlib.errors import CheckpointError

MAX_DEPTH = 4
_MAX_NAME = 200  # characters of a model's
_MAX_VISITED = 1000  # dictionaries that are looked into for other networks
# The first of them that is there is taken. DINO serves its teacher, MSN its target encoder.
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
# How a name of a patch projection ends, in any layout.
PATCH_WEIGHTS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight",
    "conv1.weight",
    "conv_proj.weight",
    "embedding/kernel",
)
# What torch.compile, FSDP and checkpointing put before the names of what they wrap.
_INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrap(
    path: Path, state: object, prefix: str | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Return the state dict in what a PyTorch file holds, its keys, and what lay beside it.

    Args:
        path: Of the file, for messages.
        state: What torch.load gives.
        prefix: Of the network to take. Where it begins with the keys of a network ("model_ema."),
            the names get these keys before them; else it is a matter of the names alone.

    Raises:
        CheckpointError: There is no state dict, or it cannot be told which is meant.
    """
    stated = _keys_of(state, prefix) if prefix else []
    taken: list[str] = []
    ignored: list[str] = []
    here: dict[str, object] = {}
    for _ in range(MAX_DEPTH + 1):
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            kind = type(state).__name__
            raise CheckpointError(f"{path} holds a {kind}: expected names and tensors")
        here = state
        if stated:
            key = stated[len(taken)] if len(taken) < len(stated) else None
        else:
            key = _network(path, here, taken)
        if key is None:
            break
        ignored += [_told(n, value, taken) for n, value in here.items() if n != key]
        taken.append(key)
        state = here[key]
    tensors = {name: value for name, value in here.items() if isinstance(value, Tensor)}
    if not tensors or len(taken) > MAX_DEPTH:
        found = [_told(name, value, taken) for name, value in here.items()]
        raise CheckpointError(
            f"{path} holds {', '.join(found[:8]) or 'nothing'}: expected a state dict, or one "
            f"under {', '.join(NETWORKS)}"
        )
    ignored += [_told(n, value, taken) for n, value in here.items() if n not in tensors]
    before = "".join(f"{key}." for key in taken) if stated else ""
    named = {before + name: tensor for name, tensor in tensors.items()}
    return named, tuple(taken), tuple(ignored)


def read_arch(state: object) -> str | None:
    """Return what PyTorch's and timm's training scripts save under "arch": the model's name."""
    arch = state.get("arch") if isinstance(state, dict) else None
    return arch if isinstance(arch, str) and len(arch) <= _MAX_NAME else None


def strip_wrappers(names: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names without the marks of torch.compile and FSDP -> the names in the file."""
    cut = {_INSIDE.sub("", name): name for name in names}
    return cut if len(cut) == len(names) else {name: name for name in names}


def select_prefix(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return the names that begin with a prefix, without it -> the names in the file.

    Raises:
        CheckpointError: No name begins so.
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


def _keys_of(state: object, prefix: str) -> list[str]:
    """Return the keys of the dictionary of tensors that a prefix names, or none."""
    keys: list[str] = []
    rest = prefix if prefix.endswith(".") else f"{prefix}."
    while isinstance(state, dict) and len(keys) < MAX_DEPTH:
        fitting = [key for key in state if isinstance(key, str) and rest.startswith(f"{key}.")]
        fitting = [key for key in fitting if isinstance(state[key], dict)]
        if not fitting:
            break
        keys.append(max(fitting, key=len))
        rest, state = rest.removeprefix(f"{keys[-1]}."), state[keys[-1]]
    held = isinstance(state, dict) and any(isinstance(value, Tensor) for value in state.values())
    return keys if held else []


def _network(path: Path, state: Mapping[str, object], before: list[str]) -> str | None:
    """Return the key of the network to take; None where the tensors lie here.

    Raises CheckpointError where several keys hold a ViT and no training code says which.
    """
    # I-JEPA has all three; its publishers and timm take the context encoder.
    first = ["encoder"] if "predictor" in state else []
    order = [*NETWORKS[:4], *first, *NETWORKS[4:]]
    vits = dict.fromkeys(keys[0] for keys, _ in _networks_in(state, ()) if keys)
    here = any(isinstance(value, Tensor) for value in state.values())
    if vits and not (here and _is_vit(state)):
        preferred = next((key for key in order if key in vits), None)
        if preferred is None and len(vits) > 1:
            told = [_told(key, state[key], before) for key in list(vits)[:8]]
            example = ".".join((*before, next(iter(vits))))
            raise CheckpointError(
                f"{path} holds several networks, {', '.join(told)}: choose one with "
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


def _told(name: str, value: object, before: list[str]) -> str:
    """Return what lies beside a network: its name, how many tensors, how to take them."""
    paths = _networks_in(value, (*before, name))
    if not paths:
        count = sum(isinstance(v, Tensor) for v in value.values()) if isinstance(value, dict) else 0
        return f"{name[:80]} ({_tensors(count)})" if count else name[:80]
    told = [f"{_tensors(n)}: prefix='{'.'.join(path)[:160]}.'" for path, n in paths[:2]]
    return f"{name[:80]} ({'; '.join(told)})"


def _networks_in(value: object, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Return the keys, and how many tensors, of each ViT in a dictionary of dictionaries."""
    found: list[tuple[tuple[str, ...], int]] = []
    waiting: deque[tuple[object, tuple[str, ...]]] = deque([(value, path)])
    for _ in range(_MAX_VISITED):
        if not waiting:
            break
        here, keys = waiting.popleft()
        if not isinstance(here, dict) or not all(isinstance(key, str) for key in here):
            continue
        if _is_vit(here):
            found.append((keys, sum(isinstance(item, Tensor) for item in here.values())))
        elif len(keys) < MAX_DEPTH:
            inner = ((item, (*keys, name)) for name, item in here.items() if isinstance(item, dict))
            waiting += islice(inner, _MAX_VISITED)
    return found


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count > 1)}"
