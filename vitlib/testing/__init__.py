"""Parity as a tool: assert that two models are the same, and break a model so that tests notice.

- assert_same compares any two modules and names the first block and part that differ, and why.
- damage yields broken copies of a ViT, each of which a test of parity must notice.
"""

from vitlib.testing.damage import damage
from vitlib.testing.report import ParityError
from vitlib.testing.same import assert_same

__all__ = ["ParityError", "assert_same", "damage"]
