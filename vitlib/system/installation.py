"""Check of an installation: versions, devices, extras, what is missing, and how to mend it.

Nothing here needs a package beside Python's own until it is examined, so that a broken installation
can be described too.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import vitlib
from vitlib.errors import first_line
from vitlib.system.commit import read_commit
from vitlib.system.requirements import (
    PACKAGE,
    Requirement,
    install_command,
    list_core,
    list_extras,
)


@dataclass(frozen=True)
class Installation:
    """Description of an installation.

    Attributes:
        versions: Versions of vitlib, Python and packages, by name.
        machine: Facts of the machine: system, CPU, devices, by name.
        extras: Whether each extra is installed, by name; what lacks where it is not.
        problems: What keeps vitlib from working, each with a command that mends it.
        notes: What makes it slower than it could be.
    """

    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON has it."""
        return asdict(self)


def examine() -> Installation:
    """Describe this installation.

    Returns:
        The description.
    """
    core = list_core()
    problems = [f"{r.problem}: {install_command([r])}" for r in core if r.problem]
    versions = {PACKAGE: vitlib.__version__, "commit": read_commit() or "unknown"}
    versions["Python"] = platform.python_version()
    versions |= {r.name: r.installed or "absent" for r in core}
    folder = Path(vitlib.__file__).parent
    machine = {"folder": str(folder), "interpreter": sys.executable}
    machine |= {"system": platform.platform(), "processor": platform.machine()}
    notes: list[str] = []
    problems += _examine_copies(folder, notes)
    broken = {r.name for r in core if r.problem}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a numpy that a problem names
        for requirement in sorted(core, key=lambda r: r.name != "numpy"):  # torch imports numpy
            problem = "" if requirement.name in broken else _try_import(requirement)
            if problem:
                broken.add(requirement.name)
            if problem and (requirement.name != "torch" or "numpy" not in broken):
                problems.append(problem)
        if not broken & {"torch", "numpy"}:
            problems += _examine_torch(machine, notes)
    machine["cache of the hub"] = _describe_cache(notes)
    extras = _describe_extras(list_extras())
    return Installation(versions, machine, extras, tuple(problems), tuple(notes))


def _examine_copies(folder: Path, notes: list[str]) -> Iterator[str]:
    """Yield what is wrong with the files of vitlib itself; note another copy of them."""
    if not folder.is_dir():
        yield (
            f"{PACKAGE} runs from an archive, {folder.parent}, where its tables and the model demo "
            "cannot be read: unpack it, or pip install ."
        )
        return
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        yield f"{PACKAGE} runs without being installed: pip install ."
        return
    other = Path(str(distribution.locate_file(PACKAGE)))  # absent where it is editable
    is_other = other.is_dir() and other.resolve() != folder.resolve()
    if is_other or distribution.version != vitlib.__version__:
        notes.append(
            f"{PACKAGE} {distribution.version} is installed in {other.parent}, and "
            f"{vitlib.__version__} of {folder} runs: install it again, or see PYTHONPATH"
        )


def _try_import(requirement: Requirement) -> str:
    """Import a package and return why that fails; "" where it does not."""
    try:
        module = import_module(requirement.module)
        if getattr(module, "__file__", None) is None:
            raise ImportError("its folder has no code")
    except Exception as error:  # a broken package may raise anything
        return requirement.explain_failure(error)
    return ""


def _examine_torch(machine: dict[str, str], notes: list[str]) -> Iterator[str]:
    """Describe torch's devices and yield what keeps torch from working."""
    import torch

    try:
        yield from _describe_devices(machine, notes)
    except Exception as error:  # half of its files may be of another version
        version = getattr(torch, "__version__", "of unknown version")
        yield (
            f"torch {version} does not work ({type(error).__name__}: {first_line(error)[:200]}): "
            "pip install --force-reinstall torch"
        )


def _describe_devices(machine: dict[str, str], notes: list[str]) -> Iterator[str]:
    """Describe torch's devices and yield what keeps torch from working with numpy."""
    import numpy as np
    import torch

    machine["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"
    capability = torch.backends.cpu.get_cpu_capability()
    machine["instructions"] = capability
    if capability == "DEFAULT" and platform.machine().lower() in ("x86_64", "amd64"):
        notes.append("this CPU has no AVX2 that torch may use: models run several times slower")
    try:
        torch.from_numpy(np.zeros(1, np.float32)).numpy()
    except RuntimeError as error:
        yield (
            f"torch {torch.__version__} and numpy {np.__version__} do not fit each other "
            f"({first_line(error)[:200]}): pip install --upgrade torch numpy"
        )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine["GPU"] = ", ".join(names) or "none"
    if not names and torch.version.cuda:
        notes.append(
            f"torch is built for CUDA {torch.version.cuda} and sees no GPU: its driver is absent "
            "or too old (nvidia-smi shows it)"
        )


def _describe_cache(notes: list[str]) -> str:
    """Describe the folder that checkpoints of the hub are stored in."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    except Exception:  # it is broken, which a problem says
        return "unknown"
    folder = Path(HF_HUB_CACHE)
    above = next(
        (path for path in (folder, *folder.parents) if os.access(path, os.F_OK)), Path("/")
    )
    if not os.access(above, os.W_OK):
        notes.append(f"{folder} cannot be written: hub ids need HF_HOME=, a folder of yours")
    return f"{folder}{', offline' * bool(HF_HUB_OFFLINE)}"


def _describe_extras(requirements: list[Requirement]) -> dict[str, str]:
    """Describe each extra: installed, or what it lacks and the command."""
    extras: dict[str, list[Requirement]] = {}
    for requirement in requirements:
        if requirement.extra not in ("dev", "docs"):
            extras.setdefault(requirement.extra, []).append(requirement)
    described = {}
    for name, parts in sorted(extras.items()):
        lacking = [part.problem for part in parts if part.problem]
        command = f": pip install 'vitlib[{name}]'"
        described[name] = "; ".join(lacking) + command if lacking else "installed"
    return described
