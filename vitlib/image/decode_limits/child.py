"""Decodes in processes that can be ended: what a decoder does in one call cannot be interrupted.

How data flows: decode() takes a process that waits, or starts one, writes it a file, and reads a
line of JSON and the pixels. The process gives itself an end: SIGPROF comes when it has used the
processor for so many seconds. A process serves any number of decodes; one at a time.

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

MAX_IDLE = 8  # processes that are kept for later; more are ended after their decode
_HEAD = struct.Struct("<IQ")  # lengths of the JSON and of the bytes after it
WALL_FACTOR = 10  # times the seconds of processor time, after which a process is ended in any case


class _Process:
    """A process that decodes."""

    def __init__(self) -> None:
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
            raise OSError("the process that decodes did not start")

    def ask(self, about: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes] | None:
        """What it answers; None: it was ended."""
        timer = threading.Timer(about["seconds"] * WALL_FACTOR, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            _write(self.stdin, about, data)
            return _read(self.stdout)
        except OSError:
            return None
        finally:
            timer.cancel()

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


_waiting: list[_Process] = []
_of_parent: list[_Process] = []  # of the process that this one was forked from
_lock = threading.Lock()


def _forget() -> None:
    """After a fork: two processes must not write into one pipe."""
    global _lock
    _lock = threading.Lock()
    _of_parent.extend(_waiting)
    _waiting.clear()


def _end_all() -> None:
    while _waiting:
        _waiting.pop().end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_end_all)


def set_raw_mode(image: Any, raw_mode: str) -> None:
    """Have an opened image's samples unpacked by another raw mode of Pillow."""
    image.tile = [
        tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
        for tile in image.tile
    ]


def decode(
    data: bytes, form: str, seconds: float, raw_mode: str | None = None
) -> tuple[dict[str, Any], bytes] | None:
    """A file of Pillow's format `form` -> what is known of its image, and its pixels.

    raw_mode: as load_pixels has it.

    None where this program cannot start a process. Raises vitlib's ImageError where the decode
    takes more than so many seconds of processor time, or the process dies of the file; OSError for
    what Pillow cannot decode.
    """
    from vitlib.errors import ImageError
    from vitlib.image.decode_limits.file import TOO_LONG

    with _lock:
        process = _waiting.pop() if _waiting else None
    if process is None:
        if getattr(sys, "frozen", False) or not sys.executable:
            return None
        try:
            process = _Process()
        except OSError:
            return None
    try:
        answer = process.ask({"format": form, "seconds": seconds, "raw_mode": raw_mode}, data)
    except BaseException:
        process.end()
        raise
    if answer is None:
        process.end()
        raise ImageError(TOO_LONG)
    with _lock:
        keep = len(_waiting) < MAX_IDLE
        if keep:
            _waiting.append(process)
    if not keep:
        process.end()
    if "error" in answer[0]:
        raise OSError(answer[0]["error"])
    return answer


def _write(file: IO[bytes], about: dict[str, Any], data: bytes) -> None:
    text = json.dumps(about).encode()
    file.write(_HEAD.pack(len(text), len(data)) + text)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    file.flush()


def _read(file: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """What _write wrote; None where the other side ended before."""
    head = _exactly(file, _HEAD.size)
    if head is None:
        return None
    text, data = (_exactly(file, length) for length in _HEAD.unpack(head))
    return None if text is None or data is None else (json.loads(text), bytes(data))


def _exactly(file: IO[bytes], size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            return None
        view = view[count:]
    return data


def _serve() -> None:
    """Decode what comes, until nothing more can come."""
    import signal

    source, target = io.FileIO(0), io.FileIO(1, "wb")
    _write(target, {}, b"")
    while (request := _read(source)) is not None:
        about, data = request
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, about["seconds"])
        try:
            answer, pixels = _decoded(data, about["format"], about["raw_mode"])
        except Exception as error:
            answer, pixels = {"error": f"{error}" or type(error).__name__}, b""
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        _write(target, answer, pixels)


def _decoded(data: bytes, form: str, raw_mode: str | None) -> tuple[dict[str, Any], bytes]:
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # the caller has counted them
    with Image.open(io.BytesIO(data), formats=[form]) as image:
        if raw_mode is not None:
            set_raw_mode(image, raw_mode)
        image.load()
        palette = None
        if image.palette is not None:
            mode = image.palette.mode
            palette = (mode, image.im.getpalette(mode, mode).hex())
        about = {
            "mode": image.mode, "size": image.size, "palette": palette,
            "orientation": image.getexif().get(0x0112, 1),
        }  # fmt: skip
        return about, image.tobytes()


if __name__ == "__main__":
    _serve()
