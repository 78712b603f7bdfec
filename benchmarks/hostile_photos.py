"""Cost of hostile image files for the decoder and for the clients of a server.

    python benchmarks/hostile_photos.py [--mib 24] [--model demo] [--rounds 3] [--at-once 50]
        [--parts decode serve] [--kinds WORD ...] [--out FILE]

A hostile file is small for the processor time that it takes.

decode: the processor seconds until vitlib decodes or rejects a file, as the median of --rounds. The
files are those of tests/fixtures/hostile_files.py, with --mib MiB if the cost grows with the bytes,
and regular photos of 50 million pixels.
serve: the latency of one client of `vitlib serve`, alone and during --at-once simultaneous hostile
requests of one kind. A measurement lasts until the last of them is answered, at least 5 seconds.
The table has medians and 95th percentiles, and the median ratio of interleaved rounds.
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

from clients import Connection, post_request
from PIL import Image
from setting import ROOT, describe_run, list_photos, markdown_table, write_atomically

sys.path.insert(0, str(ROOT / "tests"))

from fixtures.hostile_files import make_hostile_files

MIN_SECONDS = 5.0  # shortest measurement of latencies
SMALL_MIB = 4  # size of a hostile request: a server accepts 256 MiB of bodies
REGULAR_FORMATS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 90}, "JPEG, progressive": {"quality": 90, "progressive": True},
    "PNG": {"compress_level": 1}, "WEBP": {"quality": 80, "method": 0},
    "TIFF": {"compression": "tiff_lzw"}, "AVIF": {"speed": 10},
    "JPEG2000": {"irreversible": True, "quality_layers": [15]},
}  # fmt: skip
SERVED_KINDS = (
    "JPEG, 3,000 scans", "JPEG, as many scans as pass", "JPEG, a million empty segments",
    "JPEG, Photoshop records", "PNG, texts after", "GIF, comments", "BMP, deltas", "PPM, comments",
    "PPM, rescaled", "TIFF, fractions", "TIFF, directories", "JPEG 2000, tiles of 16",
)  # fmt: skip


def decode_file(data: bytes) -> str:
    """Decode a file; return its size, as in "640x480", or the reason of its rejection."""
    from vitlib.errors import ImageError
    from vitlib.image.decode import decode

    try:
        (plane,) = decode(data, 3)
    except ImageError as error:
        return str(error).partition(": ")[2][:70] or str(error)[:70]
    return f"{plane.width}x{plane.height}"


def cpu_seconds() -> float:
    """Return the processor seconds of this process and of its decoder processes."""
    from vitlib.image.decode_limits import child

    ticks = 0
    for decoder in child._idle:
        fields = Path(f"/proc/{decoder.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure_decode(data: bytes, rounds: int) -> tuple[float, str]:
    """Return the median processor seconds of decoding a file, and the outcome."""
    seconds, outcome = [], ""
    for _ in range(rounds):
        start = cpu_seconds()
        outcome = decode_file(data)
        seconds.append(cpu_seconds() - start)
    return statistics.median(seconds), outcome


def decode_table(options: argparse.Namespace) -> str:
    """Build the table of decoding times."""
    # Start a decoder process before the timing.
    measure_decode(encode(Image.new("RGB", (64, 64)), "TIFF"), 1)
    rows = []
    for name, make_file in select_kinds(make_hostile_files(options.mib), options.kinds).items():
        data = make_file()
        seconds, outcome = measure_decode(data, options.rounds)
        rows.append((name, f"{len(data) / 2**20:.2f}", f"{seconds:.2f}", outcome))
        print(*rows[-1], file=sys.stderr)
    photos = list_photos("fridge_multiclass")
    image = Image.open(photos[0]).convert("RGB") if photos else Image.effect_noise((640, 480), 60)
    large = image.convert("RGB").resize((8660, 5773))
    for name, encoder_options in REGULAR_FORMATS.items():
        data = encode(large, name.partition(",")[0], **encoder_options)
        seconds, outcome = measure_decode(data, options.rounds)
        rows.append((f"a photo, {name}", f"{len(data) / 2**20:.2f}", f"{seconds:.2f}", outcome))
        print(*rows[-1], file=sys.stderr)
    return markdown_table(("file", "MiB", "CPU s", "outcome"), rows)


def encode(image: Image.Image, format_name: str, **options: object) -> bytes:
    """Encode an image; return the file's bytes."""
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def select_kinds(
    kinds: dict[str, Callable[[], bytes]], words: list[str]
) -> dict[str, Callable[[], bytes]]:
    """Select the kinds whose names contain one of the words; all without words."""
    return {
        name: make_file
        for name, make_file in kinds.items()
        if not words or any(word in name for word in words)
    }


class Server:
    """A `vitlib serve` process that is ready for requests."""

    def __init__(self, model: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        command = [sys.executable, "-m", "vitlib", "serve", "--model", model, "--port"]
        self.process = subprocess.Popen([*command, str(self.port)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        request = b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n"
        while time.monotonic() < deadline:
            try:
                if Connection(self.port).send(request)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise SystemExit("vitlib serve did not become ready")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def measure_latencies(port: int, request: bytes, done: threading.Event) -> list[float]:
    """Send a request repeatedly; return the latencies in seconds.

    Args:
        port: Port of the server.
        request: The request.
        done: Event that ends the measurement, after at least MIN_SECONDS.
    """
    connection, latencies = Connection(port), []
    start = time.perf_counter()
    while time.perf_counter() - start < MIN_SECONDS or not done.is_set():
        request_start = time.perf_counter()
        status, _ = connection.send(request)
        if status != 200:
            raise SystemExit(f"expected status 200 for a regular request, got {status}")
        latencies.append(time.perf_counter() - request_start)
    connection.close()
    return latencies


def measure_under_load(
    port: int, request: bytes, hostile_request: bytes, count: int
) -> tuple[list[float], float, str]:
    """Measure a client's latencies during simultaneous hostile requests.

    Args:
        port: Port of the server.
        request: Request of the measured client.
        hostile_request: Request of the other clients.
        count: Number of hostile requests.

    Returns:
        Latencies in seconds, seconds until all hostile requests are answered, and their statuses.
    """
    statuses: Counter[int] = Counter()
    done = threading.Event()
    burst_seconds = [0.0]

    def send_hostile() -> None:
        connection = Connection(port)
        statuses[connection.send(hostile_request)[0]] += 1
        connection.close()

    def send_all() -> None:
        time.sleep(0.5)
        start = time.perf_counter()
        threads = [threading.Thread(target=send_hostile) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        burst_seconds[0] = time.perf_counter() - start
        done.set()

    threading.Thread(target=send_all).start()
    latencies = measure_latencies(port, request, done)
    return (
        latencies,
        burst_seconds[0],
        ", ".join(f"{n} of {status}" for status, n in sorted(statuses.items())),
    )


def serve_table(options: argparse.Namespace) -> str:
    """Build the table of latencies with and without hostile requests."""
    photos = list_photos("fridge_multiclass")
    data = photos[0].read_bytes() if photos else encode(Image.effect_noise((640, 480), 60), "JPEG")
    request = post_request(data, "/classify", "image/jpeg")
    kinds = select_kinds({k: make_hostile_files(SMALL_MIB)[k] for k in SERVED_KINDS}, options.kinds)
    server = Server(options.model)
    rows = []
    is_done = threading.Event()
    is_done.set()
    try:
        measure_latencies(server.port, request, is_done)
        for name, make_file in kinds.items():
            hostile_request = post_request(make_file(), "/classify", "application/octet-stream")
            alone_latencies: list[float] = []
            load_latencies: list[float] = []
            ratios, longest, statuses = [], 0.0, ""
            for _ in range(options.rounds):
                alone = measure_latencies(server.port, request, is_done)
                under_load, seconds, statuses = measure_under_load(
                    server.port, request, hostile_request, options.at_once
                )
                ratios.append(statistics.median(under_load) / statistics.median(alone))
                alone_latencies, load_latencies, longest = (
                    alone_latencies + alone,
                    load_latencies + under_load,
                    max(longest, seconds),
                )
            rows.append((
                name, statuses, f"{longest:.2f}",
                *(f"{1000 * x:.1f}" for x in (*percentiles(alone_latencies),)),
                *(f"{1000 * x:.1f}" for x in percentiles(load_latencies)),
                f"{statistics.median(ratios):.2f}",
            ))  # fmt: skip
            print(*rows[-1], file=sys.stderr)
    finally:
        server.close()
    header = ("hostile requests", "statuses", "time to answer all, s", "p50 alone, ms", "p95",
            "p50 under load, ms", "p95", "ratio of p50")  # fmt: skip
    return markdown_table(header, rows, num_text_columns=2)


def percentiles(values: list[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile."""
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
    options = parser.parse_args()
    parts = [describe_run({name: version(name) for name in ("torch", "pillow")})]
    if "decode" in options.parts:
        parts.append(decode_table(options))
    if "serve" in options.parts:
        parts.append(
            f"Model {Path(options.model).name}, {options.at_once} hostile requests at once."
        )
        parts.append(serve_table(options))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.out is not None:
        write_atomically(options.out, text)


if __name__ == "__main__":
    main()
