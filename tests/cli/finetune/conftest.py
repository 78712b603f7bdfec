"""Photos, a model, and the verb with all its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.finetune_runs import QUICK, Run, draw_photos
from vitlib import ImageProcessor, ViT, ViTConfig, save


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw_photos(tmp_path / "data")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    cfg = ViTConfig(image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    half = (0.5,) * 3
    rule = ImageProcessor(shortest_edge=18, crop_size=(16, 16), image_mean=half, image_std=half)
    save(ViT(cfg), tmp_path / "model", image_processor=rule)
    return tmp_path / "model"


@pytest.fixture
def multi_label_csv(data: Path) -> Path:
    """Folder with a labels.csv of any number of labels per photo."""
    rows = ["filename,labels"]
    for number in range(8):
        rows += [f"dark/{number}.png,{'night' if number % 2 else ''}"]
        rows += [f"light/{number}.png,{'day sky' if number % 3 else 'sky'}"]
    (data / "labels.csv").write_text("\n".join(rows) + "\n")
    return data


@pytest.fixture
def train(run_cli: Run, data: Path, model: Path, tmp_path: Path) -> Run:
    """Function that runs the verb with a model, a set and few steps."""

    def run(*options: object, data: object = data, out: object = None) -> tuple[int, str, str]:
        source = () if "--from-scratch" in options else ("--model", model)
        out = out or tmp_path / "out"
        return run_cli("finetune", data, "--out", out, *source, *QUICK, *options)

    return run


@pytest.fixture
def run_cli(run_cli: Run) -> Run:
    """The command line without the lines of evaluations and of waits on a slow machine.

    Tests of their own read both.
    """

    def run(*arguments: object) -> tuple[int, str, str]:
        status, out, err = run_cli(*arguments)
        lines = err.splitlines(keepends=True)
        others = [s for s in lines if not s.startswith("epoch ") and not s.endswith(" ...\n")]
        return status, out, "".join(others)

    return run
