"""The forward of ViT-B/16 on this checkout against another one's, in turns, as a ratio.

    python benchmarks/before_after.py OTHER_CHECKOUT [--rounds 15]

Each checkout runs in a process of its own with 2 threads and takes its turn when asked: batch 1 and
batch 8 at 224x224, float32, the same seeded weights. Medians; also whether the logits are equal.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    sides = {"this": Path(__file__).resolve().parents[1], "other": options.other.resolve()}
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
    for batch in (1, 8):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        digests = set()
        for count in range(options.rounds + 2):  # two that do not count
            for name, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write(f"{batch}\n")
                worker.stdin.flush()
                taken, digest = json.loads(worker.stdout.readline())
                digests.add(digest)
                seconds[name] += [taken] if count > 1 else []
        this, other = (statistics.median(seconds[name]) for name in sides)
        equal = "equal to the bit" if len(digests) == 1 else "different"
        print(f"batch {batch}: {this * 1e3:.0f} against {other * 1e3:.0f} ms, ", end="")
        print(f"ratio {this / other:.3f}, logits {equal}")
    for worker in workers.values():
        worker.kill()


if __name__ == "__main__":
    main()
