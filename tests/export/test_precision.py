"""Test float16 and 8-bit exports: their numbers in torch, and the files in ONNX Runtime."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fixtures.families import FAMILIES, pixels, tiny
from fixtures.synthetic_photos import make_photo
from paths import SHARED
from vitlib import ImageProcessor, ViT
from vitlib.errors import ConfigError
from vitlib.export import ExportReport, ExportSettings, export_model
from vitlib.export.half import HalfLinear, choose_half_scales, halve_products
from vitlib.export.int8 import QuantizedLinear
from vitlib.export.precision import check_precision, lower_precision
from vitlib.export.prepare import PreparedModel, prepare
from vitlib.export.verification import _count_allowed
from vitlib.predict.runtimes import open_file

PROCESSOR = ImageProcessor(size=(32, 32), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
PHOTOS = [Image.open(io.BytesIO(make_photo(number))) for number in range(8)]
# Norms within and after the branches, which no family of FAMILIES has.
NORMS: dict[str, dict[str, Any]] = {
    "post": {"norms": {"post": True}},
    "within": {"norms": {"kind": "rms", "qk": "head", "attn": True, "mlp": True}},
    "width": {"norms": {"qk": "width"}, "activation": "swiglu"},
}


def lowered(model: ViT, precision: Any, outputs: tuple[str, ...] = ()) -> PreparedModel:
    settings = ExportSettings(outputs=outputs, input="float", precision=precision)
    prepared = prepare(model, PROCESSOR, settings)
    calibrate = pixels(32) if precision == "int8" else None
    return lower_precision(prepared, calibrate, PHOTOS)


def relative_errors(prepared: PreparedModel, images: Tensor) -> list[float]:
    wanted = prepared.compute_reference(images)
    with torch.inference_mode():
        results = prepared.graph(images)
    return [
        float((result - exact).norm() / exact.norm())
        for result, exact in zip(results, wanted.values(), strict=True)
    ]


MODELS = [
    *(pytest.param(name, {}, id=name) for name in FAMILIES),
    *(pytest.param("vit", changes, id=f"norms_{name}") for name, changes in NORMS.items()),
]


# --- float16 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_float16_graph_is_near_the_model(name: str, changes: dict[str, Any]) -> None:
    prepared = lowered(tiny(name, depth=2, **changes), "fp16", ("embedding", "tokens"))
    errors = relative_errors(prepared, pixels(3))
    assert 0 < max(errors) < 2e-3, errors  # not 0: something is rounded


def test_float16_graph_holds_every_linear_in_float16_and_norms_in_float32() -> None:
    model = lowered(tiny("siglip_map"), "fp16").graph.model
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert len(linears) == 13  # six of the block, six of the pool, and the head
    assert {linear.weight.dtype for linear in linears} == {torch.float16}
    others = {n: p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n}
    assert set(others.values()) == {torch.float32}


def test_float16_graph_leaves_the_model_alone() -> None:
    model = tiny("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lowered(model, "fp16")
    assert not any(isinstance(part, HalfLinear) for part in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def large_model(layer: str) -> ViT:
    """Build a model whose residual stream passes the largest float16 at a layer."""
    model = tiny("vit", depth=2)
    with torch.no_grad():
        model.get_submodule(f"blocks.0.{layer}").weight.mul_(4e6)  # type: ignore[operator, union-attr]
    return model


@pytest.mark.parametrize("layer", ["mlp.fc1", "mlp.fc2", "attn.v", "attn.proj"])
def test_float16_graph_of_large_activations_stays_finite(layer: str) -> None:
    model, images = large_model(layer), pixels(3)
    assert list(model.iter_hidden_states(images))[1].abs().max() > 1e5
    prepared = lowered(model, "fp16", ("logits", "tokens"))
    assert max(relative_errors(prepared, images)) < 5e-3
    unscaled = halve_products(model, {})
    assert not torch.isfinite(unscaled(images)).all()  # so that the scales are what holds it


def test_float16_scales_are_powers_of_two_of_the_layers_that_need_them() -> None:
    assert choose_half_scales(tiny("vit"), [pixels(2)]) == {}
    scales = choose_half_scales(large_model("mlp.fc2"), [pixels(2)])
    assert list(scales) == ["blocks.0.mlp.fc2"]
    assert scales["blocks.0.mlp.fc2"].x == 1
    assert scales["blocks.0.mlp.fc2"].y.hex().startswith("0x1.0000000000000p")


# --- 8 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_int8_graph_is_near_the_model(name: str, changes: dict[str, Any]) -> None:
    prepared = lowered(tiny(name, depth=2, **changes), "int8", ("embedding", "tokens"))
    errors = relative_errors(prepared, pixels(3))
    assert 0 < max(errors) < 0.1, errors
    layers = [part for part in prepared.graph.modules() if isinstance(part, QuantizedLinear)]
    assert layers
    assert {layer.columns.dtype for layer in layers} == {torch.int8}


def test_int8_graph_has_the_attention_of_the_model() -> None:
    prepared = lowered(tiny("dinov2", depth=2), "int8", ("attention",))
    assert max(relative_errors(prepared, pixels(3))) < 0.1


@pytest.mark.parametrize(
    ("file_format", "precision", "photos", "message"),
    [
        ("onnx", "int8", None, "int8 needs photos"),
        ("pt2", "int8", PHOTOS, "int8 is for ONNX files"),
        ("onnx", "fp16", PHOTOS, "calibrate= is for int8"),
    ],
)
def test_check_precision_refuses(
    file_format: str, precision: str, photos: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_precision(file_format, precision, photos)


def test_int8_refuses_no_photos_at_all() -> None:
    prepared = prepare(tiny("vit"), PROCESSOR, ExportSettings(precision="int8"))
    with pytest.raises(ConfigError, match="holds no photos"):
        lower_precision(prepared, [], PHOTOS)


def test_verification_allows_labels_to_differ_in_int8_alone() -> None:
    assert [_count_allowed("int8", clear) for clear in (5, 50, 100)] == [1, 2, 4]
    assert _count_allowed("fp16", 1000) == 0


# --- files ----------------------------------------------------------------------------------------


def export_tiny(folder: Path, name: str, precision: Any, **changes: Any) -> ExportReport:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    return export_model(
        tiny(name, depth=2, **changes), folder / "out", "onnx", ExportSettings(precision=precision),
        image_processor=PROCESSOR, photos=PHOTOS,
        calibrate=pixels(32) if precision == "int8" else None,
    )  # fmt: skip


def optimized_operators(path: Path, folder: Path) -> list[str]:
    """List the operators that ONNX Runtime runs."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.export
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["vit", "dinov3", "beit", "siglip_map", "dinov2_swiglu"])
def test_file_of_a_lower_precision_answers_like_the_model(
    tmp_path: Path, name: str, precision: str
) -> None:
    report = export_tiny(tmp_path, name, precision)
    assert report.ok
    assert report.precision == precision
    assert {comparison.batch for comparison in report.comparisons} == {1, 2, 5}


@pytest.mark.export
def test_int8_file_runs_as_products_of_integers(tmp_path: Path) -> None:
    report = export_tiny(tmp_path, "vit", "int8")
    operators = optimized_operators(report.path, tmp_path)
    assert operators.count("MatMulIntegerToFloat") == 8  # qkv, out, up and down of two blocks


@pytest.mark.export
@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.54), ("int8", 0.40)])
def test_real_model_keeps_its_labels_in_a_lower_precision(
    tmp_path: Path, precision: Any, share: float
) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    source = SHARED / "models" / "deit-tiny-patch16-224"
    photos = sorted((SHARED / "data").glob("fridge_multi*/*/*.jpg"))
    if not source.is_dir() or not photos:
        pytest.skip("the shared model and photos are not there")
    report = export_model(
        source, tmp_path / "out", "onnx", ExportSettings(precision=precision), photos=photos,
        calibrate=photos[::8] if precision == "int8" else None,
    )  # fmt: skip
    counted = report.comparisons[-1]
    assert counted.clear > 150
    assert counted.agreeing >= (1.0 if precision == "fp16" else 0.96) * counted.clear
    # In so small a model a third of the weights stays in float16, and the patches in float32.
    assert report.path.stat().st_size < share * (source / "model.safetensors").stat().st_size
    assert open_file(report.path).info is not None
