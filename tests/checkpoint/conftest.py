"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures import references


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A tiny classifier saved by transformers."""
    references.save_model("vit", tmp_path / "vit")
    return tmp_path / "vit"
