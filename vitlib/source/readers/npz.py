"""Reader of NumPy's .npz archives, the format of Google's ViTs.

Members of a zip start at any byte, and PyTorch needs numbers at multiples of their size. Arrays
that are aligned by chance are memory-mapped. The others are copied once into one aligned buffer,
half of them by a second thread, and tested for NaN on the way.
"""

from __future__ import annotations

import math
import mmap
import re
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from vitlib.errors import CheckpointError
from vitlib.source.readers.contents import Contents, Part, all_finite, parts_are_finite, read_parts
from vitlib.source.readers.zips import Member

MAX_UNPACKED_BYTES = 16 * 2**30  # of a compressed archive
MAX_RATIO = 100  # of a compressed archive's bytes unpacked to its bytes in the file
_SMALL_BYTES = 64 * 2**20  # below it the ratio does not matter
_MAX_HEADER_BYTES = 4096
_ALIGNMENT = 64
_CHUNK_BYTES = 2**20
_MAPPED = -1  # offset of arrays that are mapped and have none in the buffer
_DTYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "V2": torch.bfloat16,  # NumPy has no bfloat16: JAX saves it as two bytes of type void
    "c16": torch.complex128,
    "c8": torch.complex64,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u8": torch.uint64,
    "u4": torch.uint32,
    "u2": torch.uint16,
    "u1": torch.uint8,
    "b1": torch.bool,
}
_HEADER = re.compile(
    r"\{\s*'descr':\s*'(?P<order>[<>|=])(?P<dtype>[a-zA-Z]\d*)'\s*,"
    r"\s*'fortran_order':\s*(?P<fortran>True|False)\s*,"
    r"\s*'shape':\s*\((?P<shape>[\dL, ]{0,1000})\)\s*,?\s*\}\s*"
)


class _Array(NamedTuple):
    name: str
    part: Part
    shape: tuple[int, ...]
    fortran: bool
    member: Member
    header: int  # bytes before its numbers


def read_npz(path: Path, members: Sequence[Member]) -> Contents:
    """Read every numeric array of an .npz file as a tensor.

    Args:
        path: The archive.
        members: Its members, from read_members().

    Returns:
        Tensors by names without `.npy`. Arrays of text are listed as ignored.

    Raises:
        CheckpointError: An array holds Python objects, a header contradicts its member, or a
            compressed archive exceeds MAX_UNPACKED_BYTES or MAX_RATIO.
    """
    packed = not all(member.stored for member in members)
    total = sum(member.unpacked for member in members)
    ratio_broken = total > max(_SMALL_BYTES, MAX_RATIO * path.stat().st_size)
    if packed and (total > MAX_UNPACKED_BYTES or ratio_broken):
        raise CheckpointError(
            f"{path} would unpack to {total} bytes: at most {MAX_UNPACKED_BYTES}, and {MAX_RATIO} "
            "times the file, are unpacked; save it with np.savez"
        )
    try:
        with zipfile.ZipFile(path) if packed else nullcontext() as archive:
            arrays, text = _plan(path, members, archive)
            copied = [array for array in arrays if array.part.offset != _MAPPED]
            buffer = _buffer(sum(_align(array.part.size) for array in copied))
            finite: bool | None
            if archive is not None:
                finite = all([_unpack(archive, array, buffer) for array in arrays])  # noqa: C419
            else:
                mapped = [array.part for array in arrays if array.part.offset == _MAPPED]
                finite = read_parts(path, [array.part for array in copied], memoryview(buffer))
                finite = finite and parts_are_finite(path, mapped)
            mapping: Any = None
            if len(copied) < len(arrays):
                mapping = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    except CheckpointError:
        raise
    except Exception as error:  # damaged archives raise whatever they lead to
        raise CheckpointError(
            f"{path} is truncated or not an .npz file ({type(error).__name__}): download it again"
        ) from error
    tensors = {array.name: _tensor(array, buffer, mapping) for array in arrays}
    return Contents(tensors, finite=finite, ignored=tuple(text))


def _plan(
    path: Path, members: Sequence[Member], archive: zipfile.ZipFile | None
) -> tuple[list[_Array], list[str]]:
    """Return the ranges and offsets of arrays, from the headers alone, and the names of text."""
    arrays: dict[str, _Array] = {}
    text, end = [], 0
    with path.open("rb", buffering=0) as file:
        for member in members:
            name = member.name.removesuffix(".npy")
            if archive is None:
                file.seek(member.start)
                header, length = _header(file, member)
            else:
                with archive.open(member.name) as packed:
                    header, length = _header(packed, member)
            match = _HEADER.fullmatch(header)
            kind = match["dtype"] if match else "an object or record"
            if kind[0] in "US":
                text.append(name)
                continue
            if match is None or kind not in _DTYPES or (match["order"] == ">" and kind[1:] != "1"):
                raise CheckpointError(
                    f"{path}: {name[:80]} is no array of plain little-endian numbers ({kind}): "
                    "only those are read, as pickles inside could run code"
                )
            dtype = _DTYPES[kind]
            shape = tuple(int(n.strip(" L")) for n in match["shape"].split(",") if n.strip())
            size = math.prod(shape) * dtype.itemsize
            if size != member.unpacked - length or len(shape) > 32 or name in arrays:
                raise CheckpointError(
                    f"{path}: {name[:80]} has {member.unpacked - length} bytes or stands twice: "
                    f"expected {size} bytes, once; download it again"
                )
            start = member.start + length
            is_mapped = archive is None and size > 0 and start % dtype.itemsize == 0
            part = Part(dtype, start, size, _MAPPED if is_mapped else end)
            arrays[name] = _Array(name, part, shape, match["fortran"] == "True", member, length)
            end += 0 if is_mapped else _align(size)
    return list(arrays.values()), text


def _header(file: IO[bytes], member: Member) -> tuple[str, int]:
    """Return the text of a .npy header and its length in bytes; ("", 0) if there is none."""
    start = file.read(min(12, member.unpacked))
    wide = start[6:7] != b"\x01"
    length = int.from_bytes(start[8:12] if wide else start[8:10], "little")
    before = 12 if wide else 10
    if start[:6] != b"\x93NUMPY" or length > min(_MAX_HEADER_BYTES, member.unpacked - before):
        return "", 0
    rest = file.read(length + before - len(start))
    return (start[before:] + rest).decode("latin1"), before + length


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _buffer(size: int) -> mmap.mmap:
    """Allocate zeroed memory, in huge pages if possible: 4 KiB pages take three times as long."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, max(size, 1))
    buffer = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without
            return buffer
    return buffer


def _unpack(archive: zipfile.ZipFile, array: _Array, buffer: mmap.mmap) -> bool:
    """Unpack one array into the buffer and return True if it is finite; zipfile checks the CRC."""
    target = memoryview(buffer)[array.part.offset : array.part.offset + array.part.size]
    finite, at = True, 0
    with archive.open(array.member.name) as packed:
        packed.read(array.header)
        while at < len(target):
            data = packed.read(min(_CHUNK_BYTES, len(target) - at))
            if not data:
                raise EOFError(f"{len(target) - at} bytes short")
            target[at : at + len(data)] = data
            at += len(data)
        if packed.read(1):
            raise EOFError("longer than it says")
    for start in range(0, len(target), _CHUNK_BYTES):
        finite = finite and all_finite(target[start : start + _CHUNK_BYTES], array.part.dtype)
    return finite


def _tensor(array: _Array, buffer: mmap.mmap, mapping: Any) -> Tensor:
    """Make a tensor of an array's bytes, in C order."""
    dtype, start, size, offset = array.part
    shape = array.shape[::-1] if array.fortran else array.shape
    if not size:
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
    elif offset == _MAPPED and mapping is not None:
        part = mapping[start : start + size]
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(part, 0, shape)  # type: ignore[call-overload]
    else:
        count = size // dtype.itemsize
        tensor = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(shape)
    if array.fortran:
        tensor = tensor.permute(*range(tensor.ndim - 1, -1, -1)).contiguous()
    return tensor
