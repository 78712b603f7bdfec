"""Files for images of any size: matrices inside the graph resize positions as the model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitlib
from fixtures.families import FAMILIES, pixels, tiny
from paths import SHARED
from vitlib.errors import ConfigError
from vitlib.export.axis_matrices import KERNELS, resize_matrix
from vitlib.export.dynamic_grid import MAX_PATCHES, choose_resize, resize_in_graph
from vitlib.export.onnx_file import quiet_exporter, write_onnx
from vitlib.export.prepare import ExportSettings, PreparedModel, list_sizes, prepare
from vitlib.image.processor import ImageProcessor
from vitlib.patch_embed import POSITION_RESIZE, ResizeRule
from vitlib.positions import AttentionPosition
from vitlib.predict.runtimes import open_file
from vitlib.testing.distance import relative_distance
from vitlib.vit import ViT

PROCESSOR = ImageProcessor(size=(32, 32), image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.4, 0.6))
BOUND = 2e-6
# Learned; smaller; larger; tall; wide; not whole patches.
SIZES = ((32, 32), (16, 24), (64, 56), (80, 24), (24, 80), (43, 52))
GRIDS = ((4, 4), (1, 1), (1, 3), (3, 4), (4, 7), (9, 2), (16, 11))
# Positions that no family of FAMILIES has.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"vit_{rule}": ("vit", {"position_resize": rule}) for rule in POSITION_RESIZE},
    "vit_sincos": ("vit", {"position_resize": "sincos", "class_token": False, "pool": "mean"}),
    "wide_grid": ("vit", {"image_size": (32, 56), "position_resize": "bicubic_offset"}),
    "beit_wide_grid": ("beit_timm", {"image_size": (32, 56)}),
    "rope_reference": (
        "dinov3", {"rope": {"coords": "index", "theta": 1e4, "reference_grid": (4, 4)}},
    ),
    "rope_offset": ("dinov3", {"rope": {"coords": "index", "offset": 1.0, "axes": "xy"}}),
    "rope_learned": ("dinov3", {"rope": {"coords": "index", "theta": 10.0, "learned": True}}),
    "rope_class_token": (
        "dinov3", {"rope": {"coords": "index", "theta": 1e4, "class_token": True},
                   "num_registers": 0},
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def build(case: str) -> ViT:
    family, changes = CASES[case]
    return tiny(family, **changes)


def prepare_dynamic(model: ViT, **choices: Any) -> PreparedModel:
    settings = ExportSettings(dynamic_size=True, **{"input": "float", **choices})
    return prepare(model, PROCESSOR, settings)


def list_outputs(model: ViT) -> tuple[str, ...]:
    names = ("logits", "embedding", "tokens")
    return (*names, "attention") if model.config.tokens.cls else names


def check_equal(prepared: PreparedModel, run: Callable[[Tensor], Any], bound: float) -> None:
    """Compare every output at every size and two batch sizes."""
    for height, width in SIZES:
        for count in (1, 2):
            images = pixels(count, height, width)
            with torch.inference_mode():
                wanted, results = prepared.compute_reference(images), run(images)
            for name, result in zip(prepared.outputs, results, strict=True):
                assert result.shape == wanted[name].shape
                distance = relative_distance(result, wanted[name])
                assert distance <= bound, (height, width, name, distance)


@pytest.mark.parametrize("old", [1, 2, 4, 14])
@pytest.mark.parametrize(
    ("mode", "antialias", "corners"),
    [
        (*kernel, corners)
        for kernel in KERNELS
        for corners in (False, True)
        if not (corners and kernel[0] == "nearest")
    ],
)
def test_matrix_equals_interpolate(mode: str, antialias: bool, corners: bool, old: int) -> None:
    """The columns of the identity, resized by torch, are the matrix; nearest has no corners."""
    rule, columns = ResizeRule(mode, antialias, corners), torch.eye(old)[None, :, :, None]
    # Three equal columns: torch's antialiased kernels misread some images of one.
    columns = columns.repeat(1, 1, 1, 3)
    for new in (1, 2, 3, 4, 5, 8, 13, 14, 28, 37):
        wanted = F.interpolate(
            columns, size=(new, 3), mode=mode, antialias=antialias,
            align_corners=None if mode == "nearest" else corners,
        )[0, :, :, 0].T  # fmt: skip
        matrix = resize_matrix(old, new, rule)
        assert matrix.shape == (new, old)
        torch.testing.assert_close(matrix, wanted, atol=4e-6, rtol=0)
        part = resize_matrix(old, max(new - 1, 1), rule, torch.tensor(new))
        torch.testing.assert_close(part, wanted[: max(new - 1, 1)], atol=4e-6, rtol=0)


@pytest.mark.parametrize("new", [2, 3, 5, 8, 16])
def test_offset_moves_the_points_as_a_ratio_does(new: int) -> None:
    columns = torch.eye(4)[None, :, :, None]
    ratio = ((new + 0.1) / 4, 1.0)
    wanted = F.interpolate(columns, scale_factor=ratio, mode="bicubic")[0, :, :, 0].T
    matrix = resize_matrix(4, new, ResizeRule("bicubic", offset=0.1))
    torch.testing.assert_close(matrix, wanted, atol=4e-6, rtol=0)
    assert (matrix - resize_matrix(4, new, ResizeRule("bicubic"))).abs().max() > 1e-3


@every_case
def test_modules_equal_those_of_the_model(case: str) -> None:
    """Positions themselves are compared: in the outputs their errors would be small."""
    model = build(case)
    changes = resize_in_graph(model)
    embed, attn_position = changes["patch_embed"], changes["attn_position"]
    assert embed is not None
    with torch.inference_mode():
        for grid in GRIDS:
            images = pixels(2, grid[0] * 8, grid[1] * 8 + 3)
            assert relative_distance(embed(images), model.patch_embed(images)) <= BOUND, grid
            if model.attn_position is None:
                continue
            assert isinstance(attn_position, AttentionPosition)
            pairs = zip(
                attn_position.per_block(grid, images.device, 1),
                model.attn_position.per_block(grid, images.device, 1),
                strict=False,
            )
            (pair,) = [next(iter(pairs))]
            assert relative_distance(*pair) <= BOUND, grid


@every_case
def test_learned_grid_has_the_learned_positions(case: str) -> None:
    model = build(case)
    changes, images = resize_in_graph(model), pixels(2, *model.config.image_size)
    embed, attn_position = changes["patch_embed"], changes["attn_position"]
    assert embed is not None
    with torch.inference_mode():
        assert torch.equal(embed(images), model.patch_embed(images))
        if isinstance(attn_position, AttentionPosition):
            results = attn_position.per_block(model.config.grid_size, images.device, 1)
            assert torch.equal(next(iter(results)), next(iter(model.attn_positions(images))))


def test_model_is_only_read() -> None:
    model = tiny("beit_timm")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_dynamic(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(vitlib.VitlibError, match="hold no whole patch"):
        model(pixels(1, 4, 32))


def test_square_of_the_longer_side_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that has such a field needs no code of its own."""

    class SquareRule(NamedTuple):
        mode: str
        antialias: bool = False
        align_corners: bool = False
        float32: bool = True
        offset: float = 0.0
        square: bool = True

    monkeypatch.setitem(POSITION_RESIZE, "square", SquareRule("bilinear"))  # type: ignore[misc]
    learned = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0))
    for h, w in ((7, 3), (3, 7), (4, 3), (4, 4)):
        side = max(h, w)
        wide = F.interpolate(learned.permute(2, 0, 1)[None], size=(side, side), mode="bilinear")
        wanted = wide[0, :, :h, :w].flatten(1).T
        result = choose_resize("square")(learned, (h, w))
        assert relative_distance(result, wanted) <= BOUND


def test_unknown_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrappedRule(NamedTuple):
        mode: str = "bilinear"
        antialias: bool = False
        wrap: bool = True

    class Unknown(AttentionPosition):
        pass

    monkeypatch.setitem(POSITION_RESIZE, "bilinear", WrappedRule())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"position_resize='bilinear': .* \(image_size="):
        resize_in_graph(tiny("vit", position_resize="bilinear"))
    monkeypatch.setitem(POSITION_RESIZE, "bilinear", ResizeRule("area"))
    with pytest.raises(ConfigError, match="position_resize='bilinear'"):
        resize_in_graph(tiny("vit", position_resize="bilinear"))
    model = tiny("beit")
    model.attn_position.resize = "cubic"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="relative_resize='cubic'"):
        resize_in_graph(model)
    model.attn_position = Unknown()
    with pytest.raises(ConfigError, match="Unknown: no file can compute"):
        resize_in_graph(model)


def test_grid_of_one_patch_or_too_many_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"8x32 have 1x4 patches: .* 2 to 256 a side"):
        prepare_dynamic(tiny("vit"), image_size=(8, 32))
    with pytest.raises(ConfigError, match="16x257 patches"):
        prepare_dynamic(tiny("vit"), image_size=(128, 257 * 8))


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (16, 24), (2048, 2048), (32, 35)])
def test_file_is_checked_at_three_sizes_of_three_shapes(size: tuple[int, int]) -> None:
    processor = ImageProcessor(size=size, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    prepared = prepare(tiny("vit"), processor, ExportSettings(dynamic_size=True))
    sizes = list_sizes(prepared)
    assert sizes[0] == size
    grids = [(height // 8, width // 8) for height, width in sizes]
    assert len(set(grids)) == 3
    assert all(2 <= side <= MAX_PATCHES for grid in grids for side in grid)
    assert any(h > w for h, w in grids)
    assert any(h < w for h, w in grids)
    assert prepared.info.image_size is None


@pytest.mark.parametrize("image_size", [(32, 32), (40, 32), (32, 40), (32, 24)])
def test_example_has_sides_that_differ_and_are_not_learned(image_size: tuple[int, int]) -> None:
    model = tiny("vit", image_size=image_size)
    height, width = prepare_dynamic(model).example().shape[2:]
    assert height != width
    assert height not in (*image_size, 8)
    assert width not in (*image_size, 8)


class Run(NamedTuple):
    """A program of torch.export and the model that it was made from."""

    prepared: PreparedModel
    program: nn.Module


def export_program(case: str) -> Run:
    model = build(case)
    prepared = prepare_dynamic(model, outputs=list_outputs(model))
    shapes = prepared.dynamic_shapes()
    with quiet_exporter():
        program = torch.export.export(prepared.graph, (prepared.example(),), dynamic_shapes=shapes)
    return Run(prepared, program.module())


@pytest.mark.parametrize("case", ["dinov2", "beit_timm"])
def test_program_takes_any_size(case: str) -> None:
    prepared, program = export_program(case)
    check_equal(prepared, program, BOUND)


@pytest.mark.export
@every_case
def test_program_of_every_family_takes_any_size(case: str) -> None:
    prepared, program = export_program(case)
    check_equal(prepared, program, BOUND)


@pytest.mark.export
@every_case
def test_onnx_file_of_every_family_takes_any_size(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX files are written by torch with onnxscript")
    pytest.importorskip("onnxruntime", reason="ONNX files are run by ONNX Runtime")
    model = build(case)
    prepared = prepare_dynamic(model, outputs=list_outputs(model))
    file = open_file(write_onnx(prepared, tmp_path))
    assert file.input_shape == (None, 3, None, None)

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in file.run(images.numpy()).values()]

    check_equal(prepared, run, BOUND)


@pytest.mark.export
def test_dinov2_small_at_three_sizes(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX files are written by torch with onnxscript")
    pytest.importorskip("onnxruntime", reason="ONNX files are run by ONNX Runtime")
    folder = SHARED / "models/dinov2-small"
    if not folder.is_dir():
        pytest.skip("the shared models are absent")
    predictor = vitlib.Predictor.load(folder)
    settings = ExportSettings(("embedding", "tokens"), "float", dynamic_size=True)
    prepared = prepare(predictor.model, predictor.image_processor, settings)
    file = open_file(write_onnx(prepared, tmp_path))
    for size in ((224, 224), (518, 518), (448, 672)):
        images, wanted = pixels(1, *size), {}
        wanted = prepared.compute_reference(images)
        for name, result in file.run(images.numpy()).items():
            assert relative_distance(torch.from_numpy(result), wanted[name]) <= 1e-5, (size, name)
