"""The same numbers, faster: optimize(model) for inference on this machine's CPU or GPU."""

from vitlib.fast.build import optimize
from vitlib.fast.model import FastViT
from vitlib.fast.read import load

__all__ = ["FastViT", "load", "optimize"]
