"""Throughput and latency of `vitlib serve`, relative to Predictor and to a simple server.

    python benchmarks/serving.py [--models deit-tiny B/16] [--rounds 7] [--seconds 6]
        [--parts throughput poisson lone overload] [--python PEER] [--out FILE]

Servers and clients share one machine, with 2 threads for each model. Each request body has the
format of the model card, with one photo in base64. The photos are the 134 of fridge_multiclass, or
noise if these are absent.

throughput: 16 clients send the next request as soon as the last one is answered. The servers and
Predictor are interleaved, --seconds each. Predictor classifies the same bytes in batches of 16.
Figures are medians over the rounds.
poisson: requests arrive at half the measured capacity. The 99th percentile is compared with that of
an ideal queue. The ideal queue has the same arrivals, and Predictor's service time for every batch
size, measured before and after. The ratio is the median of --rounds parts, so that a pause of the
machine affects one part only.
lone: one client. Its median latency is compared with Predictor's time for one photo, interleaved.
overload: requests arrive at twice the capacity for --minutes. The table has the number of each
status, the memory by the minute, and the seconds until the server exits after SIGTERM.

The simple server is serving_peer.py in float32. It has 1 or 2 workers with 2 threads each, or 2
workers with 1 thread each. `--python` names an interpreter with fastapi, uvicorn, transformers and
torch.
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

from clients import ClosedLoop, Connection, Response, ideal_queue, poisson_load, post_request
from setting import SHARED, describe_run, list_photos, markdown_table, write_atomically
from turns import Worker, interleave
from turns import serve as serve_worker

HERE = Path(__file__).resolve()
NUM_CLIENTS, MAX_BATCH, SEED = 16, 16, 7
PARTS = ("throughput", "poisson", "lone", "overload")


# --- Predictor, in a worker process ---------------------------------------------------------------


class PredictorWorker:
    """A Predictor that classifies the requests' photos."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        import vitlib

        torch.set_num_threads(task["threads"])
        self.predictor = vitlib.Predictor.load(task["folder"], precision="fp32")
        self.photos = [Path(name).read_bytes() for name in task["photos"]]
        self.predictor.probabilities(self.photos[:MAX_BATCH])
        self.position = 0

    def _next_photos(self, num_photos: int) -> list[bytes]:
        """Return the next photos, in turn."""
        self.position += num_photos
        return [self.photos[(self.position + i) % len(self.photos)] for i in range(num_photos)]

    def measure_rate(self, seconds: float) -> float:
        """Return the photos per second in batches of 16."""
        start, num_done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            self.predictor.probabilities(self._next_photos(4 * MAX_BATCH), batch_size=MAX_BATCH)
            num_done += 4 * MAX_BATCH
        return num_done / (time.perf_counter() - start)

    def measure_service(self, batch_size: int, repeats: int) -> float:
        """Return the median seconds to classify a batch, starting from bytes."""
        seconds = []
        for _ in range(repeats):
            batch = self._next_photos(batch_size)
            start = time.perf_counter()
            self.predictor.probabilities(batch, batch_size=batch_size)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


# --- servers --------------------------------------------------------------------------------------


class Server:
    """Server process that is ready for requests."""

    def __init__(self, command: list[str], port: int, threads: int) -> None:
        self.port = port
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 120
        while True:
            try:
                if self._is_ready():
                    return
            except OSError:
                pass
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the server did not become ready: {command}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
            sock.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b" 200 " in sock.recv(100)

    def resident_mib(self) -> float:
        """Return the resident memory in MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    def stop(self) -> float:
        """Send SIGTERM; return the seconds until the process ends."""
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


def start_vitlib(folder: Path, options: argparse.Namespace, *arguments: str) -> Server:
    """Start `vitlib serve` with further arguments."""
    port = free_port()
    command = [sys.executable, "-m", "vitlib", "serve", "--model", str(folder), "--port", str(port)]
    command += ["--precision", "fp32", "--max-batch", str(MAX_BATCH), *arguments]
    return Server(command, port, options.threads)


def start_peer(folder: Path, options: argparse.Namespace, workers: int, threads: int) -> Server:
    """Start the simple server."""
    port = free_port()
    command = [options.python, str(HERE.with_name("serving_peer.py")), str(folder), str(port)]
    return Server([*command, str(workers), str(threads)], port, threads)


# --- parts ----------------------------------------------------------------------------------------


def throughput(
    folder: Path, predictor: Worker, requests: list[bytes], options: argparse.Namespace
) -> dict[str, float]:
    """Return the median photos per second of each side."""
    servers = {
        "serve": start_vitlib(folder, options),
        "serve, batch size 1": start_vitlib(folder, options, "--max-batch", "1"),
    }
    if options.python:
        for workers, threads in ((1, options.threads), (2, options.threads), (2, 1)):
            name = f"simple server, {workers} x {threads} threads"
            servers[name] = start_peer(folder, options, workers, threads)
    loops = {
        name: ClosedLoop(server.port, requests, NUM_CLIENTS) for name, server in servers.items()
    }
    calls: dict[str, Callable[[], Any]] = {
        name: lambda loop=loop: loop.measure_rate(options.seconds)  # type: ignore[misc]
        for name, loop in loops.items()
    }
    calls["Predictor"] = lambda: predictor.call("measure_rate", seconds=options.seconds)
    try:
        rates = interleave(calls, options.rounds, 1, {})
    finally:
        for server in servers.values():
            server.stop()
    return {name: statistics.median(turns) for name, turns in rates.items()}


def poisson_row(
    folder: Path, predictor: Worker, requests: list[bytes], options: argparse.Namespace
) -> list[str]:
    """Measure latencies at half the capacity, which is measured first.

    Returns:
        Table row: capacity, rate, number of requests and of failures, latencies, ratio to ideal.
    """
    server = start_vitlib(folder, options)
    try:
        loop = ClosedLoop(server.port, requests, NUM_CLIENTS)
        loop.measure_rate(2)
        capacity = statistics.median(loop.measure_rate(options.seconds) for _ in range(3))
        rate = capacity / 2
        seconds = max(options.poisson_seconds, 100 / rate)
        parts, num_failed, num_requests = [], 0, 0
        services_before = measure_services(predictor)
        for part_index in range(options.rounds):
            responses = poisson_load(server.port, requests, rate, seconds, SEED + part_index)
            services_after = measure_services(predictor)
            services = [(a + b) / 2 for a, b in zip(services_before, services_after, strict=True)]
            parts.append(compare_with_ideal(responses, services))
            services_before = services_after
            num_failed += sum(response.status != 200 for response in responses)
            num_requests += len(responses)
    finally:
        server.stop()
    medians = [statistics.median(values) for values in zip(*parts, strict=True)]
    ratios = sorted(part[-1] for part in parts)
    return [
        f"{capacity:.1f}", f"{rate:.1f}", str(num_requests), str(num_failed),
        *(f"{1e3 * value:.0f}" for value in medians[:4]),
        f"{medians[4]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
    ]  # fmt: skip


def measure_services(predictor: Worker) -> list[float]:
    """Return the seconds of a batch of each size, from 1 to MAX_BATCH."""
    return [
        predictor.call("measure_service", batch_size=n, repeats=2) for n in range(1, MAX_BATCH + 1)
    ]


def compare_with_ideal(responses: list[Response], services: list[float]) -> tuple[float, ...]:
    """Compare latencies with those of an ideal queue.

    Returns:
        p50 and ideal p50, p99 and ideal p99, all in seconds, and the ratio of the p99.
    """
    latencies = sorted(response.done_seconds - response.due_seconds for response in responses)
    ideal_latencies = sorted(
        ideal_queue([response.due_seconds for response in responses], services, MAX_BATCH)
    )
    p99, ideal_p99 = (values[int(0.99 * len(values))] for values in (latencies, ideal_latencies))
    return (
        statistics.median(latencies),
        statistics.median(ideal_latencies),
        p99,
        ideal_p99,
        p99 / ideal_p99,
    )


def single_client_row(
    folder: Path, predictor: Worker, requests: list[bytes], options: argparse.Namespace
) -> list[str]:
    """Return the table row of median milliseconds for one photo."""
    server = start_vitlib(folder, options)
    connection = Connection(server.port)
    request_index = 0

    def time_request() -> float:
        nonlocal request_index
        request_index += 1
        start = time.perf_counter()
        status, _ = connection.send(requests[request_index % len(requests)])
        assert status == 200
        return time.perf_counter() - start

    calls: dict[str, Callable[[], Any]] = {
        "serve": time_request,
        "Predictor": lambda: predictor.call("measure_service", batch_size=1, repeats=1),
    }
    try:
        seconds = interleave(calls, options.lone_rounds, 5, {})
    finally:
        server.stop()
    differences = [a - b for a, b in zip(seconds["serve"], seconds["Predictor"], strict=True)]
    medians = [statistics.median(seconds[name]) for name in ("serve", "Predictor")]
    return [f"{1e3 * x:.1f}" for x in (*medians, statistics.median(differences))]


def overload_row(folder: Path, requests: list[bytes], options: argparse.Namespace) -> list[str]:
    """Return the table row of statuses, memory by the minute, and time to stop."""
    server = start_vitlib(folder, options)
    try:
        loop = ClosedLoop(server.port, requests, NUM_CLIENTS)
        loop.measure_rate(3)
        rate = 2 * statistics.median(loop.measure_rate(3) for _ in range(3))
        statuses: dict[int, int] = {}
        memory = []
        for minute in range(options.minutes):
            for response in poisson_load(server.port, requests, rate, 60, SEED + minute):
                statuses[response.status] = statuses.get(response.status, 0) + 1
            memory.append(server.resident_mib())
    finally:
        stop_seconds = server.stop()
    status_text = ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))
    second, last = memory[min(1, len(memory) - 1)], memory[-1]
    return [
        f"{rate:.0f}",
        status_text,
        f"{second:.0f}",
        f"{last:.0f}",
        f"{last / second - 1:+.1%}",
        f"{stop_seconds:.1f}",
    ]


# --- command line ---------------------------------------------------------------------------------


def make_checkpoint(name: str, scratch: Path) -> Path:
    """Return the folder of a model.

    It is the real DeiT-tiny, or a ViT-B/16 with random weights and 1,000 classes.
    """
    if name == "deit-tiny":
        return SHARED / "models" / "deit-tiny-patch16-224"
    folder = scratch / "b16"
    if not folder.exists():
        import torch

        import vitlib

        torch.manual_seed(SEED)
        model = vitlib.ViT(vitlib.ViTConfig.named("B/16", num_classes=1000))
        processor = vitlib.ImageProcessor.from_profile("hf", "vit", (224, 224))
        vitlib.save(model, folder, image_processor=processor)
    return folder


def photo_files(scratch: Path) -> list[Path]:
    """Return the paths of the real photos, or of noise if these are absent."""
    files = list_photos("fridge_multiclass")
    if files:
        return files
    from PIL import Image

    files = [scratch / f"{i}.jpg" for i in range(50)]
    for path in files:
        Image.effect_noise((500, 375), 60).convert("RGB").save(path)
    return files


def parse_options() -> argparse.Namespace:
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
    add(
        "--python",
        default=sys.executable,
        help="interpreter of the simple server; '' leaves it out",
    )
    add("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run the command line, or a worker if the argument is a task."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        serve_worker(PredictorWorker)
        return
    options = parse_options()
    throughput_rows: list[list[str]] = []
    rows_by_part: dict[str, list[list[str]]] = {part: [] for part in PARTS[1:]}
    with tempfile.TemporaryDirectory() as scratch:
        photos = photo_files(Path(scratch))
        texts = [base64.b64encode(path.read_bytes()).decode() for path in photos]
        requests = [
            post_request(
                json.dumps({"input_data": {"columns": ["image"], "data": [text]}}).encode()
            )
            for text in texts
        ]
        for name in options.models:
            folder = make_checkpoint(name, Path(scratch))
            task = {
                "folder": str(folder),
                "photos": [str(p) for p in photos],
                "threads": options.threads,
            }
            predictor = Worker(sys.executable, HERE, task, options.threads)
            for part in options.parts:
                if part == "throughput":
                    rates = throughput(folder, predictor, requests, options)
                    predictor_rate = rates["Predictor"]
                    throughput_rows += [
                        [
                            name,
                            side,
                            f"{rate:.2f}",
                            f"{rate / predictor_rate:.1%}",
                            f"{rates['serve'] / rate:.2f}",
                        ]
                        for side, rate in rates.items()
                    ]
                elif part == "poisson":
                    rows_by_part[part].append(
                        [name, *poisson_row(folder, predictor, requests, options)]
                    )
                elif part == "lone":
                    rows_by_part[part].append(
                        [name, *single_client_row(folder, predictor, requests, options)]
                    )
                else:
                    rows_by_part[part].append([name, *overload_row(folder, requests, options)])
                print(
                    name,
                    part,
                    throughput_rows[-5:] if part == "throughput" else rows_by_part[part][-1],
                    flush=True,
                )
            predictor.close()
    headers = {
        "poisson": ["model", "capacity, img/s", "rate", "requests", "failures", "p50, ms",
                    "ideal p50", "p99, ms", "ideal p99", "p99 / ideal p99"],
        "lone": ["model", "serve, ms", "Predictor, ms", "difference, ms"],
        "overload": ["model", "requests/s", "statuses", "MiB, minute 2", "MiB, last minute",
                     "growth", "stop, s"],
    }  # fmt: skip
    versions = {name: version(name) for name in ("torch", "fastapi", "uvicorn", "transformers")}
    sections = [describe_run(versions)]
    if throughput_rows:
        header = ["model", "side", "img/s", "share of Predictor", "speedup of serve"]
        sections.append(markdown_table(header, throughput_rows, num_text_columns=2))
    sections += [markdown_table(headers[part], rows) for part, rows in rows_by_part.items() if rows]
    text = "\n\n".join(sections) + "\n"
    print(text)
    if options.out:
        write_atomically(options.out, text)


if __name__ == "__main__":
    main()
