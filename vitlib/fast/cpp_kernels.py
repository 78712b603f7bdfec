"""C++ kernels of vitlib's own for compiled programs.

How data flows: the folder cpp/ has kernels for AMX's tiles and for AVX-512. Compiling a program
needs a C++ compiler, which compiles the kernels that the program calls as well: once, as torch's
compiler keeps what it compiled. A kernel is registered with torch's dispatcher, so that the program
calls it as it calls torch's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlib.errors import first_line
from vitlib.fast.cpu import this_machine
from vitlib.fast.inductor import import_compiler, load_cpp

logger = logging.getLogger("vitlib")
FOLDER = Path(__file__).with_name("cpp")
# The files that each library is compiled from.
FILES = {
    "attention_amx": ("kernel.h", "tiles.h", "attention.h", "attention_amx.cpp"),
    "attention_avx512": ("kernel.h", "attention.h", "attention_avx512.cpp"),
    "linear_amx": ("kernel.h", "tiles.h", "linear.h", "linear_amx.cpp"),
    "linear_split_amx": ("kernel.h", "tiles.h", "linear.h", "linear_split_amx.cpp"),
}


def operation(name: str) -> Any:
    """Return the operation of a kernel that is loaded.

    Args:
        name: Its name.
    """
    return getattr(torch.ops.vitlib, name)


# A function of an operation's arguments that returns an empty tensor of its result's shape.
Fake = Callable[..., Tensor]


@lru_cache(maxsize=8)
def load_kernels(
    library: str, fakes: tuple[tuple[str, Fake], ...], run_sample: Callable[[], object]
) -> bool:
    """Compile a library of kernels, or load it where it is compiled already, once a process.

    Args:
        library: Its name, of FILES.
        fakes: The names of its operations, each with a fake for the compiler.
        run_sample: Runs each operation once.

    Returns:
        False where it cannot be compiled or does not run.

    Raises:
        Exception: torch's compiler cannot be imported, see import_compiler.
    """
    import_compiler()
    try:
        # Operations are registered for the process, not for this module.
        if not all(hasattr(torch.ops.vitlib, name) for name, _ in fakes):
            load_cpp(read_source(library))
            for name, fake in fakes:
                torch.library.register_fake(f"vitlib::{name}", fake)
        run_sample()
    except Exception as error:  # no compiler, one older than AMX, a torch without small products
        reason = f"{type(error).__name__}: {first_line(error)}"
        logger.info("%s is not compiled, and torch's kernels serve: %s", library, reason)
        return False
    return True


def read_source(library: str) -> str:
    """Return the source of a library of kernels.

    Args:
        library: Its name, of FILES.

    Returns:
        C++. Its first line names torch and the CPU: what is compiled for one of each is compiled
        anew for another, as the compiler keeps a library by its source.
    """
    machine = this_machine()
    first = f"// For torch {torch.__version__} on {machine.model} ({machine.features})."
    parts = [(FOLDER / name).read_text(encoding="utf-8") for name in FILES[library]]
    return "\n".join([first, *parts])
