"""`vitlib batch`: its rate beside what its parts allow and beside the pipeline; memory; kills; Ray.

    python benchmarks/batch.py [--parts rate memory kills ray] [--models B/16 deit-tiny]
        [--files 256] [--rounds 5] [--photos FOLDER] [--python PEERS] [--out FILE]

The photos are 640x480 JPEG files cut from real ones, made once in --photos.

rate: in turns, the model alone on levels that lie ready (the faster of: a batch by both cores, a
batch by each), the decoding alone by both cores, vitlib.batch.run over the files, and the pipeline
with the fastest of its batch sizes. The most that parts which share the cores can reach is
r = 1 / (1/model + 1/decoding).
memory: the command over 2,000 and over 20,000 photos; peak of resident and of private memory.
kills: the command over --killed photos, killed 20 times at random moments, beside an uninterrupted
run: every file of the output compared.
ray: the command over --rayed photos and over a quarter of them, locally and by two actors, in
turns; the rate is that of the photos between, without the start of processes and cluster.
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

from photo_sides import timed
from photos import BATCH, classifier, cut
from setting import SHARED, heading, table, write_whole
from turns import Worker, WorkerError, in_turns

HERE = Path(__file__).resolve().parent
SIDES = HERE / "photo_sides.py"
PARTS = ("rate", "memory", "kills", "ray")
KILLS, SEED = 20, 3
WHOLE, FEW = 20_000, 2_000


def made(folder: Path, count: int) -> list[str]:
    """The first photos of the set, which is made where it is not there."""
    if not folder.exists():
        cut(folder, WHOLE)
    return sorted(str(path) for path in folder.rglob("*.jpg"))[:count]


def rate(name: str, files: list[str], options: argparse.Namespace, work: Path) -> list[str]:
    """A row: rates and ratios, medians over the rounds."""
    task: dict[str, Any] = {
        "folder": str(classifier(name, work)), "files": files, "batch_size": BATCH,
        "batch_sizes": [1, 8, BATCH], "threads": options.threads, "precision": "fp32",
    }  # fmt: skip
    ours = Worker(sys.executable, SIDES, task | {"kind": "batch"}, options.threads)
    workers = [ours]
    sides = {what: partial(ours.ask, what) for what in ("model", "decode", "batch")}
    try:
        if options.python:
            peer = Worker(options.python, SIDES, task | {"kind": "pipeline"}, options.threads)
            workers.append(peer)
            sides["pipeline"] = partial(peer.ask, "whole")
    except WorkerError as error:
        print(f"the pipeline is left out: {error}")
    try:
        seconds = in_turns(sides, options.rounds, 1, {})
    finally:
        for worker in workers:
            worker.end()
    rates = {what: len(files) / statistics.median(found) for what, found in seconds.items()}
    parts = zip(seconds["model"], seconds["decode"], seconds["batch"], strict=True)
    shares = sorted((model + decode) / whole for model, decode, whole in parts)
    beside = [a / b for a, b in zip(seconds.get("pipeline", []), seconds["batch"], strict=False)]
    return [
        name, *(f"{rates[what]:.1f}" for what in ("batch", "model", "decode")),
        f"{statistics.median(shares):.3f} ({shares[0]:.3f} to {shares[-1]:.3f})",
        f"{rates['pipeline']:.1f}" if beside else "",
        f"{statistics.median(beside):.2f}" if beside else "",
    ]  # fmt: skip


def command(source: Path, out: Path, model: str, *more: str) -> list[str]:
    verb = [sys.executable, "-m", "vitlib", "batch", str(source), "--out", str(out)]
    return [*verb, "--model", model, *more]


def listed(files: list[str], work: Path) -> Path:
    path = work / f"{len(files)}.txt"
    path.write_text("\n".join(files) + "\n")
    return path


def peak(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """MiB: resident, and private at its highest, until the process ends."""
    resident = private = 0.0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
            held = {
                line.split(":")[0]: line.split()[1] for line in text.splitlines() if "kB" in line
            }
            resident = max(resident, int(held["VmHWM"]) / 1024)
            private = max(private, int(held["RssAnon"]) / 1024)
        except (OSError, KeyError, IndexError):
            pass
        time.sleep(0.5)
    return resident, private


def memory(model: str, options: argparse.Namespace, work: Path) -> list[list[str]]:
    rows = []
    for count in (FEW, WHOLE):
        out = work / f"memory-{count}"
        source = listed(made(options.photos, count), work)
        process = subprocess.Popen(command(source, out, model), stdout=subprocess.PIPE)
        resident, private = peak(process)
        assert process.stdout is not None
        said = process.stdout.read().decode().splitlines()
        rows.append([f"{count:,}", f"{resident:.0f}", f"{private:.0f}", said[-1]])
        shutil.rmtree(out)
    ratio = [float(rows[1][i]) / float(rows[0][i]) for i in (1, 2)]
    rows.append(["ratio", f"{ratio[0]:.3f}", f"{ratio[1]:.3f}", ""])
    return rows


def kills(model: str, options: argparse.Namespace, work: Path) -> str:
    source = listed(made(options.photos, options.killed), work)
    whole, out = work / "whole", work / "killed"
    more = ("--shard-size", "100")
    took = timed(partial(_quiet, command(source, whole, model, *more)))
    draw = random.Random(SEED)
    killed = 0
    while killed < KILLS and not (out / "_SUCCESS").exists():
        process = subprocess.Popen(command(source, out, model, *more), stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=draw.uniform(0, took / KILLS + 8))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    _quiet(command(source, out, model, *more))
    names = [{p.relative_to(folder) for p in folder.rglob("*")} for folder in (whole, out)]
    same = names[0] == names[1] and all(
        (whole / name).read_bytes() == (out / name).read_bytes() for name in names[0]
    )
    parts = len(list(whole.glob("part-*")))
    return (
        f"{options.killed:,} photos, {parts} parts, {killed} SIGKILLs at random moments: output "
        f"{'identical' if same else 'DIFFERENT'}, manifest included."
    )


def by_ray(model: str, options: argparse.Namespace, work: Path) -> list[list[str]]:
    few, whole = options.rayed // 4, options.rayed
    sources = [listed(made(options.photos, count), work) for count in (few, whole)]
    engines: dict[str, tuple[str, ...]] = {
        "local": (), "ray, 2 actors": ("--engine", "ray", "--workers", "2")
    }  # fmt: skip
    took: dict[str, list[list[float]]] = {name: [] for name in engines}
    for turn in range(options.rounds):
        for name, more in engines.items():
            outs = [work / f"{name[:3]}-{turn}-{i}" for i in range(len(sources))]
            runs = [command(*pair, model, *more) for pair in zip(sources, outs, strict=True)]
            took[name].append([timed(partial(_quiet, run)) for run in runs])
            for out in outs:
                shutil.rmtree(out)
    rows, rates = [], []
    for name, found in took.items():
        short, long = (statistics.median(seconds) for seconds in zip(*found, strict=True))
        rates.append((whole - few) / (long - short))
        start = long - whole / rates[-1]
        rows.append([name, *(f"{x:.1f}" for x in (short, long, start, rates[-1]))])
    return [*rows, ["ratio", "", "", "", f"{rates[1] / rates[0]:.2f}"]]


def _quiet(run: list[str]) -> None:
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=["rate"])
    add("--models", nargs="+", default=["B/16", "deit-tiny"])
    add("--files", type=int, default=256, help="of rate")
    add("--killed", type=int, default=2000)
    add("--rayed", type=int, default=2400)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--photos", type=Path, default=Path(tempfile.gettempdir()) / "vitlib-photos")
    add("--python", default=sys.executable, help="of the pipeline; '' leaves it out")
    add("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    sys.path.insert(0, str(HERE.parent))
    versions = {name: version(name) for name in ("torch", "transformers", "pillow")}
    text = [f"{heading(versions)} Photos: 640x480 JPEG, cut from real ones."]
    tiny = str(SHARED / "models/deit-tiny-patch16-224")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if "rate" in options.parts:
            files = made(options.photos, options.files)
            rows = [rate(name, files, options, work) for name in options.models]
            head = ["model", "batch, img/s", "model alone", "decoding alone", "of r", "pipeline",
                    "batch / pipeline"]  # fmt: skip
            text.append(table(head, rows))
        if "memory" in options.parts:
            head = ["photos", "resident, MiB", "private, MiB", "it said"]
            text.append(table(head, memory(tiny, options, work)))
        if "kills" in options.parts:
            text.append(kills(tiny, options, work))
        if "ray" in options.parts:
            head = ["engine", f"{options.rayed // 4:,} photos, s", f"{options.rayed:,} photos, s",
                    "start, s", "img/s after it"]  # fmt: skip
            text.append(table(head, by_ray(tiny, options, work)))
    told = "\n\n".join(text) + "\n"
    print(told)
    if options.out:
        write_whole(options.out, told)


if __name__ == "__main__":
    main()
