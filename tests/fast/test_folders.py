"""Test FastViT.save and vitlib.fast.load: equal bits, file sizes and damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import vitlib
from fixtures.fast_models import FAMILIES, all_outputs, pixels, tiny
from vitlib import ImageProcessor, Predictor
from vitlib.errors import CheckpointError, ConfigError, SourceError
from vitlib.fast import FastViT, load
from vitlib.fast.cpu import kernel_plan
from vitlib.fast.int8_linears import Int8PerToken
from vitlib.fast.int8_quantization import quantize_weights
from vitlib.fast.optimization import assemble, cpu_plan
from vitlib.fast.stock_blocks import StockBlocks

PRECISIONS = ["fp32", "bf16", *(["int8"] if kernel_plan("int8") else [])]
FILE = "fast.safetensors"


def optimize_tiny(name: str, precision: str) -> FastViT:
    model = tiny(name)
    calibrate = pixels(model, 8) if precision == "int8" else None
    return vitlib.optimize(model, precision, calibrate=calibrate, batch_size=2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_model_gives_the_same_bits(name: str, precision: str, tmp_path: Path) -> None:
    fast = optimize_tiny(name, precision)
    fast.save(tmp_path)
    again = load(tmp_path)
    images = pixels(tiny(name), 3)
    before, after = all_outputs(fast, images), all_outputs(again, images)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (again.config, again.precision, again.batch_size) == (fast.config, precision, 2)
    if fast.uint8_trunk is not None:
        levels = torch.randint(0, 256, images.shape, dtype=torch.uint8)
        assert torch.equal(fast.forward_uint8(levels), again.forward_uint8(levels))
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


def test_uncalibrated_int8_is_saved(tmp_path: Path) -> None:
    if kernel_plan("int8") is None:
        pytest.skip("this CPU has no VNNI")
    fast = vitlib.optimize(tiny("dinov3 swiglu"), "int8")
    fast.save(tmp_path)
    images = pixels(tiny("dinov3 swiglu"), 3)
    assert torch.equal(load(tmp_path).forward_features(images), fast.forward_features(images))


def test_int8_with_a_scale_for_each_token_is_loaded(tmp_path: Path) -> None:
    """Earlier versions saved such layers for models that were not calibrated."""
    if kernel_plan("int8") is None:
        pytest.skip("this CPU has no VNNI")
    model = tiny()
    blocks = dict(StockBlocks(model))
    for block in blocks.values():
        block.linears = {name: quantize_weights(w) for name, w in block.linears.items()}
    fast = assemble(model, blocks, cpu_plan("int8"), "int8", None)
    assert any(isinstance(part, Int8PerToken) for part in fast.trunk.modules())
    fast.save(tmp_path)
    images = pixels(model, 3)
    assert torch.equal(load(tmp_path).forward_features(images), fast.forward_features(images))


def test_file_sizes_by_precision(deit_tiny: Path, tmp_path: Path) -> None:
    """Without photos a third of so small a model is in 8 bits; the rest in 16, the head in 32."""
    if kernel_plan("int8") is None:
        pytest.skip("this CPU has no VNNI")
    model = vitlib.load(deit_tiny)
    sizes = {}
    for precision in ("fp32", "bf16", "int8"):
        vitlib.optimize(model, precision).save(tmp_path / precision)
        sizes[precision] = (tmp_path / precision / FILE).stat().st_size
    by = kernel_plan("bf16")  # float32 where the CPU has no bfloat16
    half = by is not None and by.arithmetic == "bf16"
    assert sizes["bf16"] <= (0.56 if half else 1) * sizes["fp32"]
    assert sizes["int8"] < (0.5 if half else 0.8) * sizes["fp32"]
    again = load(tmp_path / "int8")
    assert again.image_processor == model.image_processor
    assert again.config.labels == model.config.labels


def test_dtype_of_outputs_is_saved(tmp_path: Path) -> None:
    model = tiny().to(torch.bfloat16)
    fast = vitlib.optimize(model)
    fast.save(tmp_path)
    images = pixels(model)
    assert load(tmp_path)(images).dtype == torch.bfloat16
    assert torch.equal(load(tmp_path)(images), fast(images))


def test_model_with_users_modules_is_not_saved(tmp_path: Path) -> None:
    model = tiny()
    model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"blocks\.1: not vitlib's own.*write the weights"):
        vitlib.optimize(model).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_predictor_loads_an_optimized_folder(tmp_path: Path, photo: Path) -> None:
    model = tiny()
    model.image_processor = ImageProcessor(size=(32, 32))
    vit = Predictor(model, model.image_processor, precision="bf16")
    vitlib.optimize(model, "bf16").save(tmp_path)
    again = Predictor.load(tmp_path)
    assert again.labels == vit.labels
    assert again.classify(photo) == vit.classify(photo)
    assert again.embed([photo, photo]).shape == (2, 48)
    again.save(tmp_path / "copy")
    assert Predictor.load(tmp_path / "copy").classify(photo) == vit.classify(photo)
    with pytest.raises(ConfigError, match="was optimized for bf16"):
        Predictor.load(tmp_path, precision="fp32")


def test_vitlib_load_refuses_an_optimized_folder(tmp_path: Path) -> None:
    vitlib.optimize(tiny()).save(tmp_path)
    for source in (tmp_path, tmp_path / FILE):
        with pytest.raises(SourceError, match=r"vitlib\.fast\.load"):
            vitlib.load(source)


def test_fast_load_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no fast\.safetensors.*vitlib\.optimize"):
        load(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"not written by FastViT\.save.*vitlib\.load"):
        load(tmp_path)
    (tmp_path / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load(tmp_path)


def rewrite_file(
    path: Path,
    change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None,
    about: Callable[[dict[str, object]], object] = lambda _: None,
) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    header = json.loads(metadata["vitlib_fast"])
    about(header)
    change(tensors)
    save_file(tensors, path, {"vitlib_fast": json.dumps(header)})


def set_to(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "gone": (lambda t: t.pop("blocks.1.qkv.weight"), r"blocks\.1\.qkv\.weight is missing"),
    "unknown": (set_to("more", torch.ones(1)), "more is not known"),
    "shape": (set_to("norm.weight", torch.ones(7)), r"norm\.weight is \(7,\).*expected \(48,\)"),
    "dtype": (set_to("norm.bias", torch.ones(48).int()), r"norm\.bias is .*int32"),
    "nan": (set_to("norm.bias", torch.full((48,), torch.nan)), "NaN or infinity"),
    "levels without scale": (
        set_to("blocks.0.out.weight", torch.ones(48, 48, dtype=torch.int8)),
        r"blocks\.0\.out\.weight is .*int8",
    ),
    "zero of no byte": (
        set_to("blocks.0.out.input", torch.tensor([1.0, 300.0], dtype=torch.float64)),
        r"blocks\.0\.out\.input is 1\.0, 300\.0",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensor_is_named(case: str, tmp_path: Path) -> None:
    vitlib.optimize(tiny()).save(tmp_path)
    change, message = DAMAGE[case]
    rewrite_file(tmp_path / FILE, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


HEADERS: dict[str, Callable[[dict[str, object]], object]] = {
    "no config": lambda header: header.pop("config"),
    "config of another kind": lambda header: header.update(config=3),
    "a field that is none": lambda header: header["config"].update(colour=1),  # type: ignore[attr-defined]
    "a size that is none": lambda header: header["config"].update(depth=-1),  # type: ignore[attr-defined]
    "precision": lambda header: header.update(precision="fp4"),
    "dtype": lambda header: header.update(dtype="object"),
    "batch size": lambda header: header.update(batch_size="all"),
    "preprocessing": lambda header: header.update(image_processor={"size": "large"}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_wrong_header_is_refused(case: str, tmp_path: Path) -> None:
    vitlib.optimize(tiny()).save(tmp_path)
    rewrite_file(tmp_path / FILE, about=HEADERS[case])
    with pytest.raises(CheckpointError, match="header that cannot be read"):
        load(tmp_path)


def test_failed_save_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = vitlib.optimize(tiny())
    fast.save(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def stops(_: object, path: str, __: object) -> None:
        Path(path).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", stops)
    with pytest.raises(KeyboardInterrupt):
        fast.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {FILE, "fast.packed"}
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match="cannot be written"):
        fast.save(tmp_path / "file" / "folder")
