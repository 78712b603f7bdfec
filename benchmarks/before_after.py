"""Compare the forward pass of ViT-B/16 between this checkout and another one.

    python benchmarks/before_after.py OTHER_CHECKOUT [--rounds 15]

Each checkout runs in its own process with 2 threads, and the two are interleaved: batch sizes 1 and
8 at 224x224, float32, the same seeded weights. The speed of a process depends on the memory that it
gets. The result is therefore the median over several pairs of processes of the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

WARMUP = 2  # rounds before the timed ones
WORKER = """
import hashlib, json, sys, time
sys.path.insert(0, sys.argv[1])
import torch, vitlib
assert vitlib.__file__.startswith(sys.argv[1]), vitlib.__file__
torch.set_num_threads(2)
torch.manual_seed(0)
model = vitlib.ViT(vitlib.ViTConfig.named("B/16", num_classes=1000)).eval()
images = {n: torch.randn(n, 3, 224, 224) for n in (1, 8)}
with torch.inference_mode():
    for line in sys.stdin:
        batch = images[int(line)]
        start = time.perf_counter()
        logits = model(batch)
        seconds = time.perf_counter() - start
        digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        print(json.dumps([seconds, digest]), flush=True)
"""


def measure_pair(
    sides: dict[str, Path], batch: int, rounds: int
) -> tuple[dict[str, float], set[str]]:
    """Interleave both sides in one pair of processes.

    Args:
        sides: Folder of each checkout.
        batch: Batch size.
        rounds: Timed rounds.

    Returns:
        Median seconds of each side, and the SHA-256 digests of all logits.
    """
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=path,
        )
        for name, path in sides.items()
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    digests = set()
    for round_index in range(rounds + WARMUP):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{batch}\n")
            worker.stdin.flush()
            seconds, digest = json.loads(worker.stdout.readline())
            digests.add(digest)
            times[name] += [seconds] if round_index >= WARMUP else []
    for worker in workers.values():
        worker.kill()
    return {name: statistics.median(seconds) for name, seconds in times.items()}, digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=6)
    options = parser.parse_args()
    this, other = Path(__file__).resolve().parents[1], options.other.resolve()
    for batch in (1, 8):
        ratios, digests = [], set()
        for turn in range(options.pairs):
            sides = {"this": this, "other": other}
            sides = sides if turn % 2 else dict(reversed(sides.items()))
            medians, pair_digests = measure_pair(sides, batch, options.rounds)
            ratios.append(medians["this"] / medians["other"])
            digests |= pair_digests
        equal = "bitwise equal" if len(digests) == 1 else "different"
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"batch {batch}: ratio {statistics.median(ratios):.3f} ({spread}), logits {equal}")


if __name__ == "__main__":
    main()
