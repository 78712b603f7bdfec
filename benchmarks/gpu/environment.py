"""Record of the machine: its GPU, the GPU's state, and library versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from setting import ROOT, describe_cpu

from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.summary import DRY_RUN

PACKAGES = ("triton", "transformers", "accelerate", "timm", "torchvision", "numpy", "pillow")
QUERY = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def record_environment(experiment: Experiment) -> None:
    """Record the GPU, its state, library versions, CPU and commit."""
    values: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    values |= {name: package_version(name) for name in PACKAGES}
    values |= {"cpu": describe_cpu(), "cores": os.cpu_count(), "gpu": DRY_RUN}
    values["commit"] = (
        command_output("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown"
    )
    if experiment.on_gpu:
        properties = torch.cuda.get_device_properties(experiment.device)
        values |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": command_output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"),
        }
    experiment.record("environment", largest_batch=experiment.sizes.batches[-1], **values)


def package_version(package: str) -> str:
    """Return the version of a package, or "missing"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def command_output(*command: str) -> str:
    """Return the output of a command; "" if it fails or is absent."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
