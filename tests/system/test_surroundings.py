"""Test the command line where users are: other locales and consoles, another user, no writing.

Each test starts one process that runs several verbs, as a shell in those surroundings would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vitlib
from paths import ROOT

LABELS = ("Käse", "猫")
NO_ONE = 54321  # a user without a name, a home and a group, as containers have
# Runs command lines; an encoding that vitlib leaves to the locale is an error.
SCRIPT = """
import json, os, sys, traceback, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="vitlib")
from vitlib.cli import main
statuses = []
for line in json.loads(sys.argv[1]):
    sys.argv = ["vitlib", *(os.fsdecode(word.encode()) for word in line)]  # as a shell's bytes
    try:
        main()
    except SystemExit as stop:
        statuses.append(stop.code)
    except BaseException:
        traceback.print_exc()
        statuses.append("raised")
with open("statuses.json", "w", encoding="utf-8") as file:
    json.dump(statuses, file)
"""
LINES = (
    ("--version",),
    ("--help",),
    ("doctor",),
    ("list", "*vit_tiny*"),
    ("info", "mine"),
    ("classify", "-m", "mine", "ü猫.png"),
    ("classify", "-m", "mine", "ü猫.png", "--json"),
    ("attend", "-m", "mine", "ü猫.png", "-o", "map.png"),
    ("embed", "-m", "mine", "ü猫.png", "-o", "vectors.npy"),
    ("batch", "photos", "-m", "mine", "--format", "csv", "-o", "rows"),
    ("finetune", "photos", "-m", "demo", "-o", "tuned", "--max-steps", "1"),
    ("evaluate", "tuned", "photos", "-o", "report"),
    ("convert", "mine", "converted", "--layout", "timm"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with photos of two labels that few code pages hold, and a model of them."""
    sample = ROOT / "vitlib/assets/demo/samples/shirt.png"
    for label in LABELS:
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(3):
            image = Image.new("RGB", (40, 30), (90 * number, 80, 200 * (label == LABELS[0])))
            image.save(tmp_path / "photos" / label / f"ü{number}.png")
    shutil.copy(sample, tmp_path / "ü猫.png")
    model = vitlib.load("demo", num_classes=2)
    model.config = replace(model.config, labels=LABELS)
    vitlib.save(model, tmp_path / "mine")
    return tmp_path


def run_lines(
    folder: Path, lines: Sequence[Sequence[str]], prefix: Sequence[str] = (), **environment: str
) -> tuple[list[Any], bytes, bytes]:
    """Run command lines in a process; return their exit statuses, stdout and stderr."""
    clean = {k: v for k, v in os.environ.items() if k not in ("LANG", "LANGUAGE", "PYTHONUTF8")}
    # A verb of a test runner that listens for a locale of its own would hide that of the test.
    clean = {k: v for k, v in clean.items() if not k.startswith("LC_")}
    clean |= {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [*prefix, sys.executable, "-c", SCRIPT, json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, check=False)
    path = folder / "statuses.json"
    assert path.exists(), done.stderr.decode("utf-8", "replace")
    return json.loads(path.read_text(encoding="utf-8")), done.stdout, done.stderr


@pytest.mark.parametrize(
    ("encoding", "environment"),
    [
        ("utf-8", {"LC_ALL": "C"}),  # Python's UTF-8 mode
        ("utf-8", {"LC_ALL": "C.UTF-8"}),
        ("cp1252", {"PYTHONIOENCODING": "cp1252", "LC_ALL": "C.UTF-8"}),
        ("ascii", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}),
    ],
)
def test_verbs_run_in_any_locale(folder: Path, encoding: str, environment: dict[str, str]) -> None:
    statuses, out, err = run_lines(folder, LINES, **environment)
    assert statuses == [0] * len(LINES), err.decode(encoding, "replace")
    text = out.decode(encoding)
    assert "Traceback" not in err.decode(encoding)
    # What the console cannot show is an escape, in JSON and in text; the files have all of it.
    assert ("Käse" if encoding != "ascii" else "K\\xe4se") in text
    assert ("猫" if encoding == "utf-8" else "\\u732b") in text
    config = json.loads((folder / "tuned" / "config.json").read_text(encoding="utf-8"))
    assert sorted(config["id2label"].values()) == sorted(LABELS)
    rows = "".join(p.read_text(encoding="utf-8") for p in (folder / "rows").rglob("*.csv"))
    assert "猫/ü0.png" in rows
    assert "Käse" in (folder / "report" / "report.html").read_text(encoding="utf-8")


def test_locale_without_utf8_refuses_labels_that_it_cannot_read(folder: Path) -> None:
    """Python then has no text for the names of the folders, which would be labels."""
    lines = [("classify", "-m", "mine", "ü猫.png"), ("finetune", "photos", "-m", "demo", "-o", "x")]
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    statuses, out, err = run_lines(folder, lines, **environment)
    assert statuses == [0, 1], err.decode()
    assert "\\u732b" in out.decode("ascii")
    assert "has characters that are not text" in err.decode("ascii").splitlines()[-1]


def other_user() -> list[str]:
    """Return the prefix of a command that runs it as a user who may read everything, not write."""
    if os.name != "posix" or os.geteuid() != 0:
        return []
    assert shutil.which("setpriv"), "expected util-linux, whose setpriv changes the user"
    user = f"--reuid={NO_ONE}", f"--regid={NO_ONE}", "--clear-groups"
    # Python may lie in a folder of root's; what root alone may write stays so.
    capability = "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"
    return ["setpriv", *user, *capability]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
def test_another_user_with_a_read_only_package(folder: Path, tmp_path: Path) -> None:
    """Neither the package, nor the home, nor the cache of the hub can be written."""
    package = tmp_path / "installed"
    shutil.copytree(ROOT / "vitlib", package / "vitlib", ignore=shutil.ignore_patterns("__pyc*"))
    home = tmp_path / "home"
    home.mkdir()
    for path in (*package.rglob("*"), package, home):
        path.chmod(path.stat().st_mode & ~0o222)
    if os.geteuid() == 0:  # root's files, in a folder of the other user
        os.chown(folder, NO_ONE, NO_ONE)
        # The folders of pytest, and of its workers (popen-gw0), are closed to others.
        for path in [p for p in folder.parents if p.name.startswith(("pytest-", "popen-"))]:
            path.chmod(0o755)
    before = sorted(package.rglob("*"))
    statuses, out, err = run_lines(
        folder, LINES, other_user(), PYTHONPATH=str(package), HOME=str(home), LC_ALL="C.UTF-8"
    )
    assert statuses == [0] * len(LINES), err.decode()
    assert "Traceback" not in err.decode()
    assert "vitlib can work here." in out.decode()
    assert "cannot be written: hub ids need HF_HOME=" in out.decode()
    assert sorted(package.rglob("*")) == before
    assert not [*home.iterdir()]
