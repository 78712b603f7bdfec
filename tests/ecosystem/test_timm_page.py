"""The left column of docs/coming-from-timm.md, run by timm and compared with the right column."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fixtures import staged_models
from fixtures.doc_tables import RunCli, compare, read_page, run_cell, run_code, simplify

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default")]


def create_model(create: Callable[..., nn.Module], weights: Path, name: str, **options: Any) -> Any:
    """Make a model of timm whose published weights lie in a file."""
    if options.get("pretrained") and not name.startswith("local-dir:"):
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    return create(name, **options)


def test_left_column_equals_right_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    import timm

    folders = [tmp_path / name for name in ("left", "right")]
    for folder in folders:
        folder.mkdir()
        staged_models.stage_photos(folder)
        staged_models.stage_timm(folder)
    patched = partial(create_model, timm.create_model, folders[0] / "vit_tiny.safetensors")
    monkeypatch.setattr(timm, "create_model", patched)
    names: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    compared = 0
    try:
        for item in read_page("coming-from-timm"):
            values = []
            for folder, own, side in zip(folders, names, (0, 1), strict=True):
                monkeypatch.chdir(folder)
                if isinstance(item, str):
                    run_code(item, own, "page")
                elif not item[side][0].startswith("python "):
                    where = f"coming-from-timm.md:{item.line}"
                    values.append(simplify(run_cell(item[side], own, where, run_cli)))
            if len(values) == 2:
                compared += compare(values[1], values[0], where) > 0
    finally:
        timm.layers.set_fused_attn(True)
    assert compared >= 30
