"""Settings of the whole process change no answer, and are left as they were."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import vitlib
from fixtures.families import pixels, tiny
from vitlib import ImageProcessor, Predictor, explain
from vitlib.cli import main
from vitlib.fast import onednn_ops
from vitlib.fast.cpu import kernel_plan

RULE = ImageProcessor(size=(32, 32), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
FLOAT_RULE = ImageProcessor(
    size=(32, 32), float_resize=True, image_mean=(0.5,) * 3, image_std=(0.2,) * 3
)
LEVELS = np.random.default_rng(0).integers(0, 256, (8, 40, 50, 3), np.uint8)
PIXELS, WIDE = pixels(3), pixels(2, 48, 40)
INT8 = ["int8"] * (kernel_plan("int8") is not None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    for family, layout in (("vit", "hf"), ("beit_timm", "timm")):
        vitlib.save(tiny(family, depth=2), made / family, layout=layout, image_processor=RULE)
    return made


def answers(folder: Path, out: Path) -> dict[str, Any]:
    """Results of the library by name: loaded, optimized, predicted, explained, saved again."""
    result: dict[str, Any] = {}
    for family in ("vit", "beit_timm"):
        model = vitlib.load(folder / family)
        with torch.no_grad():
            result[f"{family} off the grid"] = vitlib.optimize(model)(WIDE)
            for precision in ("fp32", "bf16", *INT8):
                calibrate = PIXELS if precision == "int8" else None
                fast = vitlib.optimize(model, precision, calibrate=calibrate)  # type: ignore[arg-type]
                result[f"{family} in {precision}"] = fast(PIXELS)
        fast.save(out / family)
        result[f"{family} opened again"] = vitlib.fast.load(out / family)(PIXELS)
    model = vitlib.load(folder / "vit")
    photos = [Image.fromarray(levels) for levels in LEVELS]
    result["pixels"], result["float pixels"] = RULE(photos[:2]), FLOAT_RULE(photos[:2])
    predictor = Predictor.load(folder / "vit")
    result["scores"], result["vectors"] = predictor.probabilities(photos), predictor.embed(photos)
    result["by photos"] = Predictor.load(
        folder / "beit_timm", precision="auto", calibrate=photos
    ).probabilities(photos)
    result["attention"] = predictor.attention(photos[:1])[0].probabilities  # type: ignore[union-attr]
    result["relevance"] = explain.relevance(model, PIXELS, 1)
    result["gradient"] = explain.gradient(model, PIXELS, 1, samples=2)
    vitlib.save(vitlib.load(folder / "vit", image_size=48), out / "larger", layout="jax")
    result["resized, as JAX"] = vitlib.optimize(vitlib.load(out / "larger"))(PIXELS)
    return {name: np.asarray(value) for name, value in result.items()}


@contextmanager
def change_setting(change: Callable[[Any], object], new: Any, old: Any) -> Iterator[None]:
    change(new)
    try:
        yield
    finally:
        change(old)


@contextmanager
def others() -> Iterator[None]:
    """Settings that vitlib needs no care for but not to touch them."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("error")
        for item in (
            np.errstate(all="raise"),
            change_setting(csv.field_size_limit, 10, csv.field_size_limit()),
            change_setting(sys.setrecursionlimit, 1200, sys.getrecursionlimit()),
            change_setting(
                partial(setattr, Image, "MAX_IMAGE_PIXELS"), 100, Image.MAX_IMAGE_PIXELS
            ),
            change_setting(partial(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES"), True, False),
        ):
            stack.enter_context(item)
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": lambda: change_setting(torch.set_default_device, "meta", None),
    "device block": lambda: torch.device("meta"),
    "float64": lambda: change_setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: change_setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "matmul precision": lambda: change_setting(
        torch.set_float32_matmul_precision, "medium", "highest"
    ),
    "others": others,
}


def state() -> list[Any]:
    """Global settings of the caller."""
    return [
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.default_generator.initial_seed(),
        np.asarray(torch.random.get_rng_state()).tolist(),
        np.random.get_state()[2],
        random.getstate(),
        np.geterr(),
        warnings.filters[:],
        csv.field_size_limit(),
        (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        torch.backends.mkldnn.matmul.fp32_precision,
        sys.getrecursionlimit(),
    ]


def forget() -> None:
    """Caches made without a setting would hide what it does, and the other way round."""
    for cached in (
        onednn_ops.has_packed_linear,
        onednn_ops.has_int8_linear,
        onednn_ops._int8_cast_wraps,
        onednn_ops._zeros,
    ):
        cached.cache_clear()


@pytest.fixture(scope="module")
def expected_results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answers(folder, tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize("name", SETTINGS)
def test_global_setting_changes_no_result(
    name: str, folder: Path, expected_results: dict[str, Any], tmp_path: Path
) -> None:
    forget()
    try:
        with SETTINGS[name]():
            before = state()
            result = answers(folder, tmp_path)
            after = state()
    finally:
        forget()
    assert after == before
    differing = [
        key for key in expected_results if not np.array_equal(result[key], expected_results[key])
    ]
    assert not differing


def test_model_loaded_in_inference_mode_can_be_trained(folder: Path) -> None:
    with torch.inference_mode():
        model = vitlib.load(folder / "vit")
    model(PIXELS).sum().backward()
    assert model.head.weight.grad is not None


FACTORIES = {
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "tensor",
    "rand",
    "randn",
    "eye",
    "linspace",
}
# Fresh parameters are in torch's default dtype, as nn's.
MODEL = {"patch_embed.py", "encoder.py", "variants.py"}


def test_every_new_tensor_names_its_dtype() -> None:
    root = Path(vitlib.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.name in MODEL:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func.value) != "torch" or node.func.attr not in FACTORIES:
                continue
            names = {keyword.arg for keyword in node.keywords}
            whole = node.func.attr in ("arange", "full") and "device" in names  # of whole numbers
            meta = "device" in names and ast.unparse(node).endswith(
                ("device='meta')", "device=where)")
            )
            learned = path.name == "positions.py" and "num_heads" in ast.unparse(node)
            assert "dtype" in names or whole or meta or learned, f"{path}:{node.lineno}"


@pytest.fixture(scope="module")
def labelled_folder(folder: Path) -> Path:
    """A model whose labels no code page of Windows holds, in a folder that none does."""
    model = vitlib.load(folder / "vit")
    model.config = replace(model.config, labels=("猫", "Käse", "ok", "ﷺ", "é"))
    vitlib.save(model, folder / "猫", image_processor=RULE)
    Image.fromarray(LEVELS[0]).save(folder / "ü猫.png")
    return folder


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_json_is_utf8_or_ascii_on_any_console(
    labelled_folder: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    photo = str(labelled_folder / "ü猫.png")
    arguments = ["vitlib", "classify", photo, "-m", str(labelled_folder / "猫"), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="0"):
        main()
    stream.flush()
    result = json.loads(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    assert result[0]["image"] == photo
    assert {item["label"] for item in result[0]["predictions"]} == {"猫", "Käse", "ok", "ﷺ", "é"}


def test_no_stdout_and_no_stderr_is_no_error(
    labelled_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without streams, as under pythonw, several photos show no progress bar."""
    expected = Predictor.load(labelled_folder / "猫").probabilities(
        [labelled_folder / "ü猫.png"] * 2
    )
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    predictor = Predictor.load(labelled_folder / "猫")
    result = predictor.probabilities([labelled_folder / "ü猫.png"] * 2, progress=True)
    assert np.array_equal(result, expected)
    photo = str(labelled_folder / "ü猫.png")
    arguments = ["vitlib", "classify", photo, photo, "-m", str(labelled_folder / "猫")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="0"):
        main()


def test_written_files_have_the_permissions_of_the_umask(
    labelled_folder: Path, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        predictor = Predictor.load(labelled_folder / "猫")
        predictor.save(tmp_path / "hf")
        predictor.fast().save(tmp_path / "fast")  # type: ignore[union-attr]
        for layout in ("timm", "meta", "jax", "torchvision"):
            vitlib.save(predictor.model, tmp_path / layout, layout=layout)  # type: ignore[arg-type]
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_float32_is_exact_while_it_computes(
    allowed: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 on a GPU has ten bits after the point. The flags are the caller's before and after."""
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    fast = vitlib.optimize(vitlib.load(folder / "vit"))
    records: list[list[str]] = []
    fast.trunk.register_forward_hook(
        lambda *_: records.append([b.fp32_precision for b in backends])
    )
    with change_setting(torch.set_float32_matmul_precision, allowed, "highest"):
        before = [b.fp32_precision for b in backends], torch.backends.cuda.matmul.allow_tf32
        assert "tf32" in before[0]
        fast(PIXELS)
        assert before == (
            [b.fp32_precision for b in backends],
            torch.backends.cuda.matmul.allow_tf32,
        )
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")  # what both take theirs from
    try:
        fast(PIXELS)
        torch.backends.fp32_precision = "none"
        assert not {"tf32"} & {b.fp32_precision for b in backends}  # they still take it from there
    finally:
        torch.backends.fp32_precision = "none"
    assert records == [["ieee", "ieee"]] * 2
