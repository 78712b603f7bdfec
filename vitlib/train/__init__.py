"""Training: `finetune` and its settings, and the loop, data and losses below them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitlib.train.config import TrainConfig

if TYPE_CHECKING:
    from vitlib.train.run import Finetuned, finetune

__all__ = ["Finetuned", "TrainConfig", "finetune"]


def __getattr__(name: str) -> Any:
    """Import the rest on first use: settings need no torch, and `--help` stays fast."""
    if name not in ("Finetuned", "finetune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitlib.train import run

    return getattr(run, name)
