"""Files that cost much more time than bytes: how long each holds a decoder, and a server's clients.

    python benchmarks/hostile_photos.py [--mib 24] [--model demo] [--rounds 3] [--at-once 50]
        [--parts decode serve] [--kinds WORD ...] [--out FILE]

decode: each kind of tests/hostile_photos.py, of --mib MiB where bytes cost time: the seconds of
processor time until vitlib has its pixels or says no, the median of --rounds; and photos of 50
million pixels.
serve: one client asks `vitlib serve` for a photo again and again, alone and while --at-once hostile
requests of a kind come at the same moment, until the last of them is answered (at least 5 seconds):
the medians and 95th percentiles of its latency, and the ratio of the medians, in turns.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from clients import Connection, request_of
from PIL import Image
from setting import ROOT, heading, photos_of, table, write_whole

sys.path.insert(0, str(ROOT / "tests"))

from fixtures.hostile_files import of_mib

LEAST = 5.0  # seconds of a turn beside hostile requests
SMALL_MIB = 4  # of a request of the serving part: a server holds 256 MiB of bodies
HONEST: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 90}, "JPEG, progressive": {"quality": 90, "progressive": True},
    "PNG": {"compress_level": 1}, "WEBP": {"quality": 80, "method": 0},
    "TIFF": {"compression": "tiff_lzw"}, "AVIF": {"speed": 10},
    "JPEG2000": {"irreversible": True, "quality_layers": [15]},
}  # fmt: skip
SERVED = (
    "JPEG, 3,000 scans", "JPEG, as many scans as pass", "JPEG, a million empty segments",
    "JPEG, Photoshop records", "PNG, texts after", "GIF, comments", "BMP, deltas", "PPM, comments",
    "PPM, rescaled", "TIFF, fractions", "TIFF, directories", "JPEG 2000, tiles of 16",
)  # fmt: skip


def decoded(data: bytes) -> str:
    """What comes of a file: its sides, or why not."""
    from vitlib.errors import ImageError
    from vitlib.image.decode import decode

    try:
        (plane,) = decode(data, 3)
    except ImageError as error:
        return str(error).partition(": ")[2][:70] or str(error)[:70]
    return f"{plane.width}x{plane.height}"


def used() -> float:
    """Seconds of processor time of this process and of those that decode for it."""
    from vitlib.image.decode_limits import child

    ticks = 0
    for one in child._waiting:
        fields = Path(f"/proc/{one.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def seconds_of(data: bytes, rounds: int) -> tuple[float, str]:
    """The processor time of a decode, the median of several, and what came of it."""
    found, outcome = [], ""
    for _ in range(rounds):
        start = used()
        outcome = decoded(data)
        found.append(used() - start)
    return statistics.median(found), outcome


def decode_part(args: argparse.Namespace) -> str:
    seconds_of(saved(Image.new("RGB", (64, 64)), "TIFF"), 1)  # a process is there
    rows = []
    for name, make in chosen(of_mib(args.mib), args.kinds).items():
        data = make()
        seconds, outcome = seconds_of(data, args.rounds)
        rows.append((name, f"{len(data) / 2**20:.2f}", f"{seconds:.2f}", outcome))
        print(*rows[-1], file=sys.stderr)
    photos = photos_of("fridge_multiclass")
    image = Image.open(photos[0]).convert("RGB") if photos else Image.effect_noise((640, 480), 60)
    large = image.convert("RGB").resize((8660, 5773))
    for form, options in HONEST.items():
        data = saved(large, form.partition(",")[0], **options)
        seconds, outcome = seconds_of(data, args.rounds)
        rows.append((f"a photo, {form}", f"{len(data) / 2**20:.2f}", f"{seconds:.2f}", outcome))
        print(*rows[-1], file=sys.stderr)
    return table(("file", "MiB", "CPU s", "outcome"), rows)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chosen(
    kinds: dict[str, Callable[[], bytes]], words: list[str]
) -> dict[str, Callable[[], bytes]]:
    return {k: v for k, v in kinds.items() if not words or any(word in k for word in words)}


class Server:
    """A `vitlib serve`, ready."""

    def __init__(self, model: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        command = [sys.executable, "-m", "vitlib", "serve", "--model", model, "--port"]
        self.process = subprocess.Popen([*command, str(self.port)], stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        ready = b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n"
        while time.monotonic() < until:
            try:
                if Connection(self.port).ask(ready)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise SystemExit("no server")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def latencies(port: int, request: bytes, done: threading.Event) -> list[float]:
    """One client's, in seconds, until LEAST seconds are over and `done` is set."""
    connection, found = Connection(port), []
    start = time.perf_counter()
    while time.perf_counter() - start < LEAST or not done.is_set():
        begin = time.perf_counter()
        status, _ = connection.ask(request)
        if status != 200:
            raise SystemExit(f"a good request got {status}")
        found.append(time.perf_counter() - begin)
    connection.close()
    return found


def beside(port: int, good: bytes, bad: bytes, count: int) -> tuple[list[float], float, str]:
    """The good client's latencies beside hostile requests; how long those took; their statuses."""
    statuses: Counter[int] = Counter()
    done = threading.Event()
    took = [0.0]

    def one() -> None:
        connection = Connection(port)
        statuses[connection.ask(bad)[0]] += 1
        connection.close()

    def burst() -> None:
        time.sleep(0.5)
        start = time.perf_counter()
        threads = [threading.Thread(target=one) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took[0] = time.perf_counter() - start
        done.set()

    threading.Thread(target=burst).start()
    found = latencies(port, good, done)
    return found, took[0], ", ".join(f"{n} of {status}" for status, n in sorted(statuses.items()))


def serve_part(args: argparse.Namespace) -> str:
    photos = photos_of("fridge_multiclass")
    data = photos[0].read_bytes() if photos else saved(Image.effect_noise((640, 480), 60), "JPEG")
    good = request_of(data, "/classify", "image/jpeg")
    kinds = chosen({k: of_mib(SMALL_MIB)[k] for k in SERVED}, args.kinds)
    server = Server(args.model)
    rows = []
    always = threading.Event()
    always.set()
    try:
        latencies(server.port, good, always)
        for name, make in kinds.items():
            bad = request_of(make(), "/classify", "application/octet-stream")
            alone: list[float] = []
            crowd: list[float] = []
            ratios, took, told = [], 0.0, ""
            for _ in range(args.rounds):
                now = latencies(server.port, good, always)
                then, seconds, told = beside(server.port, good, bad, args.at_once)
                ratios.append(statistics.median(then) / statistics.median(now))
                alone, crowd, took = alone + now, crowd + then, max(took, seconds)
            rows.append((
                name, told, f"{took:.2f}", *(f"{1000 * x:.1f}" for x in (*spread(alone),)),
                *(f"{1000 * x:.1f}" for x in spread(crowd)), f"{statistics.median(ratios):.2f}",
            ))  # fmt: skip
            print(*rows[-1], file=sys.stderr)
    finally:
        server.end()
    head = ("hostile requests", "answers", "all answered, s", "alone p50, ms", "p95",
            "beside p50, ms", "p95", "ratio of p50")  # fmt: skip
    return table(head, rows, words=2)


def spread(values: list[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    return statistics.median(values), statistics.quantiles(values, n=20)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=float, default=24)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--parts", nargs="+", default=["decode", "serve"])
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    parts = [heading({name: version(name) for name in ("torch", "pillow")})]
    if "decode" in args.parts:
        parts.append(decode_part(args))
    if "serve" in args.parts:
        parts.append(f"Model {Path(args.model).name}, {args.at_once} at once.")
        parts.append(serve_part(args))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.out is not None:
        write_whole(args.out, text)


if __name__ == "__main__":
    main()
