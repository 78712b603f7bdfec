"""Tests that the code of README and tour runs, and that docs agree with the repository."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import vitlib.fast
from paths import ROOT
from vitlib.fast.cpu import kernel_plan
from vitlib.train.config import ALIASES

README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
HUB_ID = "google/vit-base-patch16-224"


def blocks(page: str, language: str) -> list[str]:
    """List the code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


@pytest.fixture
def here(
    deit_tiny: Path, two_cats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Make a folder with cat.jpg and two small sets; DeiT-tiny replaces the hub's model."""
    shutil.copy(two_cats, tmp_path / "cat.jpg")
    for folder, count in (("photos", 5), ("more-photos", 2)):
        for level, label in enumerate(("dark", "light")):
            (tmp_path / folder / label).mkdir(parents=True)
            for number in range(count):
                photo = Image.new("RGB", (40, 30), (200 * level + 5 * number,) * 3)
                photo.save(tmp_path / folder / label / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return lambda code: code.replace(HUB_ID, str(deit_tiny))


def test_readme_python_prints_its_comments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    [code] = blocks(README, "python")
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {})
    expected = ["0.96 shirt", "0.03 T-shirt or top", "(1, 96)", "torch.Size([1, 10])"]
    expected += ["torch.Size([1, 50, 96])", "torch.Size([1, 4, 50, 50])"]
    assert capsys.readouterr().out.splitlines() == expected
    for line in expected:
        assert line in code


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 100


def test_tour_python_runs(here: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    snippets = blocks(TOUR, "python")
    assert len(snippets) == 3
    for code in snippets:
        if kernel_plan("int8") is None:  # int8 needs a CPU with VNNI
            code = code.replace('"int8", calibrate=["cat.jpg"] * 2', '"bf16"')
        exec(compile(here(code), "tour.md", "exec"), names)
    assert "Prediction(label='tabby, tabby cat', score=0.362" in capsys.readouterr().out
    assert names["vectors"].shape == (2, 192)
    assert names["scores"].shape == (1, 1000)
    assert names["logits"].shape == (2, 10)
    assert names["tokens"].shape == (2, 1 + 196, 192)
    assert [x.shape for x in names["maps"]] == [(2, 3, 197, 197)]
    assert [x.shape for x in names["feats"]] == [(2, 192, 14, 14)] * 3
    assert names["model"].num_classes == 10
    assert torch.allclose(names["fast"](names["pixels"]), names["logits"], atol=1e-4)
    assert vitlib.fast.load("small").precision == names["small"].precision
    assert Path("out/model.safetensors").exists()


def test_tour_shell_runs(
    here: Callable[[str], str], run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    pages = (README, TOUR)
    shell = [block for page in pages for block in blocks(page, "sh")]
    lines = [line for block in shell for line in block.strip().splitlines()]
    commands = [line for line in lines if line.startswith("vitlib ")]
    assert len(commands) == 15
    for line in commands:
        arguments = shlex.split(here(line), comments=True)[1:]
        if (
            arguments[0] in ("classify", "embed", "attend", "similar")
            and "--model" not in arguments
        ):
            arguments += ["--model", here(HUB_ID)]  # else the default model would be downloaded
        if arguments[0] == "bench":
            arguments = ["bench", "--size", "Ti/16", "--rounds", "1", "--batch-size", "1"]
        status, out, err = run_cli(*arguments)
        # A command that takes seconds, as on a busy machine, says what it does.
        life = ("epoch ", "reading photos", "loading")
        notes = [r for r in err.splitlines() if not (r.startswith(life) or r.endswith(" ..."))]
        assert (status, notes) == (0, []), line
        assert out
    assert vitlib.load("mine").config.labels == ("dark", "light")
    assert Path("report/report.html").is_file()
    for line in lines:
        if line.startswith("make "):
            target = line.split()[1]
            done = subprocess.run(
                ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
            )
            assert ".venv" in done.stdout
    assert {line.split()[0] for line in lines} == {"make", "pip", "vitlib"}


def test_file_map_lists_all_modules() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(vitlib/[\w./]+)` \|", text, flags=re.MULTILINE)
    package = ROOT / "vitlib"
    expected = {f"vitlib/{p.name}" for p in package.glob("*.py") if not p.name.startswith("__")}
    expected |= {f"vitlib/{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert set(rows) == expected


def test_numerics_names_existing_tests() -> None:
    text = (ROOT / "docs/numerics.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)


def test_finetuning_documents_all_aliases() -> None:
    text = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8")
    for alias, name in ALIASES.items():
        assert any(f"`{alias}`" in line and f"`{name}`" in line for line in text.splitlines()), (
            alias
        )


def test_ci_runs_makefile() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()
