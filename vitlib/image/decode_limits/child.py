"""Decoding in child processes that can be killed: one call of a decoder cannot be interrupted.

How data flows: decode() takes an idle process or starts one, writes a file to it, and reads a line
of JSON and the pixels. The process bounds its own time: SIGPROF kills it when it has used the
processor for the given seconds. It serves any number of decodes, one at a time.

This file is also the program of that process, which needs Pillow alone.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import struct
import subprocess
import sys
import threading
from typing import IO, Any

MAX_IDLE = 8  # processes that stay for later decodes; others are killed after theirs
_HEAD = struct.Struct("<IQ")  # lengths of the JSON and of the bytes after it
WALL_FACTOR = 10  # times the processor seconds: wall-clock time after which a process is killed


class _Process:
    """A child process that decodes."""

    def __init__(self) -> None:
        # The child imports the same Pillow, by the import paths of this process.
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths}, bufsize=0,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin: IO[bytes] = self.process.stdin
        self.stdout: IO[bytes] = self.process.stdout
        if _read(self.stdout) is None:
            self.end()
            raise OSError("the decoding process did not start")

    def request(self, header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes] | None:
        """Send a file and return the response; None if the process was killed."""
        # SIGPROF counts processor time alone: a timer also ends a process that waits for ever.
        timer = threading.Timer(header["seconds"] * WALL_FACTOR, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            _write(self.stdin, header, data)
            return _read(self.stdout)
        except OSError:
            return None
        finally:
            timer.cancel()

    def end(self) -> None:
        """Kill the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


_idle: list[_Process] = []
# Processes of the parent after a fork: kept here so that nothing closes their pipes or kills them.
_inherited: list[_Process] = []
_lock = threading.Lock()


def _forget() -> None:
    """Start without processes after a fork: parent and child must not write into one pipe."""
    global _lock
    _lock = threading.Lock()
    _inherited.extend(_idle)
    _idle.clear()


def _end_all() -> None:
    """Kill all idle processes when the interpreter exits."""
    while _idle:
        _idle.pop().end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_end_all)


def set_raw_mode(image: Any, raw_mode: str) -> None:
    """Let Pillow unpack the samples of an opened image by another raw mode.

    Args:
        image: Image of Pillow, not loaded; changed in place.
        raw_mode: Raw mode of Pillow's decoders.
    """
    image.tile = [
        tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
        for tile in image.tile
    ]


def decode(
    data: bytes, image_format: str, seconds: float, raw_mode: str | None = None
) -> tuple[dict[str, Any], bytes] | None:
    """Decode a file in a child process.

    Args:
        data: The file.
        image_format: Pillow's name of its format.
        seconds: Processor time that the decode may take.
        raw_mode: As in load_pixels().

    Returns:
        Mode, size, palette and orientation of the image, and its pixels; None where no process can
        be started.

    Raises:
        ImageError: The decode takes longer, or the process dies.
        OSError: Pillow cannot decode the file.
    """
    from vitlib.errors import ImageError
    from vitlib.image.decode_limits.file import TOO_LONG

    with _lock:
        process = _idle.pop() if _idle else None
    if process is None:
        if getattr(sys, "frozen", False) or not sys.executable:
            return None
        try:
            process = _Process()
        except OSError:
            return None
    try:
        response = process.request(
            {"format": image_format, "seconds": seconds, "raw_mode": raw_mode}, data
        )
    except BaseException:
        process.end()
        raise
    if response is None:
        process.end()
        raise ImageError(TOO_LONG)
    with _lock:
        is_idle = len(_idle) < MAX_IDLE
        if is_idle:
            _idle.append(process)
    if not is_idle:
        process.end()
    if "error" in response[0]:
        raise OSError(response[0]["error"])
    return response


def _write(file: IO[bytes], header: dict[str, Any], data: bytes) -> None:
    """Write lengths, a JSON header and bytes."""
    text = json.dumps(header).encode()
    file.write(_HEAD.pack(len(text), len(data)) + text)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    file.flush()


def _read(file: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Read what _write() writes; None if the other process has ended."""
    head = _read_exactly(file, _HEAD.size)
    if head is None:
        return None
    text, data = (_read_exactly(file, length) for length in _HEAD.unpack(head))
    return None if text is None or data is None else (json.loads(text), bytes(data))


def _read_exactly(file: IO[bytes], size: int) -> bytearray | None:
    """Read `size` bytes; None at an earlier end of the file. A pipe returns fewer at once."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            return None
        view = view[count:]
    return data


def _serve() -> None:
    """Decode files from stdin to stdout until stdin ends."""
    import signal

    source, target = io.FileIO(0), io.FileIO(1, "wb")
    _write(target, {}, b"")
    while (request := _read(source)) is not None:
        header, data = request
        # SIGPROF has no handler here: its default action ends the process, also within C code.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, header["seconds"])
        try:
            response, pixels = _decode_file(data, header["format"], header["raw_mode"])
        except Exception as error:
            response, pixels = {"error": f"{error}" or type(error).__name__}, b""
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        _write(target, response, pixels)


def _decode_file(
    data: bytes, image_format: str, raw_mode: str | None
) -> tuple[dict[str, Any], bytes]:
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore")
    # The parent process has checked their number.
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(io.BytesIO(data), formats=[image_format]) as image:
        if raw_mode is not None:
            set_raw_mode(image, raw_mode)
        image.load()
        palette = None
        if image.palette is not None:
            mode = image.palette.mode
            palette = (mode, image.im.getpalette(mode, mode).hex())
        header = {
            "mode": image.mode, "size": image.size, "palette": palette,
            "orientation": image.getexif().get(0x0112, 1),
        }  # fmt: skip
        return header, image.tobytes()


if __name__ == "__main__":
    _serve()
