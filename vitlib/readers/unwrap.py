"""Training checkpoints -> the one state dict in them, by its plain names.

What a network lies under, and what tools put before its names, are data here; the names themselves
are the layouts'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from vitlib.errors import CheckpointError

MAX_DEPTH = 4
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
# What torch.compile, FSDP and checkpointing put before the names of what they wrap.
_INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Stripped where every name has it. Not "encoder.", "vit.", "visual.": those belong to layouts.
_SHARED = ("module.", "model.", "net.", "teacher.", "student.", "backbone.")
# Taken, and the rest left out, where only some names have it.
_BRANCHES = ("teacher.backbone.", "teacher.", "student.backbone.", "backbone.")
# What stands beside a backbone and belongs to a classifier all the same.
_HEADS = ("head.weight", "head.bias", "classifier.weight", "classifier.bias")


def unwrap(path: Path, state: object) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The state dict in what a PyTorch file holds, the keys it lay under, and what lay beside it.

    Raises CheckpointError where there is none, or where it cannot be told which is meant.
    """
    taken: list[str] = []
    ignored: list[str] = []
    here: dict[str, object] = {}
    for _ in range(MAX_DEPTH + 1):
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            kind = type(state).__name__
            raise CheckpointError(f"{path} holds a {kind}: expected names and tensors")
        here = state
        key = _network(here)
        if key is None:
            break
        ignored += [_told(name, value) for name, value in here.items() if name != key]
        taken.append(key)
        state = here[key]
    tensors = {name: value for name, value in here.items() if isinstance(value, Tensor)}
    found = [_told(name, value) for name, value in here.items()]
    if not tensors or len(taken) > MAX_DEPTH:
        raise CheckpointError(
            f"{path} holds {', '.join(found[:8]) or 'nothing'}: expected a state dict, or one "
            f"under {', '.join(NETWORKS)}"
        )
    ignored += [_told(name, value) for name, value in here.items() if name not in tensors]
    return tensors, tuple(taken), tuple(ignored)


def plain_names(
    names: Iterable[str], wanted: str | None = None
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """New name -> name in the file, without what wrappers put before it; the branches that were
    taken where a file holds several networks; and what was left out.
    """
    kept = _cut_inside({name: name for name in names})
    taken: list[str] = []
    left: dict[str, int] = {}
    if wanted is not None:
        inner = {n.removeprefix(wanted): old for n, old in kept.items() if n.startswith(wanted)}
        if not inner:
            raise CheckpointError(f"no tensor's name begins with prefix={wanted!r}")
        left, kept, taken = {"other prefixes": len(kept) - len(inner)}, inner, [wanted]
    for _ in range(2 * MAX_DEPTH):
        prefix = next((p for p in _SHARED if kept and all(n.startswith(p) for n in kept)), None)
        if prefix is not None:
            kept = {name[len(prefix) :]: old for name, old in kept.items()}
            continue
        branch = next((b for b in _BRANCHES if any(name.startswith(b) for name in kept)), None)
        if branch is None:
            break
        inner = {n[len(branch) :]: old for n, old in kept.items() if n.startswith(branch)}
        for name, old in kept.items():
            if name in _HEADS and branch == "backbone." and name not in inner:
                inner[name] = old
            elif not name.startswith(branch):
                first, _, rest = name.partition(".")
                more = first in ("teacher", "student", "module", "model")
                group = f"{first}.{rest.partition('.')[0]}" if more else first
                left[group] = left.get(group, 0) + 1
        taken.append(branch)
        kept = inner
    return kept, tuple(taken), tuple(f"{group} ({_tensors(n)})" for group, n in left.items())


def _network(state: Mapping[str, object]) -> str | None:
    """The key of the network to take; None where the tensors lie here."""
    # I-JEPA has all three; its publishers and timm take the context encoder.
    first = ["encoder"] if "predictor" in state else []
    for key in [*NETWORKS[:4], *first, *NETWORKS[4:]]:
        if _holds_tensors(state.get(key)):
            return key
    if any(isinstance(value, Tensor) for value in state.values()):
        return None
    others: list[str] = [key for key, value in state.items() if _holds_tensors(value)]
    return others[0] if len(others) == 1 else None


def _holds_tensors(value: object, depth: int = MAX_DEPTH) -> bool:
    if not isinstance(value, dict) or not depth:
        return False
    here = any(isinstance(item, Tensor) for item in value.values())
    return here or any(_holds_tensors(value.get(key), depth - 1) for key in NETWORKS)


def _told(name: str, value: object) -> str:
    count = sum(isinstance(v, Tensor) for v in value.values()) if isinstance(value, dict) else 0
    return f"{name[:80]} ({_tensors(count)})" if count else name[:80]


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count > 1 else ''}"


def _cut_inside(names: dict[str, str]) -> dict[str, str]:
    cut = {_INSIDE.sub("", name): old for name, old in names.items()}
    return cut if len(cut) == len(names) else names
