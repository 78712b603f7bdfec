"""Test the built wheel and the source archive, as a user without the checkout has them.

`make test-wheel` runs this: it installs torch into new environments.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import vitlib
from paths import ROOT

pytestmark = pytest.mark.wheel
MAX_BYTES = 4_000_000
EXPECTED_OUTPUT = [
    *("0.96 shirt", "0.03 T-shirt or top", "(1, 96)", "torch.Size([1, 10])"),
    *("torch.Size([1, 50, 96])", "torch.Size([1, 4, 50, 50])"),
]


def run(command: Sequence[object], folder: Path, **environment: str) -> str:
    """Run a command in a folder without the checkout on its path; return what it prints."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder, env={**clean, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def make_venv(folder: Path, *packages: object) -> Path:
    """Make an environment with packages, on the versions that were tested."""
    run([sys.executable, "-m", "venv", folder], folder.parent)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "-c", ROOT / "constraints.txt", *packages], folder.parent)
    return python


def head_commit() -> str:
    """The commit of the checkout."""
    return run(["git", "rev-parse", "HEAD"], ROOT).strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the wheel and the source archive, built from a clone."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, source], folder)
    run(["git", "checkout", "--quiet", head_commit()], source)
    python = make_venv(folder / "build-venv", "build", "twine")
    run([python, "-m", "build", "--outdir", folder / "dist", source], folder)
    run([python, "-m", "twine", "check", "--strict", *(folder / "dist").iterdir()], folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel alone."""
    (wheel,) = built.glob("*.whl")
    return make_venv(tmp_path_factory.mktemp("user") / "venv", "torch", wheel)


def test_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size <= MAX_BYTES
    names = zipfile.ZipFile(wheel).namelist()
    tracked = subprocess.run(
        ["git", "ls-files", "vitlib"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    info = f"vitlib-{vitlib.__version__}.dist-info/"
    expected = ({*tracked} - {""}) | {"vitlib/commit.txt"}
    assert {name for name in names if not name.startswith(info)} == expected
    assert {"vitlib/py.typed", "vitlib/assets/demo/model.safetensors"} <= {*names}
    assert info + "licenses/LICENSE" in names


def test_source_archive_builds_without_git(built: Path, tmp_path: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        assert not [name for name in file.getnames() if "/.git/" in name]
    python = make_venv(tmp_path / "venv", "build")
    run([python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, archive], tmp_path)
    (again,) = tmp_path.glob("*.whl")
    (wheel,) = built.glob("*.whl")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()
    commit = zipfile.ZipFile(again).read("vitlib/commit.txt").decode().strip()
    assert commit == head_commit()[:12]


def test_archive_of_another_repository_states_no_commit(built: Path, tmp_path: Path) -> None:
    """Sources without git and without what the build wrote: an archive of a web page."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("vitlib-*")
    (source / "vitlib" / "commit.txt").unlink()
    python = make_venv(tmp_path / "venv", "build")
    run([python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, source], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert "vitlib/commit.txt" not in zipfile.ZipFile(wheel).namelist()


def test_readme_prints_what_it_shows_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    where = run([installed, "-c", "import vitlib; print(vitlib.__file__)"], tmp_path).strip()
    assert not Path(where).is_relative_to(ROOT)
    # The README stands beside the checkout; a user has the sample where the package is.
    code = code.replace("vitlib/assets", str(Path(where).parent / "assets"))
    assert run([installed, "-W", "error", "-c", code], tmp_path).splitlines() == EXPECTED_OUTPUT


def test_command_line_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    vitlib_command = installed.with_name("vitlib")
    version = f"vitlib, version {vitlib.__version__} (commit {head_commit()[:12]})\n"
    assert run([vitlib_command, "--version"], tmp_path) == version
    assert "vitlib can work here." in run([vitlib_command, "doctor"], tmp_path)
    sample = next(installed.parents[1].rglob("assets/demo/samples/shirt.png"))
    assert "shirt" in run([vitlib_command, "classify", "-m", "demo", sample], tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_installs(installed: Path, tmp_path: Path, shell: str) -> None:
    """The line of docs/command-line.md: the script is valid, and completes verbs and options."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert f"_VITLIB_COMPLETE={shell}_source vitlib" in page
    vitlib_command = installed.with_name("vitlib")
    script = tmp_path / "completion"
    script.write_text(run([vitlib_command], tmp_path, _VITLIB_COMPLETE=f"{shell}_source"))
    assert "_VITLIB_COMPLETE" in script.read_text()
    if shell == "bash":
        run(["bash", "-n", script], tmp_path)
    words = {"COMP_WORDS": "vitlib clas", "COMP_CWORD": "1" if shell != "fish" else "clas"}
    completed = run([vitlib_command], tmp_path, _VITLIB_COMPLETE=f"{shell}_complete", **words)
    assert "classify" in completed
    assert "Traceback" not in completed


def test_pipx_runs_the_wheel(built: Path, tmp_path: Path) -> None:
    """As `pipx run vitlib`: an environment of its own for one command, which then works alone."""
    (wheel,) = built.glob("*.whl")
    python = make_venv(tmp_path / "pipx-venv", "pipx")
    folders = {"PIPX_HOME": str(tmp_path / "pipx"), "PIPX_BIN_DIR": str(tmp_path / "bin")}
    constraints = f"--constraint={ROOT / 'constraints.txt'}"
    command = [python, "-m", "pipx", "install", "--quiet", f"--pip-args={constraints}", wheel]
    run([*command, "--preinstall", "torch"], tmp_path, **folders)
    sample = ROOT / "vitlib/assets/demo/samples/shirt.png"
    out = run([tmp_path / "bin" / "vitlib", "classify", "-m", "demo", sample], tmp_path)
    assert "shirt" in out


def test_verbs_name_the_extra_that_they_lack(installed: Path, tmp_path: Path) -> None:
    """Without extras: one line with the command, and no traceback."""
    sample = next(installed.parents[1].rglob("assets/demo/samples/shirt.png"))
    for label in ("shirt", "coat"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "photos" / label / f"{number}.png").write_bytes(sample.read_bytes())
    verbs = {
        "plot": ("classify", "-m", "demo", sample, "--plot", "x.png"),
        "eval": ("evaluate", "demo", "photos", "-o", "report"),
        "serve": ("serve", "demo"),
        "export": ("export", "demo", "-f", "onnx", "-o", "vit.onnx"),
    }
    for extra, arguments in verbs.items():
        command = [installed.with_name("vitlib"), *arguments]
        result = subprocess.run(
            [str(part) for part in command], cwd=tmp_path, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        assert result.returncode == 1, (extra, result.stderr)
        assert f"pip install 'vitlib[{extra}]'" in result.stderr, (extra, result.stderr)
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_types_are_seen_by_checkers(installed: Path, tmp_path: Path, checker: str) -> None:
    script = tmp_path / "script.py"
    script.write_text("import vitlib\nwrong: int = vitlib.Predictor.load('demo')\n")
    run([installed, "-m", "pip", "install", "--quiet", checker], tmp_path)
    result = subprocess.run(
        [installed, "-m", checker, script], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "Predictor" in result.stdout, result.stdout + result.stderr
    assert "py.typed" not in result.stdout
