"""Test the steps of examples/serve/Containerfile by running them in folders of this machine.

No image is built: the base is this Python. What is copied, installed and started is the file's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures.containerfile import read_steps
from paths import ROOT

pytestmark = pytest.mark.wheel


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_steps_build_a_server_that_becomes_healthy(tmp_path: Path) -> None:
    source, target, port = tmp_path / "src", tmp_path / "venv", str(free_port())
    # torch of constraints.txt from wherever pip finds it; another user is for root to make.
    steps = read_steps(ROOT / "examples" / "serve" / "Containerfile", TORCH_FROM="")
    source.mkdir()
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    for step in steps:
        if step.instruction == "COPY":
            *names, folder = shlex.split(step.text)
            for name in names:
                if (ROOT / name).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / name, source / folder, ignore=ignore)
                else:
                    shutil.copy(ROOT / name, source / folder)
        elif step.instruction == "RUN":
            commands = step.text.replace("/opt/vitlib", str(target)).split("&&")
            command = "&&".join(c for c in commands if "useradd" not in c)
            subprocess.run(command, shell=True, cwd=source, env=clean, check=True)
    clean["PATH"] = f"{target / 'bin'}{os.pathsep}{clean['PATH']}"
    clean["HF_HUB_OFFLINE"] = "1"
    model = shutil.copytree(ROOT / "vitlib" / "assets" / "demo", tmp_path / "model")
    entry = [word.replace("/model", str(model)) for word in steps[-1].words()]
    (health,) = [step for step in steps if step.instruction == "HEALTHCHECK"]
    check = [word.replace(":8000", f":{port}") for word in health.words()]
    command = [*entry, "--port", port]
    with subprocess.Popen(command, cwd=tmp_path, env=clean) as server:
        try:
            for _ in range(60):
                done = subprocess.run(
                    check, cwd=tmp_path, env=clean, capture_output=True, check=False
                )
                if done.returncode == 0:
                    break
                assert server.poll() is None
                time.sleep(1)
            assert done.returncode == 0, done.stderr
        finally:
            server.terminate()
        assert server.wait(timeout=60) == 0
