"""Call torch's compiler, Inductor, on functions of pixels.

Nothing here imports the compiler before a function is compiled: it takes a second.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BatchFunction = Callable[[Tensor], Tensor]
# Inductor's settings: weights are constants; products are also written as C++ templates; calls
# between kernels are C++.
COMPILER_SETTINGS: dict[str, Any] = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "cpp_wrapper": True,
    "autotune_num_choices_displayed": 0,
}
WRITE_STATS = "_log_autotune_choices_stats"


def trace_whole(function: BatchFunction) -> BatchFunction:
    """Return a function that Inductor compiles at its first call.

    Args:
        function: A function of pixels of one shape and dtype, for one number of threads.

    Returns:
        The same function. It checks nothing of what it was compiled for, as its caller does.
    """
    unchecked = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return compile_alone(function, options=unchecked)


def compile_alone(function: BatchFunction, **arguments: Any) -> BatchFunction:
    """Return a function that is traced whole at its first call.

    Args:
        function: A function of pixels of one shape.
        **arguments: Of torch.compile.

    Returns:
        The same function.
    """

    def step(pixels: Tensor) -> Tensor:
        return function(pixels)

    # The compiler caches by code object: each program gets a function with one of its own.
    code, cells = step.__code__.replace(), step.__closure__
    unique = types.FunctionType(code, globals(), "step", None, cells)
    compiled: BatchFunction = torch.compile(unique, fullgraph=True, dynamic=False, **arguments)
    return compiled


@lru_cache(maxsize=1)
def register_fakes() -> None:
    """Tell the compiler shapes of oneDNN's operations that torch leaves out."""
    torch_library: Any = torch.library
    shapes: dict[str, Callable[..., Tensor]] = {
        "mkldnn::_reorder_linear_weight": lambda weight, *_: weight.new_empty(weight.shape),
        "mkldnn::_linear_pointwise.binary": lambda _, other, *__: other.new_empty(other.shape),
        "onednn::qlinear_prepack": lambda weight, _: weight.new_empty(*reversed(weight.shape)),
    }
    for name, shape in shapes.items():
        with suppress(RuntimeError):  # registered by torch itself
            torch_library.register_fake(name, shape)


def import_compiler() -> Any:
    """Import torch's compiler, and return its caches of compiled code.

    Raises:
        Exception: It cannot be imported, as its folder cannot be made. A second import then raises
            something else, which says nothing of the cause.
    """
    from torch._inductor import codecache  # has no annotations

    return codecache


def load_cpp(source: str) -> None:
    """Compile a C++ library for this CPU and load it, which registers its operations.

    Args:
        source: C++ that includes torch's headers.
    """
    import_compiler().CppCodeCache.load(source)


@contextmanager
def compiler_settings(settings: dict[str, Any]) -> Iterator[None]:
    """Compile with settings of Inductor in a block, and without what it prints.

    Args:
        settings: By Inductor's names.
    """
    # torch's compiler takes a second to import, and has no annotations.
    from torch._inductor import config, select_algorithm

    register_fakes()
    patch: Any = config
    algorithms: Any = select_algorithm
    # It writes to stderr, whatever the settings.
    write_stats = getattr(algorithms, WRITE_STATS, None)
    if write_stats is not None:
        setattr(algorithms, WRITE_STATS, lambda *_: None)
    try:
        with warnings.catch_warnings(), patch.patch(settings):
            warnings.simplefilter("ignore")  # the compiler's, which the caller cannot act on
            yield
    finally:
        if write_stats is not None:
            setattr(algorithms, WRITE_STATS, write_stats)
