"""Test that a package which is absent, old or broken is named, and what mends it, in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import vitlib
from paths import ROOT
from vitlib.errors import ConfigError, InstallationError, SourceError
from vitlib.system import requirements
from vitlib.system.atomic import expand_home
from vitlib.system.requirements import (
    UNKNOWN,
    check_core,
    explain_import_error,
    explained_imports,
    import_extra,
    installed_version,
)


def fail_in(modules: list[str], code: str) -> Exception:
    """Return what code raises as that of the last module, each imported by the one before it."""
    for name in reversed(modules):
        code = f"exec(compile({code!r}, 'x', 'exec'), {{'__name__': {name!r}}})"
    with pytest.raises(Exception) as caught:  # noqa: PT011
        exec(code)
    assert isinstance(caught.value, Exception)
    return caught.value


@pytest.mark.parametrize(
    ("modules", "code", "package", "reason"),
    [
        (["vitlib.vit", "torch"], "raise ImportError('libtorch_cpu.so: cannot open')", "torch",
         "ImportError: libtorch_cpu.so: cannot open"),
        (["vitlib.vit", "torch"], "raise OSError('[WinError 126] shm.dll')", "torch",
         "OSError: [WinError 126] shm.dll"),
        (["vitlib.vit", "torch._ops"], "raise RuntimeError('another Python')", "torch",
         "RuntimeError: another Python"),
        (["vitlib.vit", "torch"], "import no_such_part", "torch",
         "ModuleNotFoundError: No module named 'no_such_part'"),
        (["vitlib.vit", "torch", "numpy"], "raise ImportError('in its source')", "numpy",
         "ImportError: in its source"),
        (["vitlib.vit"], "import torch; torch.no_such_name", "torch",
         "AttributeError: module 'torch' has no attribute 'no_such_name'"),
        (["vitlib.vit"], "compile('= 1', '/lib/site-packages/PIL/Image.py', 'exec')", "pillow",
         "SyntaxError: invalid syntax (Image.py, line 1)"),
        (["vitlib.cli", "click"], "raise OSError('x')", "click", "OSError: x"),
    ],
)  # fmt: skip
def test_import_that_fails_names_its_package(
    modules: list[str], code: str, package: str, reason: str
) -> None:
    explained = explain_import_error(fail_in(modules, code))
    version = metadata.version(package)
    assert str(explained) == (
        f"{package} {version} cannot be imported ({reason}): "
        f"pip install --force-reinstall {package}"
    )


@pytest.mark.parametrize(
    ("modules", "code"),
    [
        (["someone"], "import vitlib; vitlib.load('demo')(1)"),  # calls of torch, no import
        (["vitlib.vit"], "raise OSError('of vitlib')"),
        (["vitlib.vit", "matplotlib"], "raise OSError('of an extra')"),
        (["someone", "torch"], "import torch; torch.no_such_name()"),
    ],
)
def test_other_errors_are_left_alone(modules: list[str], code: str) -> None:
    assert explain_import_error(fail_in(modules, code)) is None


def test_numpy_that_torch_cannot_use_is_named() -> None:
    text = str(explain_import_error(RuntimeError("Numpy is not available")))
    assert text.endswith("do not fit each other: pip install --upgrade torch numpy")


def test_file_that_hides_a_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    text = str(explain_import_error(fail_in(["vitlib.vit", "torch"], "raise OSError('x')")))
    assert text.endswith(
        f"Python takes {tmp_path / 'torch.py'} for it: rename that, or run from another folder"
    )


def test_imports_of_a_function_are_explained() -> None:
    match = r"^safetensors .* cannot be imported"
    with pytest.raises(InstallationError, match=match), explained_imports():
        raise ImportError("no module", name="safetensors._rust")
    with pytest.raises(KeyError), explained_imports():
        raise KeyError("x")


def test_one_command_mends_all_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    check_core.cache_clear()
    versions = {"numpy": "", "pillow": "9.0", "tqdm": UNKNOWN}
    monkeypatch.setattr(requirements, "installed_version", lambda name: versions.get(name, "99"))
    with pytest.raises(InstallationError) as caught:
        check_core()
    assert str(caught.value) == (
        "numpy is not installed; pillow 9.0 is installed, 11.3 or later is needed: "
        "pip install 'numpy>=1.26' 'pillow>=11.3'"
    )


def test_package_without_metadata_is_left_to_its_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "an_empty_folder").mkdir()
    assert installed_version("torch") == UNKNOWN
    assert installed_version("pillow") == UNKNOWN
    assert installed_version("no-such-package") == ""
    assert installed_version("an_empty_folder") == ""


def test_extra_that_is_broken_is_not_called_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "yaml.py").write_text("raise ValueError('backend: no such')")
    monkeypatch.delitem(sys.modules, "yaml", raising=False)
    with pytest.raises(ConfigError) as caught:
        import_extra("plot", "pyyaml", "pictures need it")
    assert str(caught.value) == (
        f"pictures need it: pyyaml {metadata.version('pyyaml')} cannot be imported (ValueError: "
        f"backend: no such): Python takes {tmp_path / 'yaml.py'} for it: rename that, or run from "
        "another folder"
    )


def test_extra_that_is_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_stated_extras", lambda: (("train", "pyyaml", "99"),))
    with pytest.raises(SourceError) as caught:
        import_extra("train", "pyyaml", "a file needs it", kind=SourceError)
    assert str(caught.value) == (
        f"a file needs it: pyyaml {metadata.version('pyyaml')} is installed, 99 or later is "
        "needed: pip install 'vitlib[train]'"
    )
    assert import_extra("plot", "pyyaml", "it needs").__name__ == "yaml"


def run(code: list[str], *folders: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with folders before vitlib's on its path."""
    path = os.pathsep.join(map(str, [*folders, ROOT]))
    return subprocess.run(
        [sys.executable, *code],
        cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def write_stub(folder: Path, name: str, version: str, code: str) -> Path:
    """Write a package that stands before the real one of its name."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_errors_can_be_caught_with_an_old_torch(tmp_path: Path) -> None:
    stub = write_stub(tmp_path / "stub", "torch", "2.5.1", "__version__ = '2.5.1'")
    code = """
import vitlib
try:
    vitlib.Predictor.load("demo")
except vitlib.VitlibError as error:
    print(error)
"""
    done = run(["-c", code], stub, cwd=tmp_path)
    expected = "torch 2.5.1 is installed, 2.10 or later is needed: pip install 'torch>=2.10'\n"
    assert (done.stdout, done.stderr) == (expected, "")


def test_verbs_and_doctor_name_a_broken_torch(tmp_path: Path) -> None:
    stub = write_stub(tmp_path / "stub", "torch", "2.13.0", "raise OSError('no shm.dll')")
    line = (
        "vitlib: error: torch 2.13.0 cannot be imported (OSError: no shm.dll): "
        "pip install --force-reinstall torch\n"
    )
    verb = run(["-m", "vitlib", "info", "demo"], stub, cwd=tmp_path)
    assert (verb.returncode, verb.stdout, verb.stderr) == (1, "", line)
    doctor = run(["-m", "vitlib", "doctor"], stub, cwd=tmp_path)
    assert (doctor.returncode, doctor.stderr) == (1, line)
    assert "vitlib[eval]" in doctor.stdout


@pytest.mark.parametrize(
    ("version", "code", "problem"),
    [
        ("7.0", "", "click 7.0 is installed, 8.1 or later is needed: pip install 'click>=8.1'"),
        ("8.5.1", "raise KeyboardInterrupt", ""),
    ],
)
def test_command_line_without_its_click(
    tmp_path: Path, version: str, code: str, problem: str
) -> None:
    stub = write_stub(tmp_path / "stub", "click", version, code)
    done = run(["-m", "vitlib", "doctor"], stub, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", f"vitlib: error: {problem}\n" if problem else "")
    assert done.returncode == (1 if problem else 130)


def test_command_of_the_package_is_that_which_explains() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nvitlib = "vitlib.__main__:main"\n' in text


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps the folder of a process")
def test_deleted_folder_is_named_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = """
import os, sys
os.chdir("gone")
os.rmdir("../gone")
sys.argv = ["vitlib", "doctor"]
from vitlib.__main__ import main
main()
"""
    done = run(["-c", code], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "vitlib: error: the current folder cannot be used (No such file or directory): cd to "
        "another\n"
    )


def test_home_of_nobody_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert expand_home("~/x") == tmp_path / "x"
    assert expand_home(Path("~no-such-user/x")) == Path("~no-such-user/x")
    with pytest.raises(SourceError, match="no-such-user"):
        vitlib.load("~no-such-user/x/y.safetensors")
