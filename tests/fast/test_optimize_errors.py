"""What optimize() and what it gives refuse: one line each, with what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitlib
from fast.test_optimize import has_int8, one_thread, pixels, tiny  # noqa: F401
from vitlib.errors import ConfigError, ImageError, VitlibError
from vitlib.fast import cpu
from vitlib.fast.cpu import Machine


def refused(call: Callable[[], object], kind: type[VitlibError], *words: str) -> None:
    """The call raises the kind, on one line of a readable length, and it holds all the words."""
    with pytest.raises(VitlibError) as caught:
        call()
    said = str(caught.value)
    assert type(caught.value) is kind, said
    assert "\n" not in said
    assert 20 < len(said) < 400
    for word in words:
        assert re.search(word, said), f"{word!r} not in {said!r}"


# --- optimize() -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["half", "FP32", "", None, 8, torch.bfloat16])
def test_unknown_precision(precision: Any) -> None:
    refused(lambda: vitlib.optimize(tiny(), precision), ConfigError, "fp32, bf16, fp16, int8, fp8",
            re.escape(repr(precision)))  # fmt: skip


@pytest.mark.parametrize("batch_size", [0, -1, "4", 2.0, True])
def test_wrong_batch_size(batch_size: Any) -> None:
    refused(lambda: vitlib.optimize(tiny(), batch_size=batch_size), ConfigError, "batch_size",
            re.escape(repr(batch_size)), "from 1")  # fmt: skip


@pytest.mark.parametrize("precision", ["fp8", "fp16"])
def test_some_precisions_are_for_gpus(precision: Any) -> None:
    refused(lambda: vitlib.optimize(tiny(), precision), ConfigError, "GPU", "int8|bf16|fp32")


@pytest.mark.parametrize("compile", [1, "blocks", None])
def test_wrong_compile(compile: Any) -> None:  # noqa: A002
    refused(lambda: vitlib.optimize(tiny(), compile=compile), ConfigError, "compile=", "True")


def test_int8_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Machine("x86_64", "amd", "a CPU of 2019")
    monkeypatch.setattr(cpu, "this_machine", lambda: bare)
    monkeypatch.setattr("vitlib.fast.optimization.this_machine", lambda: bare, raising=False)
    refused(lambda: vitlib.optimize(tiny(), "int8"), ConfigError, "int8", "VNNI", "fp32", "bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_calibrate_is_for_int8(precision: Any) -> None:
    model = tiny()
    photos = pixels(model)
    refused(lambda: vitlib.optimize(model, precision, calibrate=photos), ConfigError, "calibrate",
            "int8")  # fmt: skip


@pytest.mark.parametrize("model", [nn.Linear(3, 3), None, "google/vit-base-patch16-224"])
def test_what_is_no_vit(model: Any) -> None:
    refused(lambda: vitlib.optimize(model), ConfigError, "ViT")


def test_twice() -> None:
    refused(lambda: vitlib.optimize(vitlib.optimize(tiny())), ConfigError, "ViT")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", 3.5])
def test_a_device_that_is_not_there(device: Any) -> None:
    refused(lambda: vitlib.optimize(tiny(), device=device), ConfigError, "device")


# --- calibrate= -----------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jpg"
    path.write_text("no photo")
    return path


@has_int8
def test_calibrate_takes_photos_of_every_kind(photo: Path) -> None:
    model = tiny()
    model.image_processor = vitlib.ImageProcessor(size=(32, 32))
    opened = Image.open(photo)
    levels = np.asarray(opened)
    kinds: list[Any] = [
        photo,
        str(photo),
        [photo, str(photo)],
        iter([photo] * 9),
        [opened, levels, photo.read_bytes()],
        pixels(model, 9),
        pixels(model, 2, (40, 24)),
        pixels(model, 2).double(),
    ]
    images = pixels(model, 2)
    for kind in kinds:
        assert bool(vitlib.optimize(model, "int8", calibrate=kind)(images).isfinite().all())
    again = [vitlib.optimize(model, "int8", calibrate=[photo] * 3)(images) for _ in range(2)]
    assert torch.equal(*again)
    assert opened.size == (80, 60)  # as it was


@has_int8
def test_calibration_matters() -> None:
    model = tiny()
    images = pixels(model, 4)
    dim = vitlib.optimize(model, "int8", calibrate=pixels(model, 8) * 0.01)
    right = vitlib.optimize(model, "int8", calibrate=pixels(model, 8))
    exact = model(images).detach()
    assert (dim(images) - exact).square().mean() > 4 * (right(images) - exact).square().mean()


@has_int8
def test_calibrate_refuses(photo: Path, text: Path, tmp_path: Path) -> None:
    model = tiny()
    model.image_processor = vitlib.ImageProcessor(size=(32, 32))
    holed = pixels(model, 4)
    holed[2, 1, 3, 4] = torch.nan
    endless = pixels(model, 4)
    endless[0, 0, 0, 0] = torch.inf

    def given(what: Any) -> Callable[[], object]:
        return lambda: vitlib.optimize(model, "int8", calibrate=what)

    refused(given([]), ConfigError, "calibrate", "photos")
    refused(given(iter([])), ConfigError, "calibrate", "photos")
    refused(given(pixels(model, 0)), ConfigError, "calibrate", "photos")
    refused(given([photo, text]), ImageError, "calibrate", "1", "notes.jpg")
    refused(given(str(text)), ImageError, "notes.jpg")
    refused(given([tmp_path / "absent.jpg"]), ImageError, "absent.jpg", "not there")
    refused(given(tmp_path), ImageError, re.escape(str(tmp_path)), "folder")
    refused(given(pixels(model)[0]), ImageError, r"\(3, 32, 32\)", "3, height, width")
    refused(given(torch.zeros(2, 4, 32, 32)), ImageError, r"\(2, 4, 32, 32\)", "3, height, width")
    refused(given(torch.zeros(2, 3, 7, 32)), ImageError, "7x32", "patch")
    refused(given(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), ImageError, "uint8", "normalised")
    refused(given(holed), ImageError, "NaN")
    refused(given(endless), ImageError, "infinite")
    refused(given(7), ConfigError, "calibrate", "int", "photos")
    refused(given([photo, 7]), ImageError, "1", "int")
    model.image_processor = None
    refused(given([photo]), ConfigError, "preprocessing", "pixels")


# --- what it gives --------------------------------------------------------------------------------


def test_no_training() -> None:
    fast = vitlib.optimize(tiny())
    for call in (fast.train, lambda: fast.train(True)):
        refused(call, ConfigError, "inference", "model it was made from")
    assert not fast.training


def test_no_gradients() -> None:
    model = tiny()
    fast = vitlib.optimize(model)
    images = pixels(model).requires_grad_()
    for method in (fast, fast.forward_features, fast.embed, fast.forward_pooler):
        refused(lambda method=method: method(images), ConfigError, "gradients", "detach")
    with torch.no_grad():
        assert torch.equal(fast(images), fast(images.detach()))


def test_no_gradients_through_the_head() -> None:
    fast = vitlib.optimize(tiny())
    tokens = torch.randn(2, 17, 48).requires_grad_()
    refused(lambda: fast.forward_head(tokens), ConfigError, "gradients", "detach")


def test_no_pooler() -> None:
    model = tiny(pooler_dim=0)
    refused(lambda: vitlib.optimize(model).forward_pooler(pixels(model)), ConfigError, "pooler")


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 32, 32),
        torch.zeros(1, 4, 32, 32),
        torch.zeros(1, 3, 7, 32),
        torch.zeros(1, 3, 0, 32),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 1, 3, 32, 32),
        torch.zeros(()),
    ],
    ids=lambda images: f"{tuple(images.shape)} {images.dtype}",
)
def test_misfits_are_refused_as_by_the_model(images: torch.Tensor) -> None:
    model = tiny()
    with pytest.raises(ImageError) as theirs:
        model(images)
    for fast in (vitlib.optimize(model), vitlib.optimize(model, batch_size=1)):
        refused(lambda fast=fast: fast(images), ImageError, re.escape(str(theirs.value)))


def test_misfit_levels() -> None:
    fast = vitlib.optimize(tiny())
    levels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for method in (fast.forward_uint8, fast.embed_uint8):
        refused(lambda m=method: m(levels.float()), ImageError, "float32", "uint8")
        refused(lambda m=method: m(levels[0]), ImageError, "3, 32, 32", "3, height, width")
        refused(lambda m=method: m(levels[..., :7]), ImageError, "32x7", "patch")
        refused(lambda m=method: m(levels[:, :2]), ImageError, "2, 2, 32, 32")


@pytest.mark.parametrize(
    "rule", [None, "a rule", vitlib.ImageProcessor(size=(32, 32), float_resize=True)]
)
def test_levels_without_a_rule_for_them(rule: object) -> None:
    model = tiny()
    model.image_processor = rule
    fast = vitlib.optimize(model)
    levels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for method in (fast.forward_uint8, fast.embed_uint8):
        refused(lambda m=method: m(levels), ConfigError, "preprocessing", "pixels")


# --- memory ---------------------------------------------------------------------------------------

SAID = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 12582912000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
]


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception], None]]:
    def arrange(error: Exception) -> None:
        def forward(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("vitlib.fast.block.FastBlock.forward", forward)

    return arrange


@pytest.mark.parametrize("error", SAID, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit(error: Exception, breaks: Callable[[Exception], None]) -> None:
    model = tiny()
    fast = vitlib.optimize(model)
    levels = torch.zeros(7, 3, 32, 32, dtype=torch.uint8)
    breaks(error)
    for call in (
        lambda: fast(pixels(model, 7)),
        lambda: fast.forward_features(pixels(model, 7)),
        lambda: fast.forward_uint8(levels),
    ):
        refused(call, ImageError, "7 images of 3x32x32", "do not fit in memory", "fewer",
                "batch_size")  # fmt: skip


def test_other_errors_come_through(breaks: Callable[[Exception], None]) -> None:
    model = tiny()
    fast = vitlib.optimize(model)
    breaks(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fast(pixels(model))


def test_this_machine_is_told_in_an_int8_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU has is in the line, so that a reader sees why."""
    old = Machine("x86_64", "intel", "a CPU of 2017", avx512=True)
    monkeypatch.setattr(cpu, "this_machine", lambda: old)
    monkeypatch.setattr("vitlib.fast.optimization.this_machine", lambda: old, raising=False)
    refused(lambda: vitlib.optimize(tiny(), "int8"), ConfigError, "avx512")
