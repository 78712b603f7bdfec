"""The test that stands beside a vendored file: its logits, pinned, and against vitlib's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitlib.config import ViTConfig, config_to_json
from vitlib.config_parts import PARTS
from vitlib.vendor.layout import fit_line
from vitlib.vit import ViT

NUM_PINNED = 6

TEMPLATE = '''"""Tests that {name}.py gives the outputs of vitlib."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FILE = Path(__file__).with_name("{name}.py")
SIZES = {sizes}  # the size of the checkpoint{other}
# The first outputs of vitlib for the pixels of each size, in float32.
PINNED = {{
{pinned}
}}
# The model as vitlib describes it.
CONFIG = {{
{config}
}}


def load_vendored():
    """Import the file from where it stands, and load its weights."""
    spec = importlib.util.spec_from_file_location("vendored_{name}", FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load().float()


def pixels(height, width):
    """Compute the pixels of two images, (2, C, H, W) in -1..1, without a random generator."""
    count = 2 * {channels} * height * width
    numbers = torch.arange(count) * 7919 % 1009
    return (numbers / 504 - 1).reshape(2, {channels}, height, width)


def distance(a, b):
    """Return the largest difference, relative to the largest number."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("size", SIZES)
def test_outputs_are_the_pinned_ones(size):
    with torch.inference_mode():
        outputs = load_vendored()(pixels(*size))
    pinned = torch.tensor(PINNED[size])
    assert (outputs[0, : len(pinned)] - pinned).abs().max() < 1e-4 * outputs.abs().max()
    assert distance(outputs[0], outputs[1]) > 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_outputs_equal_those_of_vitlib(size):
    vitlib = pytest.importorskip("vitlib", reason="vitlib is not installed")
    model = vitlib.ViT(vitlib.ViTConfig(**CONFIG)).eval()
    model.load_state_dict(load_file(FILE.with_suffix(".safetensors")))
    with torch.inference_mode():
        assert distance(load_vendored()(pixels(*size)), model.float()(pixels(*size))) <= 2e-6
'''


def pixels(channels: int, height: int, width: int) -> Tensor:
    """Compute the pixels that the test pins outputs for.

    Args:
        channels: Channels of an image.
        height: Height in pixels.
        width: Width in pixels.

    Returns:
        Two images, (2, C, H, W) in -1..1. Integers give them, so that every machine has the same.
    """
    count = 2 * channels * height * width
    numbers = torch.arange(count, dtype=torch.int64, device="cpu") * 7919 % 1009
    return (numbers.float() / 504 - 1).reshape(2, channels, height, width)


def list_sizes(config: ViTConfig) -> list[tuple[int, int]]:
    """List the sizes of images that the test runs: the checkpoint's, and another one.

    Args:
        config: The model's config.

    Returns:
        Pixels, (height, width).
    """
    (height, width), (p, q) = config.image_size, config.patch_size
    return [(height, width), (height + p, width + 2 * q)]


def write_test(model: ViT, name: str) -> str:
    """Write the test of a vendored file.

    Args:
        model: The model that was written.
        name: Name of the file without its suffix.

    Returns:
        Source of the test.
    """
    config, sizes = model.config, list_sizes(model.config)
    pinned = []
    for size in sizes:
        with torch.inference_mode():
            outputs = model(pixels(config.in_channels, *size))[0, :NUM_PINNED]
        numbers = ", ".join(f"{number:.8g}" for number in outputs.tolist())
        pinned.append(f"    {size}: [{numbers}],")
    return TEMPLATE.format(
        name=name,
        sizes=f"[{', '.join(map(str, sizes))}]",
        other=", and another one",
        pinned="\n".join(pinned),
        config="\n".join(
            line
            for key, value in _changes(config).items()
            for line in fit_line(f"{_quote(key)}: {_quote(value)},", 1)
        ),
        channels=config.in_channels,
    )


def _changes(config: ViTConfig) -> dict[str, Any]:
    """Return the fields of a config that are not the usual ones, without labels."""
    usual, values = config_to_json(ViTConfig()), config_to_json(config)
    changes = {
        name: value
        for name, value in values.items()
        if name not in ("labels", "problem_type") and value != usual[name]
    }
    # Of a group, only the fields that are not its usual ones: True where all are.
    for name in changes.keys() & PARTS.keys():
        kind = PARTS[name][0]
        group = {key: getattr(kind(), key) for key in kind.__dataclass_fields__}
        entries = changes[name] or {}
        own = {key: value for key, value in entries.items() if value != group[key]}
        changes[name] = own or (True if entries else changes[name])
    return changes


def _quote(value: Any) -> str:
    """Write a value of JSON as Python with double quotes."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quote(k)}: {_quote(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_quote, value)) + "]"
    return repr(value)
