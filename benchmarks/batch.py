"""Benchmark of `vitlib batch`: rate, memory, output after kills, and scaling with Ray.

    python benchmarks/batch.py [--parts rate memory kills ray] [--models B/16 deit-tiny]
        [--files 256] [--rounds 5] [--photos FOLDER] [--python PEERS] [--out FILE]

The photos are 640x480 JPEG files, cropped from the real ones. --photos is their folder, which is
filled once.

rate: interleave four calls: the model alone on decoded images, decoding alone on both cores,
vitlib.batch.run over the files, and transformers' pipeline with its fastest batch size. The model
runs either with a batch on both cores or with a batch on each core, whichever is faster. Decoding
and model share the cores, so the rate is at most r = 1 / (1/model + 1/decoding).
memory: run the command over 2,000 and over 20,000 photos, and record the peaks of resident and of
private memory.
kills: run the command over --killed photos and kill it 20 times at random moments. Every file of
its output is compared with that of an uninterrupted run.
ray: run the command over --rayed photos and over a quarter of them, locally and with two actors,
interleaved. The rate is that of the difference, without the start of processes and cluster.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from photo_sides import measure_seconds
from photos import BATCH, make_classifier, write_photos
from setting import SHARED, describe_run, markdown_table, write_atomically
from turns import Worker, WorkerError, interleave

HERE = Path(__file__).resolve().parent
SIDES = HERE / "photo_sides.py"
PARTS = ("rate", "memory", "kills", "ray")
NUM_KILLS, SEED = 20, 3
MANY, FEW = 20_000, 2_000


def make_photos(folder: Path, count: int) -> list[str]:
    """Return the first photos of the folder, and write the folder if it is absent."""
    if not folder.exists():
        write_photos(folder, MANY)
    return sorted(str(path) for path in folder.rglob("*.jpg"))[:count]


def rate_row(name: str, files: list[str], options: argparse.Namespace, work: Path) -> list[str]:
    """Measure a model; return its table row of rates and ratios, medians over the rounds."""
    task: dict[str, Any] = {
        "folder": str(make_classifier(name, work)), "files": files, "batch_size": BATCH,
        "batch_sizes": [1, 8, BATCH], "threads": options.threads, "precision": "fp32",
    }  # fmt: skip
    worker = Worker(sys.executable, SIDES, task | {"kind": "batch"}, options.threads)
    workers = [worker]
    calls = {
        side: partial(worker.call, side) for side in ("time_model", "time_decoding", "time_batch")
    }
    try:
        if options.python:
            peer = Worker(options.python, SIDES, task | {"kind": "pipeline"}, options.threads)
            workers.append(peer)
            calls["pipeline"] = partial(peer.call, "time_all")
    except WorkerError as error:
        print(f"The pipeline is left out: {error}")
    try:
        seconds = interleave(calls, options.rounds, 1, {})
    finally:
        for worker in workers:
            worker.close()
    rates = {side: len(files) / statistics.median(turns) for side, turns in seconds.items()}
    triples = zip(
        seconds["time_model"], seconds["time_decoding"], seconds["time_batch"], strict=True
    )
    bound_shares = sorted((model + decode) / batch for model, decode, batch in triples)
    speedups = [
        a / b for a, b in zip(seconds.get("pipeline", []), seconds["time_batch"], strict=False)
    ]
    return [
        name, *(f"{rates[side]:.1f}" for side in ("time_batch", "time_model", "time_decoding")),
        f"{statistics.median(bound_shares):.3f} ({bound_shares[0]:.3f} to {bound_shares[-1]:.3f})",
        f"{rates['pipeline']:.1f}" if speedups else "",
        f"{statistics.median(speedups):.2f}" if speedups else "",
    ]  # fmt: skip


def batch_command(source: Path, out: Path, model: str, *options: str) -> list[str]:
    """Build the command line of `vitlib batch`."""
    command = [sys.executable, "-m", "vitlib", "batch", str(source), "--out", str(out)]
    return [*command, "--model", model, *options]


def write_list(files: list[str], work: Path) -> Path:
    """Write a file that lists the photos, one path per line."""
    path = work / f"{len(files)}.txt"
    path.write_text("\n".join(files) + "\n")
    return path


def poll_peaks(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Poll a process until it ends; return its peak resident and private memory in MiB."""
    resident = private = 0.0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
            fields = {
                line.split(":")[0]: line.split()[1] for line in text.splitlines() if "kB" in line
            }
            resident = max(resident, int(fields["VmHWM"]) / 1024)
            private = max(private, int(fields["RssAnon"]) / 1024)
        except (OSError, KeyError, IndexError):
            pass
        time.sleep(0.5)
    return resident, private


def memory_rows(model: str, options: argparse.Namespace, work: Path) -> list[list[str]]:
    """Measure the peaks of memory; return a table row for each number of photos."""
    rows = []
    for count in (FEW, MANY):
        out = work / f"memory-{count}"
        source = write_list(make_photos(options.photos, count), work)
        process = subprocess.Popen(batch_command(source, out, model), stdout=subprocess.PIPE)
        resident, private = poll_peaks(process)
        assert process.stdout is not None
        output = process.stdout.read().decode().splitlines()
        rows.append([f"{count:,}", f"{resident:.0f}", f"{private:.0f}", output[-1]])
        shutil.rmtree(out)
    ratios = [float(rows[1][i]) / float(rows[0][i]) for i in (1, 2)]
    rows.append(["ratio", f"{ratios[0]:.3f}", f"{ratios[1]:.3f}", ""])
    return rows


def describe_kills(model: str, options: argparse.Namespace, work: Path) -> str:
    """Kill the command at random moments, and describe how its output compares."""
    source = write_list(make_photos(options.photos, options.killed), work)
    complete_out, killed_out = work / "complete", work / "killed"
    arguments = ("--shard-size", "100")
    seconds = measure_seconds(partial(_run, batch_command(source, complete_out, model, *arguments)))
    rng = random.Random(SEED)
    num_killed = 0
    while num_killed < NUM_KILLS and not (killed_out / "_SUCCESS").exists():
        process = subprocess.Popen(
            batch_command(source, killed_out, model, *arguments), stdout=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=rng.uniform(0, seconds / NUM_KILLS + 8))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_killed += 1
    _run(batch_command(source, killed_out, model, *arguments))
    names = [
        {p.relative_to(folder) for p in folder.rglob("*")} for folder in (complete_out, killed_out)
    ]
    is_identical = names[0] == names[1] and all(
        (complete_out / name).read_bytes() == (killed_out / name).read_bytes() for name in names[0]
    )
    num_parts = len(list(complete_out.glob("part-*")))
    return (
        f"{options.killed:,} photos, {num_parts} parts, {num_killed} SIGKILLs at random moments: "
        f"output {'identical' if is_identical else 'DIFFERENT'}, manifest included."
    )


def ray_rows(model: str, options: argparse.Namespace, work: Path) -> list[list[str]]:
    """Time the command locally and with Ray; return the table rows."""
    num_few, num_many = options.rayed // 4, options.rayed
    sources = [
        write_list(make_photos(options.photos, count), work) for count in (num_few, num_many)
    ]
    engines: dict[str, tuple[str, ...]] = {
        "local": (), "ray, 2 actors": ("--engine", "ray", "--workers", "2")
    }  # fmt: skip
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    for turn in range(options.rounds):
        for name, arguments in engines.items():
            outs = [work / f"{name[:3]}-{turn}-{i}" for i in range(len(sources))]
            runs = [
                batch_command(*pair, model, *arguments) for pair in zip(sources, outs, strict=True)
            ]
            seconds[name].append([measure_seconds(partial(_run, run)) for run in runs])
            for out in outs:
                shutil.rmtree(out)
    rows, rates = [], []
    for name, turns in seconds.items():
        few_seconds, many_seconds = (
            statistics.median(column) for column in zip(*turns, strict=True)
        )
        rates.append((num_many - num_few) / (many_seconds - few_seconds))
        start_seconds = many_seconds - num_many / rates[-1]
        rows.append(
            [name, *(f"{x:.1f}" for x in (few_seconds, many_seconds, start_seconds, rates[-1]))]
        )
    return [*rows, ["ratio", "", "", "", f"{rates[1] / rates[0]:.2f}"]]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=["rate"])
    add("--models", nargs="+", default=["B/16", "deit-tiny"])
    add("--files", type=int, default=256, help="photos of the part `rate`")
    add("--killed", type=int, default=2000)
    add("--rayed", type=int, default=2400)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--photos", type=Path, default=Path(tempfile.gettempdir()) / "vitlib-photos")
    add("--python", default=sys.executable, help="interpreter of the pipeline; '' leaves it out")
    add("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    sys.path.insert(0, str(HERE.parent))
    versions = {name: version(name) for name in ("torch", "transformers", "pillow")}
    parts = [f"{describe_run(versions)} Photos: 640x480 JPEG, cropped from real ones."]
    deit_tiny = str(SHARED / "models/deit-tiny-patch16-224")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if "rate" in options.parts:
            files = make_photos(options.photos, options.files)
            rows = [rate_row(name, files, options, work) for name in options.models]
            header = ["model", "batch, img/s", "model alone", "decoding alone", "share of r",
                      "pipeline", "speedup over pipeline"]  # fmt: skip
            parts.append(markdown_table(header, rows))
        if "memory" in options.parts:
            header = ["photos", "resident, MiB", "private, MiB", "output"]
            parts.append(markdown_table(header, memory_rows(deit_tiny, options, work)))
        if "kills" in options.parts:
            parts.append(describe_kills(deit_tiny, options, work))
        if "ray" in options.parts:
            header = ["engine", f"{options.rayed // 4:,} photos, s", f"{options.rayed:,} photos, s",
                    "start, s", "img/s after start"]  # fmt: skip
            parts.append(markdown_table(header, ray_rows(deit_tiny, options, work)))
    report = "\n\n".join(parts) + "\n"
    print(report)
    if options.out:
        write_atomically(options.out, report)


if __name__ == "__main__":
    main()
