"""NumPy archives of arrays, as Google's ViTs come: read into one buffer, tested on the way.

Members of a zip start anywhere, and PyTorch wants numbers at multiples of their size: those that
happen to lie so are mapped, the others copied, once, to aligned places, the other half of them by a
thread beside.
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
_MAPPED = -1  # in place of a place in the buffer
_DTYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "V2": torch.bfloat16,  # NumPy has no bfloat16: JAX saves two bytes of nothing
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
    """Every array of an .npz file as a tensor; names without `.npy`; text is left out.

    Raises CheckpointError for arrays of Python objects, for a header that its member contradicts,
    and for a compressed archive above MAX_UNPACKED_BYTES or MAX_RATIO.
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
            moved = [array for array in arrays if array.part.offset != _MAPPED]
            buffer = _buffer(sum(_aligned(array.part.size) for array in moved))
            finite: bool | None
            if archive is not None:
                finite = all([_unpack(archive, array, buffer) for array in arrays])  # noqa: C419
            else:
                stay = [array.part for array in arrays if array.part.offset == _MAPPED]
                finite = read_parts(path, [array.part for array in moved], memoryview(buffer))
                finite = finite and parts_are_finite(path, stay)
            mapping: Any = None
            if len(moved) < len(arrays):
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
    """Where each array lies and where it goes, from the headers alone; and the names of text."""
    arrays: dict[str, _Array] = {}
    text, place = [], 0
    with path.open("rb", buffering=0) as file:
        for member in members:
            name = member.name.removesuffix(".npy")
            if archive is None:
                file.seek(member.start)
                header, length = _header(file, member)
            else:
                with archive.open(member.name) as packed:
                    header, length = _header(packed, member)
            found = _HEADER.fullmatch(header)
            kind = found["dtype"] if found else "an object or record"
            if kind[0] in "US":
                text.append(name)
                continue
            if found is None or kind not in _DTYPES or (found["order"] == ">" and kind[1:] != "1"):
                raise CheckpointError(
                    f"{path}: {name[:80]} is no array of plain little-endian numbers ({kind}): "
                    "only those are read, as pickles inside could run code"
                )
            dtype = _DTYPES[kind]
            shape = tuple(int(n.strip(" L")) for n in found["shape"].split(",") if n.strip())
            size = math.prod(shape) * dtype.itemsize
            if size != member.unpacked - length or len(shape) > 32 or name in arrays:
                raise CheckpointError(
                    f"{path}: {name[:80]} has {member.unpacked - length} bytes or stands twice: "
                    f"expected {size} bytes, once; download it again"
                )
            start = member.start + length
            stays = archive is None and size > 0 and start % dtype.itemsize == 0
            part = Part(dtype, start, size, _MAPPED if stays else place)
            arrays[name] = _Array(name, part, shape, found["fortran"] == "True", member, length)
            place += 0 if stays else _aligned(size)
    return list(arrays.values()), text


def _header(file: IO[bytes], member: Member) -> tuple[str, int]:
    """The text of a .npy header, and the bytes up to the numbers; "" where it is not one."""
    start = file.read(min(12, member.unpacked))
    wide = start[6:7] != b"\x01"
    length = int.from_bytes(start[8:12] if wide else start[8:10], "little")
    before = 12 if wide else 10
    if start[:6] != b"\x93NUMPY" or length > min(_MAX_HEADER_BYTES, member.unpacked - before):
        return "", 0
    rest = file.read(length + before - len(start))
    return (start[before:] + rest).decode("latin1"), before + length


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _buffer(size: int) -> mmap.mmap:
    """Zeroed memory in huge pages where the system has them: 4 KiB pages take thrice the time."""
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
    """Unpack one array to its place; whether it is finite. zipfile checks length and CRC."""
    place = memoryview(buffer)[array.part.offset : array.part.offset + array.part.size]
    finite, at = True, 0
    with archive.open(array.member.name) as packed:
        packed.read(array.header)
        while at < len(place):
            found = packed.read(min(_CHUNK_BYTES, len(place) - at))
            if not found:
                raise EOFError(f"{len(place) - at} bytes short")
            place[at : at + len(found)] = found
            at += len(found)
        if packed.read(1):
            raise EOFError("longer than it says")
    for start in range(0, len(place), _CHUNK_BYTES):
        finite = finite and all_finite(place[start : start + _CHUNK_BYTES], array.part.dtype)
    return finite


def _tensor(array: _Array, buffer: mmap.mmap, mapping: Any) -> Tensor:
    dtype, start, size, place = array.part
    shape = array.shape[::-1] if array.fortran else array.shape
    if not size:
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
    elif place == _MAPPED and mapping is not None:
        part = mapping[start : start + size]
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(part, 0, shape)  # type: ignore[call-overload]
    else:
        count = size // dtype.itemsize
        tensor = torch.frombuffer(buffer, dtype=dtype, count=count, offset=place).reshape(shape)
    if array.fortran:
        tensor = tensor.permute(*range(tensor.ndim - 1, -1, -1)).contiguous()
    return tensor
