"""What stands in for a GPU in tests: tensors without memory, a recording torch.cuda, a count."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vitlib import ImageProcessor, ViT, ViTConfig
from vitlib.fast import cuda, cuda_parts

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BEIT: dict[str, Any] = {
    "absolute_position": False,
    "relative_position": "block",
    "layer_scale": 0.1,
    "key_bias": False,
    "pool": "mean",
    "final_norm": "pooled",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {},
    "pooler": {"pool": "pooler"},
    "quick gelu, pre norm": {
        "activation": "quick_gelu",
        "pre_norm": True,
        "patch_bias": False,
        "final_norm": "pooled",
        "projection_dim": 20,
    },
    "registers": {"num_registers": 3, "pool": "cls+mean", "activation": "swiglu"},
    "distilled": {"dist_token": True, "dist_head": True, "qkv_bias": False},
    "rotary": {"absolute_position": False, "rope_theta": 100.0, "num_registers": 3},
    "relative": BEIT,
    "relative shared": {**BEIT, "relative_position": "shared", "relative_resize": "geometric"},
    "map": {"class_token": False, "pool": "map", "attention_pool": True},
    "no class rows": {"class_position": False, "num_classes": 0},
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small(**changes: Any) -> ViT:
    """A small model (of sides that 8-bit floats take too) with every parameter non-trivial."""
    fields: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 5}
    fields |= {"image_size": 32, "patch_size": 8, "pooler_dim": 20}
    model = ViT(ViTConfig(**(fields | changes))).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.2, generator=generator)
    model.image_processor = ImageProcessor(size=(32, 32), image_mean=MEAN, image_std=STD)
    return model


def optimized(
    model: ViT, precision: Any = "fp32", batch_size: int | None = None, compiles: bool = False
) -> cuda.CudaViT:
    """What a GPU runs, on the CPU."""
    found = cuda.optimize_cuda(model, precision, batch_size, CPU, compiles)
    assert isinstance(found, cuda.CudaViT)
    return found


def kept_on_gpu(model: ViT) -> ViT:
    """The model with its tensors on a GPU; called inside a FakeTensorMode."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                there: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
                is_parameter = held is module._parameters
                held[name] = nn.Parameter(there, False) if is_parameter else there
    return model


def fake_mode(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> Any:
    """A mode in which tensors can lie on cuda:0, of a torch without CUDA.

    Indexing asks for the guard of a device, and a CPU's torch has none for CUDA: the one of the
    meta device, which does nothing, is put in its place.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    try:
        guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except ValueError:
        pytest.skip("this torch hides its table of device guards")
    if guards[1] is None:
        guards[1] = guards[14]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(cuda, "has_fp8", lambda _: True)

    def copied(self: Any, module: nn.Module) -> nn.Module:  # FakeTensors cannot be deep-copied
        like: Any = {"dtype": torch.float32, "device": self.device}
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty(p.shape, **like), False) for p in module.parameters()
        }
        memo |= {id(b): torch.empty(b.shape, **like) for b in module.buffers()}
        return copy.deepcopy(module, memo)

    monkeypatch.setattr(cuda_parts.Parts, "copied", copied)
    return FakeTensorMode(allow_non_fake_inputs=False)


VIEWS = frozenset(
    ("view", "_unsafe_view", "expand", "permute", "transpose", "slice", "select", "t", "unbind",
     "unsqueeze", "squeeze", "detach", "alias", "as_strided", "split", "_reshape_alias", "empty")
)  # fmt: skip


class Count(TorchDispatchMode):
    """Counts operations that are kernels on a GPU, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self.of[name] += 1
            self.calls.append((name, args))
        return func(*args, **(kwargs or {}))


class Waits(Count):
    """Counts operations and also waits for a GPU: reads of numbers, copies that block.

    A number read from a tensor without memory is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name == "_local_scalar_dense":
            self._note(name, args[0].is_cuda)
            return 1
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if name in ("nonzero", "masked_select", "_unique2"):  # whose shape is a number
            self._note(name, args[0].is_cuda)
        if name in ("_to_copy", "copy_"):
            to, source = (result, args[0]) if name == "_to_copy" else args[:2]
            quietly = (kwargs or {}).get("non_blocking") or (
                name == "copy_" and args[2:] == (True,)
            )
            if source.is_cuda and to.is_cpu:
                self._note(f"{name} to the CPU", True)
                with _disable_current_modes():
                    return torch.ones(to.shape, dtype=to.dtype)
            self._note(
                f"{name} to the GPU", to.is_cuda and source.is_cpu and not
                (quietly and source.is_pinned()),
            )  # fmt: skip
        return result

    def _note(self, what: str, waits: bool) -> None:
        if waits:
            self.waits.append(what)


def fake_training(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> Any:
    """As fake_mode, with what training asks of torch.cuda, and a backward pass."""
    mode = fake_mode(monkeypatch, capability)
    mode.allow_non_fake_inputs = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)

    def is_narrow(params: Any) -> bool:
        return capability >= (8, 0) and params.query.dtype != torch.float32

    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", is_narrow)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda _: True)

    def pin(tensor: Tensor) -> Tensor:
        pinned: Any = tensor.clone()
        pinned.is_in_pinned_memory = True
        return pinned

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda x: hasattr(x, "is_in_pinned_memory"))
    monkeypatch.setattr(Tensor, "backward", backward_by_nodes)
    # A block is computed again once a backward pass, which it tells by this number.
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
    return mode


def backward_by_nodes(loss: Tensor) -> None:
    """Do as loss.backward(), node by node, as torch's engine needs streams of a GPU."""
    order: list[Any] = []
    visited: set[Any] = set()

    def visit(node: Any) -> None:
        if node is None or node in visited:
            return
        visited.add(node)
        for after, _ in node.next_functions:
            visit(after)
        order.append(node)

    visit(loss.grad_fn)
    waiting: dict[Any, list[Any]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in reversed(order):
        gradients = waiting.pop(node, None)
        if gradients is None:
            continue
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = gradients[0] if leaf.grad is None else leaf.grad + gradients[0]
            continue
        results = node(*gradients)
        results = results if isinstance(results, tuple) else (results,)
        for (after, index), part in zip(node.next_functions, results, strict=True):
            if after is None or part is None:
                continue
            shape = after._input_metadata[index].shape
            part = part if part.shape == shape else part.sum_to_size(shape)
            sums = waiting.setdefault(after, [None] * len(after._input_metadata))
            sums[index] = part if sums[index] is None else sums[index] + part


def kernels(precision: str, depth: int, **changes: Any) -> Counter[str]:
    """What one image of levels launches."""
    quick = optimized(small(depth=depth, **changes), precision)
    assert quick.on_levels is not None
    run = cuda.called(cuda.at_grid(quick.on_levels, (4, 4), CPU), "forward", quick.runner.dtype)
    with torch.no_grad(), Count() as count:
        run(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    return count.of


class Stream:
    """A stream that remembers for whom it waited."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: Any) -> None:
        self.waited = other

    def wait_event(self, event: Any) -> None:
        self.waited = event

    def __repr__(self) -> str:
        return self.name


class RecordedCuda:
    """As much of torch.cuda as passes.py and capture.py use: what they do is written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Stream] = []
        self.asked: list[dict[str, Any]] = []  # what each capture was given
        self.log: list[str] = []
        self.user = self.current = Stream("the caller's")
        self.capturing = 0
        self.most_capturing = 0
        outer = self

        def stream_made(device: Any = None) -> Stream:  # noqa: ARG001
            outer.made.append(Stream(f"made {len(outer.made)}"))
            return outer.made[-1]

        @contextlib.contextmanager
        def stream(to: Stream) -> Iterator[None]:
            before, outer.current = outer.current, to
            try:
                yield
            finally:
                outer.current = before

        class Graph:
            """torch.cuda.graph: where the capture fails its stream stays the current one."""

            def __init__(self, graph: Any, **given: Any) -> None:  # noqa: ARG002
                outer.asked.append(given)

            def __enter__(self) -> None:
                outer.capturing += 1
                outer.most_capturing = max(outer.most_capturing, outer.capturing)
                self.before, outer.current = outer.current, Stream("of the capture")

            def __exit__(self, kind: Any, *_: Any) -> None:
                outer.capturing -= 1
                if kind is not None:
                    raise RuntimeError("operation failed due to a previous error during capture")
                outer.current = self.before

        def replay() -> None:
            outer.log.append("replay")

        class Event:
            def record(self, stream: Any = None) -> None:  # noqa: ARG002
                outer.log.append("event")

        values: dict[str, Any] = {
            "device": lambda _: contextlib.nullcontext(),
            "Event": Event,
            "Stream": stream_made,
            "stream": stream,
            "graph": Graph,
            "graph_pool_handle": lambda: (0, len(outer.log)),
            "CUDAGraph": lambda: types.SimpleNamespace(replay=replay),
            "current_stream": lambda *_: outer.current,
            "set_stream": lambda to: setattr(outer, "current", to),
            "synchronize": lambda *_: None,
            "is_current_stream_capturing": lambda: False,
        }
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, value)


def pixels_of(levels: Tensor) -> Tensor:
    """Levels as normalised pixels."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (levels / 255 - mean) / std
