"""Memory of weights in oneDNN's layout: read as bytes, and put on bytes of a mapped file.

torch calls such tensors opaque: Python sees no storage of theirs. Private operations of
`torch.ops.mkldnn` give the address, the size and the layout of one. The C interface of torch's
compiled models makes one of memory that is there; its ABI is stable (aoti_torch/c/shim.h). Both may
be absent, so they are tried once a process on a small weight.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitlib.fast import onednn_ops

ALIGNMENT = 64  # of torch's own allocations, in bytes
_ops: Any = torch.ops


class PackedLayout(NamedTuple):
    """Layout of a packed weight in oneDNN, without the weight.

    Attributes:
        shape: The shape of the opaque tensor.
        dtype: Its dtype.
        size: Bytes of its memory, with padding and what the layout adds.
        descriptor: oneDNN's memory descriptor: equal bytes are one layout, for one build of oneDNN.
    """

    shape: torch.Size
    dtype: torch.dtype
    size: int
    descriptor: bytes


def packed_layout(packed: Tensor) -> PackedLayout:
    """Return the layout of a packed weight.

    Args:
        packed: An opaque tensor.

    Returns:
        The layout.
    """
    descriptor: Tensor = _ops.mkldnn._get_mkldnn_serialized_md(packed)
    size = int(_ops.mkldnn._nbytes(packed))
    return PackedLayout(packed.shape, packed.dtype, size, descriptor.numpy().tobytes())


def packed_bytes(packed: Tensor) -> memoryview:
    """Return the memory of a packed weight, valid while the tensor lives.

    Args:
        packed: An opaque tensor.

    Returns:
        A view of its bytes.
    """
    size = packed_layout(packed).size
    buffer = (ctypes.c_char * size).from_address(_ops.mkldnn.data_ptr(packed))
    return memoryview(buffer).cast("B")


def packed_on(memory: Tensor, layout: PackedLayout) -> Tensor:
    """Make a packed weight on memory that holds its bytes.

    Args:
        memory: The bytes, (size,) uint8. The result keeps them alive.
        layout: The layout of the bytes, from a weight that this process packed.

    Returns:
        An opaque tensor, which is only read.

    Raises:
        ValueError: The memory has another size, or is not aligned.
    """
    address, shape = memory.data_ptr(), layout.shape
    if memory.numel() != layout.size or address % ALIGNMENT or not memory.is_contiguous():
        raise ValueError(f"{memory.numel()} bytes at {address:#x} do not have this layout")
    library, pair, handle = _torch_library(), ctypes.c_int64 * 2, ctypes.c_void_p()
    name = str(layout.dtype).removeprefix("torch.")
    status = library.aoti_torch_create_tensor_from_blob_v2(
        address, 2, pair(*shape), pair(shape[1], 1), 0,
        getattr(library, f"aoti_torch_dtype_{name}")(), library.aoti_torch_device_type_cpu(), 0,
        ctypes.byref(handle), library.aoti_torch_layout__mkldnn(),
        layout.descriptor, len(layout.descriptor),
    )  # fmt: skip
    if status:
        raise ValueError("torch makes no packed weight of this memory")
    api: Any = ctypes.pythonapi
    aoti: Any = torch._C._aoti
    capsule = api.PyCapsule_New(handle, None, None)
    packed: Tensor = aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)
    vars(packed)["memory"] = memory  # torch does not own it: it lives as long as this tensor
    return packed


@lru_cache(maxsize=1)
def _torch_library() -> Any:
    """Load torch's library for ctypes, with the signatures of the functions that are called."""
    size, pointer, enum = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    library = ctypes.CDLL(torch._C.__file__)  # finds the symbols of the libraries it was linked to
    library.aoti_torch_create_tensor_from_blob_v2.argtypes = [
        *(pointer, size, ctypes.POINTER(size), ctypes.POINTER(size), size, enum, enum, enum),
        *(ctypes.POINTER(pointer), enum, pointer, size),
    ]
    api: Any = ctypes.pythonapi
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [pointer, ctypes.c_char_p, pointer]
    return library


@lru_cache(maxsize=3)
def has_packed_memory(dtype: torch.dtype) -> bool:
    """Return True if this torch gives and takes the memory of packed weights; tried once.

    Args:
        dtype: float32, bfloat16 or int8.
    """
    # Their oneDNN leaves bytes of a descriptor unset, so that equal layouts look different.
    if torch.__version__ < "2.13":
        return False
    try:
        with torch.no_grad():
            return _survives(dtype)
    except Exception:  # absent, or another signature
        return False


def _survives(dtype: torch.dtype) -> bool:
    """Pack a small weight, put its bytes into other memory, and compare the two."""
    weight = torch.arange(48 * 32, dtype=torch.int32, device="cpu").remainder(97).sub(48)
    packed = pack_as(weight.view(48, 32).to(dtype))
    if packed is None:
        return False
    layout = packed_layout(packed)
    spare = torch.zeros(layout.size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -spare.data_ptr() % ALIGNMENT
    memory = spare[start : start + layout.size]
    memory.numpy()[:] = packed_bytes(packed)
    copy = packed_on(memory, layout)
    return (
        _ops.mkldnn.data_ptr(copy) == memory.data_ptr()
        and packed_layout(copy) == layout
        and torch.equal(copy.to_dense(), packed.to_dense())
    )


def pack_as(weight: Tensor) -> Tensor | None:
    """Pack a weight as the layers of its dtype do.

    Args:
        weight: (N, K) float32, bfloat16 or int8.

    Returns:
        An opaque tensor; None where this CPU or this torch has no kernel for the dtype.
    """
    if weight.dtype == torch.int8:
        return onednn_ops.pack_int8(weight) if onednn_ops.has_int8_linear() else None
    return onednn_ops.pack(weight) if onednn_ops.has_packed_linear(weight.dtype) else None
