"""Faster inference with the same numbers: optimize(model) for this machine's CPU or GPU."""

from typing import TYPE_CHECKING, Any

from vitlib.fast.model import FastViT
from vitlib.fast.optimization import optimize

if TYPE_CHECKING:
    from vitlib.fast.deserialize import load

__all__ = ["FastViT", "load", "optimize"]


def __getattr__(name: str) -> Any:
    """Load `load` on first use (PEP 562): few programs open a saved model."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitlib.fast.deserialize import load

    globals()["load"] = load
    return load
