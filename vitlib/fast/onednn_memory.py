"""Memory of weights in oneDNN's layout: read as bytes, and put on bytes of a mapped file.

torch calls such tensors opaque: Python sees no storage of theirs. Private operations of
`torch.ops.mkldnn` give the address, the size and the layout of one. The C interface of torch's
compiled models makes one of memory that is there; its ABI is stable (aoti_torch/c/shim.h). Both may
be absent, so they are tried once a process on a small weight.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vitlib.fast import onednn_ops

ALIGNMENT = 64  # of torch's own allocations, in bytes
_ops: Any = torch.ops


def packed_layout(packed: Tensor) -> bytes:
    """Return oneDNN's description of the layout of a packed weight.

    Args:
        packed: An opaque tensor.

    Returns:
        The bytes of the memory descriptor: equal bytes are one layout, for one build of oneDNN.
    """
    descriptor: Tensor = _ops.mkldnn._get_mkldnn_serialized_md(packed)
    return descriptor.numpy().tobytes()


def packed_size(packed: Tensor) -> int:
    """Return the bytes of a packed weight, with its padding and what its layout adds.

    Args:
        packed: An opaque tensor.
    """
    return int(_ops.mkldnn._nbytes(packed))


def packed_bytes(packed: Tensor) -> memoryview:
    """Return the memory of a packed weight, valid while the tensor lives.

    Args:
        packed: An opaque tensor.

    Returns:
        A view of its bytes.
    """
    buffer = (ctypes.c_char * packed_size(packed)).from_address(_ops.mkldnn.data_ptr(packed))
    return memoryview(buffer).cast("B")


def packed_on(memory: Tensor, like: Tensor) -> Tensor:
    """Make a packed weight on memory that holds its bytes.

    Args:
        memory: The bytes, (size,) uint8. The result keeps them alive.
        like: A packed weight of the same shape, dtype and layout.

    Returns:
        An opaque tensor, which is only read.

    Raises:
        ValueError: The memory has another size, or is not aligned.
    """
    address = memory.data_ptr()
    if memory.numel() != packed_size(like) or address % ALIGNMENT or not memory.is_contiguous():
        raise ValueError(f"{memory.numel()} bytes at {address:#x} hold no weight as this one")
    library = ctypes.CDLL(torch._C.__file__)  # finds the symbols of the libraries it was linked to
    create = library.aoti_torch_create_tensor_from_blob_v2
    size, pointer, enum = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    sizes = ctypes.POINTER(size)
    create.argtypes = [
        *(pointer, size, sizes, sizes, size, enum, enum, enum),
        *(ctypes.POINTER(pointer), enum, pointer, size),
    ]
    layout, handle = packed_layout(like), pointer()
    name = str(like.dtype).removeprefix("torch.")
    shape, strides = (size * 2)(*like.shape), (size * 2)(like.shape[1], 1)
    status = create(
        address, 2, shape, strides, 0, getattr(library, f"aoti_torch_dtype_{name}")(),
        library.aoti_torch_device_type_cpu(), 0, ctypes.byref(handle),
        library.aoti_torch_layout__mkldnn(), layout, len(layout),
    )  # fmt: skip
    if status:
        raise ValueError("torch makes no packed weight of this memory")
    api: Any = ctypes.pythonapi
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [pointer, ctypes.c_char_p, pointer]
    aoti: Any = torch._C._aoti
    packed: Tensor = aoti.alloc_tensor_by_stealing_from_void_ptr(
        api.PyCapsule_New(handle, None, None)
    )
    vars(packed)["memory"] = memory  # torch does not own it: it lives as long as this tensor
    return packed


@lru_cache(maxsize=1)
def has_packed_memory() -> bool:
    """Return True if this torch gives and takes the memory of packed weights; tried once."""
    try:
        with torch.no_grad():
            return all(map(_survives, (torch.float32, torch.bfloat16, torch.int8)))
    except Exception:  # absent, or another signature
        return False


def _survives(dtype: torch.dtype) -> bool:
    """Pack a small weight, put its bytes into other memory, and compare the two."""
    weight = torch.arange(48 * 32, dtype=torch.int32, device="cpu").remainder(97).sub(48)
    packed = pack_as(weight.view(48, 32).to(dtype))
    if packed is None:  # no kernel for this dtype, and so no weight of it
        return True
    count = packed_size(packed)
    spare = torch.zeros(count + ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -spare.data_ptr() % ALIGNMENT
    memory = spare[start : start + count]
    memory.numpy()[:] = packed_bytes(packed)
    copy = packed_on(memory, packed)
    return (
        _ops.mkldnn.data_ptr(copy) == memory.data_ptr()
        and packed_layout(copy) == packed_layout(packed)
        and (copy.shape, copy.dtype) == (packed.shape, packed.dtype)
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
