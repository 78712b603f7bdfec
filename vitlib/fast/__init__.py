"""The same numbers, faster: optimize(model) for inference on this machine's CPU or GPU."""

from vitlib.fast.build import optimize
from vitlib.fast.model import FastViT

__all__ = ["FastViT", "optimize"]
