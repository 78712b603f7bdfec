"""Operations of vitlib's own in torch's dispatcher.

So CUDA graphs, torch.compile and FakeTensors see one call where a GPU runs one kernel, and a CPU
runs the definition that the kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Made at import, as a process registers a name only once. Only optimize() on a GPU imports this.
_LIBRARY = torch.library.Library("vitlib", "DEF")  # type: ignore[no-untyped-call]
OPS: Any = torch.ops.vitlib


def register(
    schema: str,
    definition: Callable[..., Any],
    on_gpu: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Register an operation.

    Args:
        schema: Its name, arguments and results, in torch's words.
        definition: Computes it on any device.
        on_gpu: Computes it on a GPU.
        fake: Returns empty tensors of its results' shapes, dtypes and device.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, definition, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, on_gpu, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"vitlib::{name}", fake, lib=_LIBRARY)
