"""Register vitlib's own operations with torch's dispatcher.

CUDA graphs, torch.compile and FakeTensors then see one call where a GPU runs one kernel. A CPU runs
the definition that the kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_torch_library: Any = torch.library  # its classes have no annotations
# Created at import, as a process may register a name only once. Only optimize() on a GPU imports
# this file.
_library = _torch_library.Library("vitlib", "DEF")
OPS: Any = torch.ops.vitlib


def register(
    schema: str,
    definition: Callable[..., Any],
    on_gpu: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Register an operation.

    Args:
        schema: Its name, arguments and results, in the dispatcher's notation.
        definition: Computes it on any device.
        on_gpu: Computes it on a GPU.
        fake: Returns empty tensors of its results' shapes, dtypes and device.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, definition, "CompositeExplicitAutograd")
    _library.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(f"vitlib::{name}", fake, lib=_library)
