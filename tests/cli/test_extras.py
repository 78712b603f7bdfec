"""Test the verbs without each extra: one line that names the extra, and nothing half-written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fixtures.command_line import Run, make_workplace
from paths import ROOT

TUNE = ("finetune", "photos", "-m", "demo", "-o", "out", "--max-steps", "1")
# Extra, the module that is absent, and a command that needs it.
USES = [
    ("plot", "matplotlib", ("classify", "a.jpg", "-m", "mine", "--plot", "out.png")),
    ("plot", "matplotlib", ("attend", "a.jpg", "-m", "mine", "-o", "out.png")),
    ("eval", "sklearn", ("evaluate", "mine", "photos", "-o", "out")),
    ("train", "yaml", (*TUNE, "-c", "settings.yaml")),
    ("tensorboard", "tensorboard", (*TUNE, "--tensorboard")),
    ("serve", "fastapi", ("serve", "mine")),
    ("serve", "uvicorn", ("serve", "mine")),
    ("parquet", "pyarrow", ("batch", "photos", "-m", "mine", "--format", "parquet", "-o", "out")),
    ("ray", "ray", ("batch", "photos", "-m", "mine", "--engine", "ray", "-o", "out")),
    ("export", "onnx", ("export", "mine", "-f", "onnx", "-o", "out.onnx")),
    ("openvino", "openvino", ("export", "mine", "-f", "openvino", "-o", "out")),
    ("mlflow", "mlflow", ("export", "mine", "-f", "mlflow", "-o", "out")),
    ("executorch", "executorch", ("export", "mine", "-f", "executorch", "-o", "out.pte")),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("workplace"))
    (folder / "settings.yaml").write_text("lr: 0.1\n")
    return folder


@pytest.mark.parametrize(("extra", "module", "arguments"), USES)
def test_verb_names_the_extra_that_it_lacks(
    run_cli: Run,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    extra: str,
    module: str,
    arguments: tuple[str, ...],
) -> None:
    loaded = [name for name in sys.modules if name.split(".")[0] == module]
    for name in {module, *loaded, *(["torch.utils.tensorboard"] if extra == "tensorboard" else [])}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(workplace)
    before = {*workplace.rglob("*")}
    code, out, err = run_cli(*arguments)
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, err
    assert lines[0].startswith("vitlib: error: ")
    assert lines[0].endswith(f"pip install 'vitlib[{extra}]'"), err
    assert {*workplace.rglob("*")} - before <= {workplace / "out"}


def test_every_extra_is_tested() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = {*re.findall(r"^([\w-]+) = ", table, re.MULTILINE)} - {"dev", "docs"}
    assert extras == {extra for extra, _, _ in USES}
