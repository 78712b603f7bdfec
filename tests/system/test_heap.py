"""Memory that stays in the process between two forwards."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Writes to every page of a block of 16 MiB, frees it, and counts the pages that the system gave.
SCRIPT = """
import ctypes, resource, sys
import torch
import vitlib
from vitlib.system.heap import hold_heap

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**22, dtype=torch.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if "mallopt" in sys.argv:  # a limit of the caller's own, after which glibc does not adapt
    ctypes.CDLL(None).mallopt(-3, 128 * 1024)
sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
model = vitlib.ViT(vitlib.ViTConfig(**sizes)).eval()
if "hold" in sys.argv:
    with hold_heap():
        pass
if "optimize" in sys.argv:
    vitlib.optimize(model)
count_faults()
print(min(count_faults() for _ in range(12)))  # the heap of a large process settles slowly
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do not adapt")
@pytest.mark.parametrize(
    ("steps", "stays"),
    [
        (["optimize"], True),
        (["optimize", "hold"], True),
        (["hold"], True),
        (["mallopt", "optimize"], False),
    ],
)
def test_freed_blocks_stay_for_the_next_forward(steps: list[str], stays: bool) -> None:
    command = [sys.executable, "-c", SCRIPT, *steps]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # 4,096 pages of 4 KiB, or 8 of 2 MiB.
    assert (int(done.stdout) < 4) == stays
