"""Import of libraries that need torchvision, whose compiled operators may not match torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_operators() -> Iterator[None]:
    """Ignore the registrations of torchvision's operators, so that importing it succeeds."""
    register_fake = torch.library.register_fake

    def register(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = register
    try:
        yield
    finally:
        torch.library.register_fake = register_fake
