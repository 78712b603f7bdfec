"""Choice of the reader of a weights file by its first bytes, and errors for other files."""

from __future__ import annotations

import zipfile
from pathlib import Path

from vitlib.errors import CheckpointError, SourceError
from vitlib.source.readers.contents import Contents
from vitlib.source.readers.pickles import read_pickle
from vitlib.source.readers.safetensors import read_safetensors
from vitlib.source.readers.zips import read_members

READABLE = ".safetensors, .npz and PyTorch's .pth, .pt and .bin"
LORA_ERROR = (
    "is a LoRA adapter alone: merge it into its base model first (peft: merge_and_unload()), and "
    "save that"
)
_START_BYTES = 512
_MAGIC = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x93NUMPY", "a single NumPy array"),
    (0, b"<!DOCTYPE", "a web page, not the weights"),
    (0, b"<html", "a web page, not the weights"),
    (0, b"\x1f\x8b", "compressed by gzip"),
    (0, b"\xfd7zXZ", "compressed by xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (4, b"TFL3", "a TensorFlow Lite file"),
    (257, b"ustar", "a tar archive"),
)
_PHOTOS = (
    (0, b"\xff\xd8\xff", "a JPEG photo"),
    (0, b"\x89PNG\r\n", "a PNG picture"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftyphei", "a HEIC photo"),
)
_SUFFIX = {
    ".onnx": "an ONNX graph",
    ".h5": "a Keras file",
    ".keras": "a Keras file",
    ".msgpack": "a Flax msgpack file",
    ".tflite": "a TensorFlow Lite file",
    ".pb": "a TensorFlow graph",
    ".index": "the index of a TensorFlow checkpoint",
    ".meta": "the graph of a TensorFlow checkpoint",
    ".json": "a JSON file",
}


def read_tensor_file(path: Path, prefix: str | None = None) -> Contents:
    """Read the tensors of one .safetensors, .npz or PyTorch file, mapped where its format allows.

    Args:
        path: The file; its suffix matters only for the error of an unknown format.
        prefix: Prefix of the network to read from a PyTorch file that holds several.

    Returns:
        At least one tensor.

    Raises:
        SourceError: The file cannot be read.
        CheckpointError: It is damaged, of another kind, or a LoRA adapter.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
    # A safetensors file begins with the length of its header, any 8 bytes. So its brace is tested
    # before the signatures of other formats.
    if start[5:9] == b"\0\0\0{":
        contents = read_safetensors(path)
    elif start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        contents = _read_zip(path, start, prefix)
    elif start.startswith(b"\x80\x02"):  # the pickle protocol of torch.save
        contents = read_pickle(path, None, prefix)
    else:
        _refuse_others(path, start)
        contents = read_safetensors(path)  # raises the error
    if not contents.tensors:
        raise CheckpointError(f"{path} holds no tensors: expected those of a network")
    adapter = sum(".lora_" in name or name.startswith("lora_") for name in contents.tensors)
    if adapter and 2 * adapter >= len(contents.tensors):
        raise CheckpointError(f"{path} {LORA_ERROR}")
    return contents


def _read_zip(path: Path, start: bytes, prefix: str | None) -> Contents:
    first = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    npz = path.suffix.lower() == ".npz" or first.endswith(b".npy")
    kind = "an .npz file" if npz else "a PyTorch file"
    try:
        members = read_members(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not {kind} ({error}): download it again"
        ) from error
    names = [member.name for member in members]
    if any(name.endswith("constants.pkl") for name in names) and any("code/" in n for n in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, a program with its weights (as OpenAI's CLIP): save "
            "torch.jit.load(path).state_dict() as safetensors where you trust it, and load that"
        )
    if any(name.lower().endswith("data.pkl") for name in names):
        return read_pickle(path, members, prefix)
    if npz or all(name.endswith(".npy") for name in names):
        from vitlib.source.readers.npz import read_npz  # few checkpoints are of JAX

        return read_npz(path, members)
    kind = "a Keras file" if any(name.endswith(".h5") for name in names) else "a zip archive"
    raise CheckpointError(_describe_unreadable(path, kind))


def _refuse_others(path: Path, start: bytes) -> None:
    """Raise CheckpointError for a format that is recognised and not read."""
    photos = [kind for at, magic, kind in _PHOTOS if start[at : at + len(magic)] == magic]
    if photos:
        raise CheckpointError(f"{path} is {photos[0]}, not a model: expected {READABLE}")
    kinds = [kind for at, magic, kind in _MAGIC if start[at : at + len(magic)] == magic]
    if path.suffix.lower() in _SUFFIX:
        kinds.append(_SUFFIX[path.suffix.lower()])
    if ".ckpt." in path.name or ".data-0" in path.name:
        kinds.append("part of a TensorFlow checkpoint")
    if kinds:
        raise CheckpointError(_describe_unreadable(path, kinds[0]))
    if start.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is a pickle that torch.save did not write, which could run code: save the "
            "tensors as safetensors"
        )


def _describe_unreadable(path: Path, kind: str) -> str:
    return f"{path} is {kind}: expected {READABLE}; convert or unpack it first"
