"""Check of an installation: versions, devices, extras, what is missing, and how to mend it.

Nothing here needs a package beside Python's own until it is examined, so that a broken installation
can be described too.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from vitlib import MIN_TORCH
from vitlib.errors import InstallationError, first_line
from vitlib.system.commit import read_commit

PACKAGE = "vitlib"
# Modules of packages that have another name; other modules have that of their package.
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "huggingface-hub": "huggingface_hub",
           "pyyaml": "yaml", "prometheus-client": "prometheus_client",
           "python-multipart": "python_multipart", "ray[data]": "ray",
           "uvicorn[standard]": "uvicorn"}  # fmt: skip
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?\s*\(?(?:>=\s*([0-9.]+))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w-]+)['\"]")


@dataclass(frozen=True)
class Requirement:
    """A package that vitlib, or one of its extras, needs.

    Attributes:
        name: Name to install.
        minimum: Least version; "" for any.
        extra: Extra that needs it; "" for vitlib itself.
        installed: Installed version; "" for none.
    """

    name: str
    minimum: str
    extra: str
    installed: str

    @property
    def problem(self) -> str:
        """Description of what is wrong with it; "" if nothing is."""
        if not self.installed:
            return f"{self.name} is not installed"
        if self.minimum and parse_version(self.installed) < parse_version(self.minimum):
            return f"{self.name} {self.installed} is installed, {self.minimum} or later is needed"
        return ""

    @property
    def command(self) -> str:
        """Command that mends it."""
        if self.extra:
            return f"pip install 'vitlib[{self.extra}]'"
        return (
            f"pip install '{self.name}>={self.minimum}'"
            if self.minimum
            else (f"pip install {self.name}")
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


def parse_version(text: str) -> tuple[int, ...]:
    """Parse the numbers of a version, up to the first part that is none.

    Args:
        text: A version, such as 2.13.0+cpu.

    Returns:
        The numbers, without zeros at the end.
    """
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        numbers.append(int(digits[0]))
        if digits[0] != part:  # 2.13.0rc1
            break
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def installed_version(name: str) -> str:
    """Return the installed version of a package; "" for none.

    Args:
        name: Name of the package.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def list_requirements() -> list[Requirement]:
    """List what vitlib and its extras need, as the installed package states it.

    Returns:
        The requirements; empty where vitlib runs without being installed.
    """
    try:
        stated = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    requirements = []
    for text in stated:
        match, extra = _REQUIREMENT.match(text), _EXTRA.search(text)
        if match is not None:
            name, _, minimum = match.groups()
            requirements.append(
                Requirement(name, minimum or "", extra[1] if extra else "", installed_version(name))
            )
    return requirements


@cache  # an error is not remembered
def check_torch() -> None:
    """Check that torch is installed and new enough, without importing it.

    Raises:
        InstallationError: It is absent or too old.
    """
    torch = Requirement("torch", MIN_TORCH, "", installed_version("torch"))
    # A torch without metadata, such as one of a frozen program, is left to its import.
    if torch.problem and (torch.installed or "torch" not in sys.modules):
        raise InstallationError(f"{torch.problem}: {torch.command}")


def explain_import_error(error: Exception) -> InstallationError | None:
    """Turn an error of importing a package that vitlib needs into one line.

    Args:
        error: An ImportError; or an AttributeError, as an old torch may raise it.

    Returns:
        An error that says what to do; None for a package of someone else.
    """
    if isinstance(error, AttributeError):
        try:
            check_torch()
        except InstallationError as problem:
            return problem
        return None
    module = (getattr(error, "name", None) or "").split(".")[0]
    for requirement in list_requirements():
        if requirement.extra or MODULES.get(requirement.name, requirement.name) != module:
            continue
        if requirement.problem:
            return InstallationError(f"{requirement.problem}: {requirement.command}")
        return InstallationError(
            f"{requirement.name} {requirement.installed} cannot be imported "
            f"({first_line(error)[:200]}): pip install --force-reinstall {requirement.name}"
        )
    return None


def examine() -> Installation:
    """Describe this installation.

    Returns:
        The description.
    """
    requirements = list_requirements()
    core = [requirement for requirement in requirements if not requirement.extra]
    problems = [f"{r.problem}: {r.command}" for r in core if r.problem]
    if not requirements:
        problems.append(f"{PACKAGE} runs without being installed: pip install .")
    versions = {PACKAGE: installed_version(PACKAGE), "commit": read_commit() or "unknown"}
    versions["Python"] = platform.python_version()
    versions |= {r.name: r.installed or "absent" for r in core}
    machine = {"system": platform.platform(), "processor": platform.machine()}
    notes: list[str] = []
    for requirement in core:
        if not requirement.problem:
            problems += _try_import(requirement)
    if not any(problem.startswith("torch") for problem in problems):
        problems += _examine_torch(machine, notes)
    machine["cache of the hub"] = _describe_cache(notes)
    return Installation(
        versions, machine, _describe_extras(requirements), tuple(problems), tuple(notes)
    )


def _try_import(requirement: Requirement) -> Iterator[str]:
    """Yield why a package cannot be imported."""
    try:
        import_module(MODULES.get(requirement.name, requirement.name))
    except Exception as error:  # a broken package may raise anything
        yield (
            f"{requirement.name} {requirement.installed} cannot be imported "
            f"({type(error).__name__}: {first_line(error)[:200]}): "
            f"pip install --force-reinstall {requirement.name}"
        )


def _examine_torch(machine: dict[str, str], notes: list[str]) -> Iterator[str]:
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
    except ImportError:
        return "unknown"
    folder = Path(HF_HUB_CACHE)
    above = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    if not os.access(above, os.W_OK):
        notes.append(f"{folder} cannot be written: hub ids need HF_HOME=, a folder of yours")
    return f"{folder}{', offline' * bool(HF_HUB_OFFLINE)}"


def _describe_extras(requirements: list[Requirement]) -> dict[str, str]:
    """Describe each extra: installed, or what it lacks and the command."""
    extras: dict[str, list[Requirement]] = {}
    for requirement in requirements:
        if requirement.extra and requirement.extra not in ("dev", "docs"):
            extras.setdefault(requirement.extra, []).append(requirement)
    described = {}
    for name, parts in sorted(extras.items()):
        lacking = [part.problem for part in parts if part.problem]
        command = f": pip install 'vitlib[{name}]'"
        described[name] = "; ".join(lacking) + command if lacking else "installed"
    return described
