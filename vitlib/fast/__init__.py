"""Faster inference with the same numbers: optimize(model) for this machine's CPU or GPU."""

from vitlib.fast.deserialize import load
from vitlib.fast.model import FastViT
from vitlib.fast.optimization import optimize

__all__ = ["FastViT", "load", "optimize"]
