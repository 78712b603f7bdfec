"""Models and photos that several tests use. transformers is the oracle, here, never in vitlib."""

from __future__ import annotations

import os

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paths import SHARED

with warnings.catch_warnings():  # what others do on import is not what vitlib warns of
    warnings.simplefilter("ignore")
    import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def _shared_folder(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="session")
def deit_tiny() -> Path:
    return _shared_folder("models/deit-tiny-patch16-224")


@pytest.fixture(scope="session")
def dinov2_small() -> Path:
    return _shared_folder("models/dinov2-small")


@pytest.fixture(scope="session")
def two_cats() -> Path:
    return _shared_folder("data/photos/two_cats.png")


@pytest.fixture(scope="session")
def shared_configs() -> Path:
    return _shared_folder("configs")


@pytest.fixture(scope="session")
def fridge_photos() -> list[Path]:
    return sorted(_shared_folder("data/fridge_multilabel/images").glob("*.jpg"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small photo-like JPEG, for tests that need no real one."""
    from PIL import Image

    y, x = np.mgrid[0:60, 0:80]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=-1)
    path = tmp_path / "photo.jpg"
    Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(path, quality=90)
    return path


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line as a person's shell runs it: arguments -> (exit status, stdout, stderr)."""
    from vitlib.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitlib", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch compute with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler on CPUs that takes no time: each program is the function it was made from."""
    from contextlib import nullcontext

    monkeypatch.setattr("vitlib.fast.compiled.trace_whole", lambda function: function)
    monkeypatch.setattr("vitlib.fast.compiled.compiler_settings", nullcontext)
    monkeypatch.setattr("vitlib.fast.compiled.measure_gain", lambda *_: 2.0)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from fixtures.browser import start_chromium

    with start_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def demo_server() -> Iterator[Any]:
    """A server of the demo model with the limits that `vitlib serve` has by itself."""
    from fixtures.server import Server

    with Server() as running:
        yield running


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)
