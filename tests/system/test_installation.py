"""Test how broken installations are described, by pretending them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import vitlib
from paths import ROOT
from vitlib.errors import InstallationError
from vitlib.system import installation, requirements
from vitlib.system.installation import examine
from vitlib.system.requirements import check_core, parse_version

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def forget_check() -> Iterator[None]:
    check_core.cache_clear()
    yield
    check_core.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that packages have other versions; None for absent ones."""
    original, has_module = metadata.version, requirements.has_module
    packages = [name.replace("_", "-") for name, value in versions.items() if value is None]
    absent = {requirements.MODULES.get(name, name) for name in packages}

    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in versions:
            return original(name)
        value = versions[key]
        if value is None:
            raise metadata.PackageNotFoundError(name)
        return value

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(
        requirements, "has_module", lambda name: name not in absent and has_module(name)
    )


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("2.6", "2.13.0+cpu"),
        ("2.6", "2.10"),
        ("1.26", "2"),
        ("10.1", "10.1.1"),
        ("2.5.9", "2.6rc1"),
    ],
)
def test_versions_are_compared_by_number(lower: str, higher: str) -> None:
    assert parse_version(lower) < parse_version(higher)


def test_equal_versions_are_not_too_old() -> None:
    assert parse_version("2.6") == parse_version("2.6.0") == parse_version("2.6.0+cu124")


def test_needs_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needs = text.split("\ndependencies = [\n")[1].split("\n]")[0]
    assert dict(re.findall(r'"([\w-]+)>=([0-9.]+)",', needs)) == vitlib.REQUIRES
    assert len(needs.splitlines()) == len(vitlib.REQUIRES)


def test_whole_installation_has_no_problem(run_cli: Run) -> None:
    code, out, err = run_cli("doctor")
    assert (code, err) == (0, "")
    # PyPI's torch calls itself 2.6.0+cu124, and its metadata says 2.6.0.
    assert f"torch             {metadata.version('torch')}" in out
    assert out.rstrip().endswith("vitlib can work here.")
    code, out, _ = run_cli("doctor", "--json")
    content = json.loads(out)
    assert content["problems"] == []
    assert content["versions"]["numpy"] == np.__version__
    assert content["extras"]["eval"] == "installed"


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        ({"torch": "2.1.0"}, "torch 2.1.0 is installed, 2.10 or later is needed: "
                             "pip install 'torch>=2.10'"),
        ({"torch": None}, "torch is not installed: pip install 'torch>=2.10'"),
        ({"pillow": "9.0"}, "pillow 9.0 is installed, 11.3 or later is needed: "
                            "pip install 'pillow>=11.3'"),
        ({"numpy": None}, "numpy is not installed: pip install 'numpy>=1.26'"),
    ],
)  # fmt: skip
def test_doctor_names_what_is_absent_or_old(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None], problem: str
) -> None:
    pretend(monkeypatch, **versions)
    code, _, err = run_cli("doctor")
    assert code == 1
    assert err == f"vitlib: error: {problem}\n"


def test_extra_that_is_absent_is_no_problem(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, scikit_learn=None)
    code, out, _ = run_cli("doctor")
    assert code == 0
    assert "scikit-learn is not installed: pip install 'vitlib[eval]'" in out


@pytest.mark.parametrize(
    "arguments", [("classify", "-m", "demo", "x.png"), ("info", "demo"), ("list",)]
)
def test_verbs_refuse_an_old_torch(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    pretend(monkeypatch, torch="1.13.1")
    code, _, err = run_cli(*arguments)
    assert code == 1
    assert err.startswith("vitlib: error: torch 1.13.1 is installed, 2.10 or later is needed")
    assert run_cli(arguments[0], "--help")[0] == 0


def test_public_names_refuse_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="1.13.1")
    monkeypatch.setattr(torch, "__version__", "1.13.1+cu117")
    monkeypatch.delitem(vars(vitlib), "load", raising=False)
    with pytest.raises(InstallationError, match=r"torch 1\.13\.1\+cu117 is installed"):
        _ = vitlib.load
    assert issubclass(vitlib.errors.VitlibError, Exception)


def break_import(monkeypatch: pytest.MonkeyPatch, broken: str, error: Exception | None) -> None:
    """Let a module raise an error when the doctor imports it; None gives an empty folder."""
    original = installation.import_module

    def import_module(name: str) -> ModuleType:
        if name == broken and error is not None:
            raise error
        return ModuleType(name) if name == broken else original(name)

    monkeypatch.setattr(installation, "import_module", import_module)


@pytest.mark.parametrize(
    ("module", "error", "reason"),
    [
        ("numpy", ImportError("no .so"), "ImportError: no .so"),
        ("torch", None, "ImportError: its folder has no code"),
        ("torch", OSError("shm.dll\nmore"), "OSError: shm.dll"),
    ],
)
def test_doctor_reports_all_beside_what_is_broken(
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    error: Exception | None,
    reason: str,
) -> None:
    break_import(monkeypatch, module, error)
    code, out, err = run_cli("doctor")
    version = metadata.version(module)
    assert (code, err) == (
        1,
        f"vitlib: error: {module} {version} cannot be imported ({reason}): "
        f"pip install --force-reinstall {module}\n",
    )
    assert "vitlib[eval]" in out


def test_doctor_names_a_torch_of_two_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise AttributeError("no get_cpu_capability")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", fail)
    (problem,) = examine().problems
    assert problem == (
        f"torch {torch.__version__} does not work (AttributeError: no get_cpu_capability): "
        "pip install --force-reinstall torch"
    )


def test_doctor_of_files_that_are_not_installed(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name == "vitlib":
            raise metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setattr(requirements, "_stated_extras", tuple)
    code, out, err = run_cli("doctor")
    assert code == 1
    assert err == "vitlib: error: vitlib runs without being installed: pip install .\n"
    assert f"numpy             {np.__version__}" in out


def test_doctor_notes_another_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vitlib, "__version__", "0.0.9")
    found = examine()
    assert found.versions["vitlib"] == "0.0.9"
    assert f"and 0.0.9 of {Path(vitlib.__file__).parent} runs" in found.notes[0]
    assert found.problems == ()
    archive = tmp_path / "vitlib.zip"
    (problem,) = installation._examine_copies(archive / "vitlib", [])
    assert problem.startswith(f"vitlib runs from an archive, {archive}, where its tables")


def test_numpy_that_does_not_fit_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch, "from_numpy", fail)
    (problem,) = examine().problems
    assert "do not fit each other (Numpy is not available): pip install --upgrade" in problem


def test_cpu_without_avx2_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(installation.platform, "machine", lambda: "x86_64")
    assert any("no AVX2" in note for note in examine().notes)


def test_cache_that_cannot_be_written_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.os, "access", lambda *_: False)
    assert any("cannot be written: hub ids need HF_HOME=" in note for note in examine().notes)


BROKEN = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ImportError({message!r}, name=name)
sys.meta_path.insert(0, Broken())
"""


USES = {
    "python": """
import vitlib
try:
    vitlib.ImageProcessor
except vitlib.VitlibError as error:
    sys.exit(str(error))
""",
    "cli": """
from vitlib.cli import main
sys.argv = ["vitlib", "classify", "-m", "demo", "x.png"]
main()
""",
}


@pytest.mark.parametrize("use", USES)
def test_package_that_cannot_be_imported_is_one_line(tmp_path: Path, use: str) -> None:
    (tmp_path / "x.png").write_bytes((ROOT / "docs/gallery/labels.jpg").read_bytes())
    code = BROKEN.format(name="PIL", message="libjpeg.so: cannot open shared object file")
    result = subprocess.run(
        [sys.executable, "-c", code + USES[use]],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert (
        f"pillow {metadata.version('pillow')} cannot be imported (ImportError: libjpeg.so: cannot "
        "open shared object file): pip install --force-reinstall pillow" in result.stderr
    )


def test_import_error_of_another_package_is_left_alone() -> None:
    assert requirements.explain_import_error(ImportError("x", name="somebody_else")) is None
    assert requirements.explain_import_error(ImportError("x")) is None
    assert requirements.explain_import_error(AttributeError("x")) is None
