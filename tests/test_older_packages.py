"""Test what the oldest torch and Pillow lack, on newer ones without it: `make test-lowest` is slow.

Each test takes away what a newer version added, or gives what an older one returned.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules import module as torch_module

from fixtures.families import pixels, tiny
from vitlib.fast.module_swap import has_global_hooks
from vitlib.image.decode_limits.child import set_raw_mode
from vitlib.image.deep_files import _raw_mode


def test_hooks_of_every_module_are_found_by_torch_2_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch_module, "_has_any_global_hook", raising=False)  # newer than 2.6
    assert not has_global_hooks()
    hooks = (
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    )
    for register in hooks:
        handle: Any = register(lambda *_: None)
        assert has_global_hooks()
        handle.remove()
    assert not has_global_hooks()


def test_relative_positions_run_in_torch_2_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "is_exporting", raising=False)  # newer than 2.6
    with torch.inference_mode():
        assert tiny("beit")(pixels(1)).isfinite().all()


def test_derived_numbers_of_a_config_are_seen_by_the_compiler_of_torch_2_6() -> None:
    """It takes a slot of a parent class for no constant."""
    config = tiny("dinov2").config
    slots = {name for kind in type(config).__mro__[1:] for name in vars(kind).get("__slots__", ())}
    assert "num_prefix_tokens" not in slots


@pytest.mark.parametrize("raw_mode", ["RGB;16B", "RGB"])
def test_tiles_of_pillow_10_are_plain_tuples(raw_mode: str) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "PNG")
    image: Any = Image.open(file)
    image.tile = [tuple(tile) for tile in image.tile]
    assert _raw_mode(image) == ("RGB", "zip")
    set_raw_mode(image, raw_mode)
    assert _raw_mode(image) == (raw_mode, "zip")
