"""Training: `finetune` and its settings; the loop, its data and its losses below them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitlib.train.config import TrainConfig

if TYPE_CHECKING:
    from vitlib.train.run import Finetuned, finetune

__all__ = ["Finetuned", "TrainConfig", "finetune"]


def __getattr__(name: str) -> Any:
    """Settings need no torch; the rest is imported when it is asked for."""
    if name not in ("Finetuned", "finetune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitlib.train import run

    return getattr(run, name)
