"""`vitlib serve` beside its Predictor, beside itself without batches, and beside a plain server.

    python benchmarks/serving.py [--models deit-tiny B/16] [--rounds 7] [--seconds 6]
        [--parts throughput poisson lone overload] [--python PEER] [--out FILE]

One machine, 2 threads for each model, clients beside the servers. Bodies are the model card's, a
photo in base64 each (134 photos of fridge_multiclass, or noise where they are not there).

throughput: 16 clients that ask again as soon as they are answered; servers and Predictor (which
classifies the same bytes, 16 at a time) take turns of --seconds; medians over the rounds.
poisson: requests come at half the rate that was measured, each when it is due; the 99th percentile
beside that of an ideal queue with the same arrivals and the service times of Predictor, measured
for every batch size before and after. In --rounds parts, of which the median is told: a neighbour
that takes the processor for a second is in the slowest hundredth of one part, not of all.
lone: one client; the median beside Predictor's for one photo, in turns.
overload: twice the rate for --minutes; every answer counted, memory by the minute, then SIGTERM.

The plain server is serving_peer.py, in float32 as vitlib is: 1 worker and 2, each with 2 threads;
and, what few would write at first, 2 workers with 1 thread each. `--python` names an interpreter
with fastapi, uvicorn, transformers and torch.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clients import Connection, Crowd, Told, ideal_queue, poisson, request_of
from setting import SHARED, heading, photos_of, table, write_whole
from turns import Worker, in_turns
from turns import serve as answer_turns

HERE = Path(__file__).resolve()
CLIENTS, MAX_BATCH, SEED = 16, 16, 7
PARTS = ("throughput", "poisson", "lone", "overload")


# --- Predictor, in a process of its own -----------------------------------------------------------


class Alone:
    """Predictor over the same bytes."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        import vitlib

        torch.set_num_threads(task["threads"])
        self.vit = vitlib.Predictor.load(task["folder"], precision="fp32")
        self.photos = [Path(name).read_bytes() for name in task["photos"]]
        self.vit.probabilities(self.photos[:MAX_BATCH])
        self.at = 0

    def _next(self, count: int) -> list[bytes]:
        self.at += count
        return [self.photos[(self.at + i) % len(self.photos)] for i in range(count)]

    def rate(self, seconds: float) -> float:
        """Photos a second."""
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            self.vit.probabilities(self._next(4 * MAX_BATCH), batch_size=MAX_BATCH)
            done += 4 * MAX_BATCH
        return done / (time.perf_counter() - start)

    def service(self, size: int, count: int) -> float:
        """Seconds that a batch of so many takes, from bytes on; a median."""
        times = []
        for _ in range(count):
            batch = self._next(size)
            start = time.perf_counter()
            self.vit.probabilities(batch, batch_size=size)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


# --- servers --------------------------------------------------------------------------------------


class Server:
    """A server's process."""

    def __init__(self, command: list[str], port: int, threads: int) -> None:
        self.port = port
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, env=environment)
        until = time.monotonic() + 120
        while True:
            try:
                if self._ready():
                    return
            except OSError:
                pass
            if time.monotonic() > until or self.process.poll() is not None:
                raise RuntimeError(f"no server: {command}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
            sock.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b" 200 " in sock.recv(100)

    def resident(self) -> float:
        """MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    def end(self) -> float:
        """SIGTERM -> seconds until it is gone."""
        start = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return time.monotonic() - start


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def ours(folder: Path, options: argparse.Namespace, *more: str) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "vitlib", "serve", "--model", str(folder), "--port", str(port)]
    command += ["--precision", "fp32", "--max-batch", str(MAX_BATCH), *more]
    return Server(command, port, options.threads)


def theirs(folder: Path, options: argparse.Namespace, workers: int, threads: int) -> Server:
    port = free_port()
    command = [options.python, str(HERE.with_name("serving_peer.py")), str(folder), str(port)]
    return Server([*command, str(workers), str(threads)], port, threads)


# --- parts ----------------------------------------------------------------------------------------


def throughput(
    folder: Path, alone: Worker, requests: list[bytes], options: argparse.Namespace
) -> dict[str, float]:
    """Photos a second, by side."""
    servers = {
        "serve": ours(folder, options),
        "serve, batches of 1": ours(folder, options, "--max-batch", "1"),
    }
    if options.python:
        for workers, threads in ((1, options.threads), (2, options.threads), (2, 1)):
            name = f"plain, {workers} x {threads} threads"
            servers[name] = theirs(folder, options, workers, threads)
    crowds = {name: Crowd(server.port, requests, CLIENTS) for name, server in servers.items()}
    sides: dict[str, Callable[[], Any]] = {
        name: lambda crowd=crowd: crowd.turn(options.seconds)  # type: ignore[misc]
        for name, crowd in crowds.items()
    }
    sides["Predictor"] = lambda: alone.ask("rate", seconds=options.seconds)
    try:
        found = in_turns(sides, options.rounds, 1, {})
    finally:
        for server in servers.values():
            server.end()
    return {name: statistics.median(rates) for name, rates in found.items()}


def at_half_load(
    folder: Path, alone: Worker, requests: list[bytes], options: argparse.Namespace
) -> list[str]:
    """p50 and p99 of the server, and p99 of the ideal queue; the capacity is measured here."""
    server = ours(folder, options)
    try:
        crowd = Crowd(server.port, requests, CLIENTS)
        crowd.turn(2)
        capacity = statistics.median(crowd.turn(options.seconds) for _ in range(3))
        rate = capacity / 2
        seconds = max(options.poisson_seconds, 100 / rate)
        parts, wrong, count = [], 0, 0
        before = _services(alone)
        for number in range(options.rounds):
            told = poisson(server.port, requests, rate, seconds, SEED + number)
            after = _services(alone)
            mean = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
            parts.append(_beside_ideal(told, mean))
            before = after
            wrong += sum(one.status != 200 for one in told)
            count += len(told)
    finally:
        server.end()
    medians = [statistics.median(values) for values in zip(*parts, strict=True)]
    ratios = sorted(part[-1] for part in parts)
    return [
        f"{capacity:.1f}", f"{rate:.1f}", str(count), str(wrong),
        *(f"{1e3 * value:.0f}" for value in medians[:4]),
        f"{medians[4]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
    ]  # fmt: skip


def _services(alone: Worker) -> list[float]:
    """Seconds of a batch of each size."""
    return [alone.ask("service", size=n, count=2) for n in range(1, MAX_BATCH + 1)]


def _beside_ideal(told: list[Told], services: list[float]) -> tuple[float, ...]:
    """p50 and ideal p50, p99 and ideal p99, seconds; ratio of the p99."""
    took = sorted(one.answered - one.due for one in told)
    ideal = sorted(ideal_queue([one.due for one in told], services, MAX_BATCH))
    ours_99, ideal_99 = (x[int(0.99 * len(x))] for x in (took, ideal))
    return statistics.median(took), statistics.median(ideal), ours_99, ideal_99, ours_99 / ideal_99


def lone(
    folder: Path, alone: Worker, requests: list[bytes], options: argparse.Namespace
) -> list[str]:
    """Medians of one photo's time, server and Predictor, ms."""
    server = ours(folder, options)
    connection = Connection(server.port)
    number = 0

    def one() -> float:
        nonlocal number
        number += 1
        start = time.perf_counter()
        status, _ = connection.ask(requests[number % len(requests)])
        assert status == 200
        return time.perf_counter() - start

    sides: dict[str, Callable[[], Any]] = {
        "serve": one,
        "Predictor": lambda: alone.ask("service", size=1, count=1),
    }
    try:
        found = in_turns(sides, options.lone_rounds, 5, {})
    finally:
        server.end()
    apart = [a - b for a, b in zip(found["serve"], found["Predictor"], strict=True)]
    medians = [statistics.median(found[name]) for name in ("serve", "Predictor")]
    return [f"{1e3 * x:.1f}" for x in (*medians, statistics.median(apart))]


def overload(folder: Path, requests: list[bytes], options: argparse.Namespace) -> list[str]:
    """Answers by status, memory by the minute, seconds that SIGTERM took."""
    server = ours(folder, options)
    try:
        crowd = Crowd(server.port, requests, CLIENTS)
        crowd.turn(3)
        rate = 2 * statistics.median(crowd.turn(3) for _ in range(3))
        statuses: dict[int, int] = {}
        memory = []
        for minute in range(options.minutes):
            for one in poisson(server.port, requests, rate, 60, SEED + minute):
                statuses[one.status] = statuses.get(one.status, 0) + 1
            memory.append(server.resident())
    finally:
        took = server.end()
    said = ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))
    second, last = memory[min(1, len(memory) - 1)], memory[-1]
    return [
        f"{rate:.0f}",
        said,
        f"{second:.0f}",
        f"{last:.0f}",
        f"{last / second - 1:+.1%}",
        f"{took:.1f}",
    ]


# --- the whole ------------------------------------------------------------------------------------


def folder_of(name: str, scratch: Path) -> Path:
    """A checkpoint: DeiT-tiny's own, or ViT-B/16 with random weights and 1,000 classes."""
    if name == "deit-tiny":
        return SHARED / "models" / "deit-tiny-patch16-224"
    folder = scratch / "b16"
    if not folder.exists():
        import torch

        import vitlib

        torch.manual_seed(SEED)
        model = vitlib.ViT(vitlib.ViTConfig.named("B/16", num_classes=1000))
        rule = vitlib.ImageProcessor.from_profile("hf", "vit", (224, 224))
        vitlib.save(model, folder, image_processor=rule)
    return folder


def photos(scratch: Path) -> list[Path]:
    """Real ones, or noise."""
    found = photos_of("fridge_multiclass")
    if found:
        return found
    from PIL import Image

    made = [scratch / f"{i}.jpg" for i in range(50)]
    for path in made:
        Image.effect_noise((500, 375), 60).convert("RGB").save(path)
    return made


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=["deit-tiny", "B/16"], default=["deit-tiny", "B/16"])
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS[:3]))
    add("--rounds", type=int, default=7)
    add("--seconds", type=float, default=6)
    add("--lone-rounds", type=int, default=60)
    add("--poisson-seconds", type=float, default=30)
    add("--minutes", type=int, default=10)
    add("--threads", type=int, default=2)
    add("--python", default=sys.executable, help="of the plain server; '' leaves it out")
    add("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """All that is asked for, as tables."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        answer_turns(Alone)
        return
    options = parsed()
    rates: list[list[str]] = []
    parts: dict[str, list[list[str]]] = {part: [] for part in PARTS[1:]}
    with tempfile.TemporaryDirectory() as scratch:
        names = photos(Path(scratch))
        texts = [base64.b64encode(path.read_bytes()).decode() for path in names]
        requests = [
            request_of(json.dumps({"input_data": {"columns": ["image"], "data": [text]}}).encode())
            for text in texts
        ]
        for name in options.models:
            folder = folder_of(name, Path(scratch))
            task = {
                "folder": str(folder),
                "photos": [str(p) for p in names],
                "threads": options.threads,
            }
            alone = Worker(sys.executable, HERE, task, options.threads)
            for part in options.parts:
                if part == "throughput":
                    found = throughput(folder, alone, requests, options)
                    whole = found["Predictor"]
                    rates += [
                        [
                            name,
                            side,
                            f"{rate:.2f}",
                            f"{rate / whole:.1%}",
                            f"{found['serve'] / rate:.2f}",
                        ]
                        for side, rate in found.items()
                    ]
                elif part == "poisson":
                    parts[part].append([name, *at_half_load(folder, alone, requests, options)])
                elif part == "lone":
                    parts[part].append([name, *lone(folder, alone, requests, options)])
                else:
                    parts[part].append([name, *overload(folder, requests, options)])
                print(
                    name, part, rates[-5:] if part == "throughput" else parts[part][-1], flush=True
                )
            alone.end()
    heads = {
        "poisson": ["model", "capacity, img/s", "rate", "requests", "not 200", "p50, ms",
                    "ideal p50", "p99, ms", "ideal p99", "ratio of p99"],
        "lone": ["model", "serve, ms", "Predictor, ms", "difference, ms"],
        "overload": ["model", "requests a second", "answers", "MiB, minute 2", "MiB, last minute",
                     "growth", "SIGTERM, s"],
    }  # fmt: skip
    said = {name: version(name) for name in ("torch", "fastapi", "uvicorn", "transformers")}
    pages = [heading(said)]
    if rates:
        head = ["model", "side", "img/s", "of Predictor", "serve is x times"]
        pages.append(table(head, rates, words=2))
    pages += [table(heads[part], rows) for part, rows in parts.items() if rows]
    text = "\n\n".join(pages) + "\n"
    print(text)
    if options.out:
        write_whole(options.out, text)


if __name__ == "__main__":
    main()
