"""The same numbers, faster: optimize(model) for inference on this machine's CPU or GPU."""

from vitlib.fast.fast_vit import FastViT
from vitlib.fast.optimization import optimize
from vitlib.fast.read_folder import load

__all__ = ["FastViT", "load", "optimize"]
