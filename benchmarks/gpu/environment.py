"""The machine of a run: its card, versions, and what the card does just now."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from setting import ROOT, machine

from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.summary import DRY

PACKAGES = ("triton", "transformers", "accelerate", "timm", "torchvision", "numpy", "pillow")
QUERY = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def record_environment(experiment: Experiment) -> None:
    """Record card, driver's readings, versions, CPU and commit."""
    found: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {name: installed(name) for name in PACKAGES}
    found |= {"cpu": machine(), "cores": os.cpu_count(), "gpu": DRY}
    found["commit"] = output("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown"
    if experiment.on_gpu:
        properties = torch.cuda.get_device_properties(experiment.device)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"),
        }
    experiment.record("environment", largest_batch=experiment.sizes.batches[-1], **found)


def installed(package: str) -> str:
    """Return the version of a package, or "missing"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def output(*command: str) -> str:
    """Return what a command prints; "" where it fails or is absent."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
