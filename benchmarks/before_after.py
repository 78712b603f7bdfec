"""The forward of ViT-B/16 on this checkout against another one's, in turns, as a ratio.

    python benchmarks/before_after.py OTHER_CHECKOUT [--rounds 15]

Each checkout runs in a process of its own with 2 threads and takes its turn when asked: batch 1 and
batch 8 at 224x224, float32, the same seeded weights. A process may be lucky or not with its memory:
so there are several pairs of them, and the figure is the median of the pairs' ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

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
        taken = time.perf_counter() - start
        digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        print(json.dumps([taken, digest]), flush=True)
"""


def pair(sides: dict[str, Path], batch: int, rounds: int) -> tuple[dict[str, float], set[str]]:
    """Median seconds of each side in one pair of processes, and the digests of all logits."""
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
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    digests = set()
    for count in range(rounds + 2):  # two that do not count
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{batch}\n")
            worker.stdin.flush()
            taken, digest = json.loads(worker.stdout.readline())
            digests.add(digest)
            seconds[name] += [taken] if count > 1 else []
    for worker in workers.values():
        worker.kill()
    return {name: statistics.median(taken) for name, taken in seconds.items()}, digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=6)
    options = parser.parse_args()
    this, other = Path(__file__).resolve().parents[1], options.other.resolve()
    for batch in (1, 8):
        found, digests = [], set()
        for turn in range(options.pairs):
            sides = {"this": this, "other": other}
            sides = sides if turn % 2 else dict(reversed(sides.items()))
            middle, seen = pair(sides, batch, options.rounds)
            found.append(middle["this"] / middle["other"])
            digests |= seen
        equal = "equal to the bit" if len(digests) == 1 else "different"
        spread = f"{min(found):.3f} to {max(found):.3f}"
        print(f"batch {batch}: ratio {statistics.median(found):.3f} ({spread}), logits {equal}")


if __name__ == "__main__":
    main()
