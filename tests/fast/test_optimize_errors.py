"""Test that optimize() and FastViT refuse wrong use in one line that says what to do."""

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
from fixtures.fast_models import pixels, requires_int8, tiny
from vitlib.errors import ConfigError, ImageError, VitlibError
from vitlib.fast import cpu
from vitlib.fast.cpu import Machine


def check_refused(call: Callable[[], object], kind: type[VitlibError], *words: str) -> None:
    """Check that a call raises an error of one line which matches all patterns."""
    with pytest.raises(VitlibError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    assert 20 < len(message) < 400
    for word in words:
        assert re.search(word, message), f"{word!r} not in {message!r}"


# --- optimize() -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["half", "FP32", "", None, 8, torch.bfloat16])
def test_unknown_precision_is_refused(precision: Any) -> None:
    expected = "fp32, bf16, fp16, int8, fp8", re.escape(repr(precision))
    check_refused(lambda: vitlib.optimize(tiny(), precision), ConfigError, *expected)


@pytest.mark.parametrize("batch_size", [0, -1, "4", 2.0, True])
def test_wrong_batch_size_is_refused(batch_size: Any) -> None:
    check_refused(lambda: vitlib.optimize(tiny(), batch_size=batch_size), ConfigError, "batch_size",
            re.escape(repr(batch_size)), "from 1")  # fmt: skip


@pytest.mark.parametrize("precision", ["fp8", "fp16"])
def test_gpu_precisions_on_a_cpu_are_refused(precision: Any) -> None:
    check_refused(lambda: vitlib.optimize(tiny(), precision), ConfigError, "GPU", "int8|bf16|fp32")


@pytest.mark.parametrize("compile", [1, "blocks", None])
def test_wrong_compile_is_refused(compile: Any) -> None:  # noqa: A002
    check_refused(lambda: vitlib.optimize(tiny(), compile=compile), ConfigError, "compile=", "True")


def test_int8_without_vnni_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Machine("x86_64", "amd", "a CPU of 2019")
    monkeypatch.setattr(cpu, "this_machine", lambda: bare)
    monkeypatch.setattr("vitlib.fast.optimization.this_machine", lambda: bare, raising=False)
    check_refused(
        lambda: vitlib.optimize(tiny(), "int8"), ConfigError, "int8", "VNNI", "fp32", "bf16"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_calibrate_without_int8_is_refused(precision: Any) -> None:
    model = tiny()
    photos = pixels(model)
    check_refused(
        lambda: vitlib.optimize(model, precision, calibrate=photos),
        ConfigError,
        "calibrate",
        "int8",
    )


@pytest.mark.parametrize("model", [nn.Linear(3, 3), None, "google/vit-base-patch16-224"])
def test_other_objects_than_vit_are_refused(model: Any) -> None:
    check_refused(lambda: vitlib.optimize(model), ConfigError, "ViT")


def test_optimizing_twice_is_refused() -> None:
    check_refused(lambda: vitlib.optimize(vitlib.optimize(tiny())), ConfigError, "ViT")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", 3.5])
def test_missing_device_is_refused(device: Any) -> None:
    check_refused(lambda: vitlib.optimize(tiny(), device=device), ConfigError, "device")


# --- calibrate= -----------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jpg"
    path.write_text("no photo")
    return path


@requires_int8
def test_calibrate_accepts_photos_of_every_kind(photo: Path) -> None:
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


@requires_int8
def test_calibration_changes_the_outputs() -> None:
    model = tiny()
    images = pixels(model, 4)
    dim = vitlib.optimize(model, "int8", calibrate=pixels(model, 8) * 0.01)
    right = vitlib.optimize(model, "int8", calibrate=pixels(model, 8))
    exact = model(images).detach()
    assert (dim(images) - exact).square().mean() > 4 * (right(images) - exact).square().mean()


@requires_int8
def test_calibrate_refuses_other_objects(photo: Path, text_file: Path, tmp_path: Path) -> None:
    model = tiny()
    model.image_processor = vitlib.ImageProcessor(size=(32, 32))
    holed = pixels(model, 4)
    holed[2, 1, 3, 4] = torch.nan
    endless = pixels(model, 4)
    endless[0, 0, 0, 0] = torch.inf

    def read_photos(what: Any) -> Callable[[], object]:
        return lambda: vitlib.optimize(model, "int8", calibrate=what)

    check_refused(read_photos([]), ConfigError, "calibrate", "photos")
    check_refused(read_photos(iter([])), ConfigError, "calibrate", "photos")
    check_refused(read_photos(pixels(model, 0)), ConfigError, "calibrate", "photos")
    check_refused(read_photos([photo, text_file]), ImageError, "calibrate", "1", "notes.jpg")
    check_refused(read_photos(str(text_file)), ImageError, "notes.jpg")
    check_refused(read_photos([tmp_path / "absent.jpg"]), ImageError, "absent.jpg", "not there")
    check_refused(read_photos(tmp_path), ImageError, re.escape(str(tmp_path)), "folder")
    check_refused(read_photos(pixels(model)[0]), ImageError, r"\(3, 32, 32\)", "3, height, width")
    check_refused(
        read_photos(torch.zeros(2, 4, 32, 32)), ImageError, r"\(2, 4, 32, 32\)", "3, height, width"
    )
    check_refused(read_photos(torch.zeros(2, 3, 7, 32)), ImageError, "7x32", "patch")
    check_refused(
        read_photos(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), ImageError, "uint8", "normalised"
    )
    check_refused(read_photos(holed), ImageError, "NaN")
    check_refused(read_photos(endless), ImageError, "infinite")
    check_refused(read_photos(7), ConfigError, "calibrate", "int", "photos")
    check_refused(read_photos([photo, 7]), ImageError, "1", "int")
    model.image_processor = None
    check_refused(read_photos([photo]), ConfigError, "preprocessing", "pixels")


# --- what it gives --------------------------------------------------------------------------------


def test_train_is_refused() -> None:
    fast = vitlib.optimize(tiny())
    for call in (fast.train, lambda: fast.train(True)):
        check_refused(call, ConfigError, "inference", "model it was made from")
    assert not fast.training


def test_gradients_are_refused() -> None:
    model = tiny()
    fast = vitlib.optimize(model)
    images = pixels(model).requires_grad_()
    for method in (fast, fast.forward_features, fast.embed, fast.forward_pooler):
        check_refused(lambda method=method: method(images), ConfigError, "gradients", "detach")
    with torch.no_grad():
        assert torch.equal(fast(images), fast(images.detach()))


def test_gradients_through_the_head_are_refused() -> None:
    fast = vitlib.optimize(tiny())
    tokens = torch.randn(2, 17, 48).requires_grad_()
    check_refused(lambda: fast.forward_head(tokens), ConfigError, "gradients", "detach")


def test_missing_pooler_is_refused() -> None:
    model = tiny(pooler_dim=0)
    check_refused(
        lambda: vitlib.optimize(model).forward_pooler(pixels(model)), ConfigError, "pooler"
    )


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
def test_wrong_images_are_refused_as_by_the_model(images: torch.Tensor) -> None:
    model = tiny()
    with pytest.raises(ImageError) as expected:
        model(images)
    for fast in (vitlib.optimize(model), vitlib.optimize(model, batch_size=1)):
        check_refused(lambda fast=fast: fast(images), ImageError, re.escape(str(expected.value)))


def test_wrong_uint8_images_are_refused() -> None:
    fast = vitlib.optimize(tiny())
    levels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for method in (fast.forward_uint8, fast.embed_uint8):
        check_refused(lambda m=method: m(levels.float()), ImageError, "float32", "uint8")
        check_refused(lambda m=method: m(levels[0]), ImageError, "3, 32, 32", "3, height, width")
        check_refused(lambda m=method: m(levels[..., :7]), ImageError, "32x7", "patch")
        check_refused(lambda m=method: m(levels[:, :2]), ImageError, "2, 2, 32, 32")


@pytest.mark.parametrize(
    "rule", [None, "a rule", vitlib.ImageProcessor(size=(32, 32), float_resize=True)]
)
def test_uint8_without_preprocessing_is_refused(rule: object) -> None:
    model = tiny()
    model.image_processor = rule
    fast = vitlib.optimize(model)
    levels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for method in (fast.forward_uint8, fast.embed_uint8):
        check_refused(lambda m=method: m(levels), ConfigError, "preprocessing", "pixels")


# --- memory ---------------------------------------------------------------------------------------

REFUSALS = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 12582912000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
]


@pytest.fixture
def break_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception], None]]:
    def arrange(error: Exception) -> None:
        def forward(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("vitlib.fast.block.FastBlock.forward", forward)

    return arrange


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_batch_that_does_not_fit_is_refused(
    error: Exception, break_forward: Callable[[Exception], None]
) -> None:
    model = tiny()
    fast = vitlib.optimize(model)
    levels = torch.zeros(7, 3, 32, 32, dtype=torch.uint8)
    break_forward(error)
    for call in (
        lambda: fast(pixels(model, 7)),
        lambda: fast.forward_features(pixels(model, 7)),
        lambda: fast.forward_uint8(levels),
    ):
        check_refused(call, ImageError, "7 images of 3x32x32", "do not fit in memory", "fewer",
                "batch_size")  # fmt: skip


def test_other_errors_are_not_changed(break_forward: Callable[[Exception], None]) -> None:
    model = tiny()
    fast = vitlib.optimize(model)
    break_forward(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fast(pixels(model))


def test_int8_refusal_names_the_features_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the features of the CPU, which explain the refusal."""
    old = Machine("x86_64", "intel", "a CPU of 2017", avx512=True)
    monkeypatch.setattr(cpu, "this_machine", lambda: old)
    monkeypatch.setattr("vitlib.fast.optimization.this_machine", lambda: old, raising=False)
    check_refused(lambda: vitlib.optimize(tiny(), "int8"), ConfigError, "avx512")
