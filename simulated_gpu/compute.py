"""Compute on the CPU what kernels of a simulated GPU do not, in the memory of their tensors.

How data flows: a dispatch mode lets torch run its operation for CUDA, which checks, allocates and
launches. It then calls the same operation with tensors on the CPU that lie in the same memory, and
copies the results to where the operation's own lie. During a capture this call is kept, and made at
each replay of the graph.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from simulated_gpu.definitions import DEFINITIONS, aten

Step = Callable[[], None]
# Allocate, read or mark: nothing is to be computed.
IDLE = {
    aten._local_scalar_dense, aten.record_stream, aten.is_pinned, aten._pin_memory, aten.resize_,
    aten.set_, aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty,
    aten.new_empty_strided, aten.detach, aten.alias, aten.lift_fresh,
}  # fmt: skip
# The number of their results lies in memory that no kernel has written: the CPU's are copied.
DATA_DEPENDENT = {
    aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount, aten.equal,
}  # fmt: skip
KERNELS = {"norm_rows", "activate_rows", "rotate"}  # of vitlib.fast.row_kernels

_steps_of_graphs: dict[int, list[Step]] = {}  # by the graph's id
_captured: list[Step] = []  # of the graph that is captured; torch captures one at a time


def on_cpu(value: Any) -> Any:
    """Return a tensor on the CPU in the memory of one on a simulated GPU.

    Args:
        value: A tensor; anything else is returned as it is, but for devices and generators.

    Returns:
        The tensor, the CPU for a device, None for a generator of a GPU.
    """
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.Generator) and value.device.type == "cuda":
        return None
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    storage = value.untyped_storage()
    if not value.numel() or not storage.nbytes():
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="cpu", pin_memory=False
        )
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    levels = torch.frombuffer(memory, dtype=torch.uint8)
    empty = torch.empty(0, dtype=value.dtype, device="cpu")
    return empty.set_(  # type: ignore[call-overload]
        levels.untyped_storage(), value.storage_offset(), value.shape, value.stride()
    )


class Compute(TorchDispatchMode):
    """A mode that computes operations on simulated GPUs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operation, and compute its result where it is on a GPU."""
        kwargs = kwargs or {}
        if any(has_own_dispatch(kind) for kind in types):
            return NotImplemented  # its own dispatch comes first, and calls plain operations
        compute_triton_kernels()
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [x for x in inputs if x.is_cuda]
        if any(isinstance(x, FakeTensor) or x.is_meta for x in inputs):
            return func(*args, **kwargs)
        # Asked before the call, which may end the capture.
        captures = (bool(on_gpu) or "device" in kwargs) and torch.cuda.is_current_stream_capturing()
        if on_gpu and not captures and is_data_dependent(func, args):
            return call_on_cpu(func, args, kwargs, on_gpu[0].device)
        result = func(*args, **kwargs)
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in outputs):
            return result
        if (on_gpu or any(x.is_cuda for x in outputs)) and is_computed(func, args, kwargs, outputs):
            step = make_step(func, args, kwargs, outputs)
            if captures:
                _captured.append(step)
            else:
                step()
        return result


def has_own_dispatch(kind: type) -> bool:
    """Return True for a subclass of Tensor that dispatches operations itself, as DTensor does."""
    plain = kind in (Tensor, torch.nn.Parameter) or issubclass(kind, FakeTensor)
    dispatch = getattr(kind, "__torch_dispatch__", None)
    return not plain and dispatch is not torch._C._disabled_torch_dispatch_impl


def is_data_dependent(func: Any, args: Any) -> bool:
    """Return True where the shape of a result depends on numbers on the device."""
    if func.overloadpacket == aten.index:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return func.overloadpacket in DATA_DEPENDENT


def call_on_cpu(func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
    """Call an operation on the CPU alone, and copy its results."""
    result = func(*pytree.tree_map(on_cpu, args), **pytree.tree_map(on_cpu, kwargs))
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, result)


def is_computed(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> bool:
    """Return True where an operation has numbers that a kernel would have written."""
    if func.overloadpacket in IDLE or func.namespace in ("c10d", "_c10d_functional"):
        return False
    if is_mutation(func):
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        source = values.get("src")
        is_transfer = func.overloadpacket == aten.copy_ and values.get("non_blocking")
    else:
        source, is_transfer = args[0] if args else None, kwargs.get("non_blocking")
        shared = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs))
                  if isinstance(x, Tensor) and x.numel()}  # fmt: skip
        if outputs and all(x.untyped_storage().data_ptr() in shared for x in outputs if x.numel()):
            return False  # a view, or an input
    # A copy to the host that does not wait: the library writes the numbers when the host has.
    to_host = bool(is_transfer) and any(x.device.type == "cpu" for x in outputs)
    return not (
        to_host
        and isinstance(source, Tensor)
        and source.dtype == outputs[0].dtype
        and source.is_contiguous()
        and outputs[0].is_contiguous()
    )


def is_mutation(func: Any) -> bool:
    """Return True for an operation that writes to an argument."""
    arguments = func._schema.arguments
    return any(a.alias_info is not None and a.alias_info.is_write for a in arguments)


def make_step(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Step:
    """Make the call that computes an operation; it holds memory, and no tensor of the GPU."""
    cpu_args = pytree.tree_map(on_cpu, args)
    cpu_kwargs = {k: v for k, v in pytree.tree_map(on_cpu, kwargs).items() if k != "pin_memory"}
    definition = DEFINITIONS.get(func, func)
    targets = [] if is_mutation(func) else [on_cpu(x) for x in outputs]
    is_inference = torch.is_inference_mode_enabled()

    def step() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            copy_results(targets, definition(*cpu_args, **cpu_kwargs))

    return step


def copy_results(targets: list[Tensor], result: Any) -> None:
    """Copy results to their places.

    A definition leaves out what nothing reads, such as seeds; a kernel pads the sums of attention.
    """
    computed = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    for index, (target, value) in enumerate(zip(targets, computed, strict=False)):
        assert target.shape == value.shape or index, (target.shape, value.shape)
        if target.shape == value.shape:
            target.copy_(value)


def compute_triton_kernels() -> None:
    """Compute vitlib's Triton kernels too where they are called outside an operation of torch.

    vitlib compares one with its definition before it uses them. They are compiled and launched, and
    then computed by the definition.
    """
    kernels: Any = sys.modules.get("vitlib.fast.row_kernels")
    if getattr(kernels, "rotate", None) is None or hasattr(kernels, "is_simulated"):
        return
    from vitlib.fast import row_ops

    kernels.is_simulated = True
    for name in KERNELS:
        launch, definition = getattr(kernels, name), getattr(row_ops, f"define_{name}")

        def run(*args: Any, launch: Any = launch, definition: Any = definition) -> Any:
            result = launch(*args)
            targets = [on_cpu(x) for x in pytree.tree_leaves(result)]
            cpu_args = pytree.tree_map(on_cpu, args)

            def step() -> None:
                copy_results(targets, definition(*cpu_args))

            if torch.cuda.is_current_stream_capturing():
                _captured.append(step)
            else:
                step()
            return result

        setattr(kernels, name, run)


def install() -> None:
    """Compute in this thread and all that it starts, and at the replay of graphs."""
    graph: Any = torch.cuda.CUDAGraph
    begin, replay, run = graph.capture_begin, graph.replay, threading.Thread.run

    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        global _captured
        _captured = _steps_of_graphs[id(self)] = []
        begin(self, *args, **kwargs)

    def replay_steps(self: Any) -> None:
        replay(self)
        for step in _steps_of_graphs[id(self)]:
            step()

    def run_thread(self: threading.Thread) -> None:
        with Compute():
            run(self)

    graph.capture_begin, graph.replay = capture_begin, replay_steps
    threading.Thread.run = run_thread  # type: ignore[method-assign]
    Compute().__enter__()
