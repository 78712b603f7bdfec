"""Packages that vitlib and its extras need: their versions, and errors of importing them in a line.

Nothing here needs a package beside Python's own, so that a broken installation can be described.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from vitlib import REQUIRES
from vitlib.errors import ConfigError, InstallationError, VitlibError, first_line

PACKAGE = "vitlib"
# Version of a package that can be imported and has no metadata, as in a frozen program.
UNKNOWN = "unknown"
# Modules of packages that have another name; other modules have that of their package.
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "huggingface-hub": "huggingface_hub",
           "pyyaml": "yaml", "prometheus-client": "prometheus_client",
           "python-multipart": "python_multipart"}  # fmt: skip
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
    def module(self) -> str:
        """Name of its module."""
        return MODULES.get(self.name, self.name)

    @property
    def problem(self) -> str:
        """Description of what is wrong with it; "" if nothing is."""
        if not self.installed:
            return f"{self.name} is not installed"
        if self.installed == UNKNOWN or not self.minimum:
            return ""
        if parse_version(self.installed) < parse_version(self.minimum):
            return f"{self.name} {self.installed} is installed, {self.minimum} or later is needed"
        return ""

    def explain_failure(self, error: Exception) -> str:
        """Describe why it cannot be imported, and what to do.

        Args:
            error: Error of its import.

        Returns:
            One line.
        """
        line = (
            f"{self.name} {self.installed} cannot be imported ({type(error).__name__}: "
            f"{first_line(error)[:200]}): "
        )
        other = self._find_other_file()
        if other:
            return f"{line}Python takes {other} for it: rename that, or run from another folder"
        return f"{line}pip install --force-reinstall {self.name}"

    def _find_other_file(self) -> str:
        """Find a file of the package's name where Python looks first; "" for none."""
        # The folder of the script, and with -m or -c the current one.
        first = Path(sys.path[0] if sys.path else "").absolute()
        try:
            installed_in = Path(str(metadata.distribution(self.name).locate_file(""))).absolute()
        except metadata.PackageNotFoundError:
            return ""
        file, folder = first / f"{self.module}.py", first / self.module
        if first == installed_in:
            return ""
        return next((str(path) for path in (folder, file) if path.exists()), "")


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
    """Return the installed version of a package.

    Args:
        name: Name of the package.

    Returns:
        The version; UNKNOWN where it has no metadata, "" where it is not installed.
    """
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = ""
    if version:
        return version
    return UNKNOWN if has_module(MODULES.get(name, name)) else ""


def has_module(name: str) -> bool:
    """Return True if Python finds a module; an empty folder of its name is none.

    Args:
        name: Name of the module.
    """
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # ValueError: another module stands in its place
        return sys.modules.get(name) is not None
    return spec is not None and spec.origin is not None


def list_core() -> list[Requirement]:
    """List what vitlib itself needs."""
    return [
        Requirement(name, minimum, "", installed_version(name))
        for name, minimum in REQUIRES.items()
    ]


@cache
def _stated_extras() -> tuple[tuple[str, str, str], ...]:
    """Return (extra, package, minimum) of each row that the installed package states."""
    try:
        stated = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return ()
    rows = []
    for text in stated:
        match, extra = _REQUIREMENT.match(text), _EXTRA.search(text)
        if match is not None and extra is not None:
            rows.append((extra[1], match[1], match[3] or ""))
    return tuple(rows)


def list_extras() -> list[Requirement]:
    """List what the extras of vitlib need, as the installed package states it.

    Returns:
        The requirements; empty where vitlib runs without being installed.
    """
    return [
        Requirement(name, minimum, extra, installed_version(name))
        for extra, name, minimum in _stated_extras()
    ]


@cache  # an error is not remembered
def check_core() -> None:
    """Check that what vitlib needs is installed and new enough, without importing it.

    Raises:
        InstallationError: Packages are absent or too old; one command mends all of them.
    """
    wrong = [requirement for requirement in list_core() if requirement.problem]
    if wrong:
        raise InstallationError(f"{'; '.join(r.problem for r in wrong)}: {install_command(wrong)}")


def install_command(requirements: list[Requirement]) -> str:
    """Return the command that installs packages of vitlib itself.

    Args:
        requirements: The packages.
    """
    return " ".join(["pip install", *(f"'{r.name}>={r.minimum}'" for r in requirements)])


def explain_import_error(error: Exception) -> InstallationError | None:
    """Turn an error of importing a package that vitlib needs into one line.

    Args:
        error: What the import raised: an ImportError, or whatever a broken package raises.

    Returns:
        An error that says what to do; None where no import of such a package has failed.
    """
    if str(error) == "Numpy is not available":  # torch's, at the first array
        versions = " and ".join(f"{n} {installed_version(n)}" for n in ("torch", "numpy"))
        return InstallationError(
            f"{versions} do not fit each other: pip install --upgrade torch numpy"
        )
    name = _blame(error)
    if name is None:
        return None
    try:
        check_core()
    except InstallationError as problem:
        return problem
    (requirement,) = [r for r in list_core() if r.name == name]
    return InstallationError(requirement.explain_failure(error))


@contextmanager
def explained_imports() -> Iterator[None]:
    """Turn errors of imports in the block into one line, for those that run in a function.

    Yields:
        Nothing.

    Raises:
        InstallationError: A package that vitlib needs is absent, too old or broken.
    """
    try:
        yield
    except Exception as error:  # a broken package may raise anything
        explained = explain_import_error(error)
        if explained is None:
            raise
        raise explained from error


def _blame(error: Exception) -> str | None:
    """Return the package of vitlib's own needs whose import raised an error; None for others."""
    packages = {MODULES.get(name, name): name for name in REQUIRES}
    missing = (getattr(error, "name", None) or "") if isinstance(error, ImportError) else ""
    if missing.split(".")[0] in packages:
        return packages[missing.split(".")[0]]
    frames = [
        (str(frame.f_globals.get("__name__", "")).split(".")[0], frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    frames = [frame for frame in frames if frame[0] not in ("importlib", "_frozen_importlib")]
    own = max((i for i, (module, _) in enumerate(frames) if module == PACKAGE), default=None)
    if own is None:
        return None
    below = frames[own + 1 :]
    # Code of a module runs while it is imported: vitlib's own, or that of a package it imports.
    imports_vitlib = (PACKAGE, "<module>") in frames
    if not imports_vitlib and not (below and below[0][1] == "<module>"):
        return None
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        lacking = error.obj.__name__.split(".")[0]
        if lacking in packages:
            return packages[lacking]
    if isinstance(error, SyntaxError) and error.filename:  # a damaged file
        folders = [part.removesuffix(".py") for part in Path(error.filename).parts]
        return next((packages[part] for part in reversed(folders) if part in packages), None)
    blamed = [m for m, code in below if m in packages and (imports_vitlib or code == "<module>")]
    return packages[blamed[-1]] if blamed else None


def import_extra(
    extra: str,
    package: str,
    purpose: str,
    module: str | None = None,
    kind: type[VitlibError] = ConfigError,
) -> ModuleType:
    """Import a module of a package that an extra installs.

    Args:
        extra: Name of the extra.
        package: Name of the package.
        purpose: Start of the message: what needs the package, such as "pictures need matplotlib".
        module: Name of the module; the package's own by default.
        kind: Class of the error.

    Returns:
        The module.

    Raises:
        VitlibError: As `kind`: the package is absent, too old or broken. The message says what
            mends it.
    """
    own = MODULES.get(package, package)
    requirement, command = _find_extra(extra, package)
    try:
        imported = import_module(module or own)
    except Exception as error:  # a broken package may raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name in (own, module or own)
        if not requirement.installed or missing:
            raise kind(f"{purpose}: {command}") from error
        if not requirement.problem:
            raise kind(f"{purpose}: {requirement.explain_failure(error)}") from error
    if requirement.problem:
        raise kind(f"{purpose}: {requirement.problem}: {command}")
    return imported


def check_extra(
    extra: str, package: str, purpose: str, kind: type[VitlibError] = ConfigError
) -> None:
    """Check that a package of an extra is installed and not too old, without importing it.

    Args:
        extra: Name of the extra.
        package: Name of the package.
        purpose: Start of the message, as for import_extra.
        kind: Class of the error.

    Raises:
        VitlibError: As `kind`: the package is absent or too old. The message says what mends it.
    """
    requirement, command = _find_extra(extra, package)
    if not requirement.installed:
        raise kind(f"{purpose}: {command}")
    if requirement.problem:
        raise kind(f"{purpose}: {requirement.problem}: {command}")


def _find_extra(extra: str, package: str) -> tuple[Requirement, str]:
    """Return what an extra needs of a package, and the command that installs the extra."""
    minimum = next((least for *key, least in _stated_extras() if key == [extra, package]), "")
    requirement = Requirement(package, minimum, extra, installed_version(package))
    return requirement, f"pip install 'vitlib[{extra}]'"
