"""Published models of pathology: the pool, preprocessing and facts of their authors."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vitlib
from fixtures import references
from fixtures.layout_files import make_pixels
from fixtures.timm_folders import save_bare, small_model
from paths import FIXTURES
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.timm_models import get_architecture
from vitlib.checkpoint.published import list_recipes
from vitlib.checkpoint.read import read_checkpoint
from vitlib.source.locate import Source

PATHOLOGY = FIXTURES / "pathology"
TINY = 2e-6
FOLDERS = {
    "uni": ("MahmoodLab/UNI", "cls"),
    "uni2_h": ("MahmoodLab/UNI2-h", "cls"),
    "virchow2": ("paige-ai/Virchow2", "cls+mean"),
    "gigapath": ("prov-gigapath/prov-gigapath", "cls"),
    "h0_mini": ("bioptimus/H0-mini", "cls+mean"),
}
GELU, GATED = {}, {"gated": True}
SHIFTED = {"pos_embed_cls": False}
# id -> width, MLP, patch, registers; layer scale unless "plain"; heads, pool, mean of red, resize.
FILES: dict[str, tuple[tuple[int, int, int, int], dict[str, bool], int, str, float, str]] = {
    "MahmoodLab/UNI": ((1024, 4096, 16, 0), GELU, 16, "cls", 0.485, "224 (bilinear)"),
    "MahmoodLab/UNI2-h": (
        (1536, 4096, 14, 8),
        GATED | SHIFTED,
        24,
        "cls",
        0.485,
        "224 (bilinear)",
    ),
    "paige-ai/Virchow": ((1280, 3416, 14, 0), GATED, 16, "cls+mean", 0.485, "224 (bicubic)"),
    "paige-ai/Virchow2": ((1280, 3416, 14, 4), GATED, 16, "cls+mean", 0.485, "224 (bicubic)"),
    "prov-gigapath/prov-gigapath": (
        (1536, 4096, 16, 0),
        GATED,
        24,
        "cls",
        0.485,
        "256 (bicubic); crop 224x224",
    ),
    "bioptimus/H-optimus-0": (
        (1536, 4096, 14, 4),
        GATED | SHIFTED,
        24,
        "cls",
        0.707223,
        "224 (bicubic)",
    ),
    "bioptimus/H-optimus-1": (
        (1536, 4096, 14, 4),
        GATED | SHIFTED,
        24,
        "cls",
        0.707223,
        "224 (bicubic)",
    ),
    "bioptimus/H0-mini": (
        (768, 2048, 14, 4),
        GATED | SHIFTED,
        12,
        "cls+mean",
        0.707223,
        "224 (bicubic)",
    ),
    "kaiko-ai/vits16": ((384, 1536, 16, 0), {"plain": True}, 6, "cls", 0.5, "224 (bilinear)"),
    "kaiko-ai/vitb8": ((768, 3072, 8, 0), {"plain": True}, 12, "cls", 0.5, "224 (bilinear)"),
    "kaiko-ai/vitl14": ((1024, 4096, 14, 4), SHIFTED, 16, "cls", 0.5, "224 (bilinear)"),
    "lunit-io/dino_vit_small_patch8": (
        (384, 1536, 8, 0),
        {"plain": True},
        6,
        "cls",
        0.70322989,
        "224 (bicubic)",
    ),
    "majiabo/GPFM": ((1024, 4096, 14, 0), GELU, 16, "cls", 0.485, "to 224x224 (bicubic)"),
    "MahmoodLab/CONCH": (
        (768, 3072, 16, 0),
        {"plain": True},
        12,
        "cls",
        0.48145466,
        "448 (bicubic)",
    ),
}


def make_timm_state(
    sizes: tuple[int, int, int, int], marks: dict[str, bool], dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Return random tensors of one block by timm's names, with positions of 4x4 patches."""
    width, mlp, patch, registers = sizes
    rows = 16 + (1 + registers if marks.get("pos_embed_cls", True) else 0)
    hidden = 2 * mlp if marks.get("gated") else mlp
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, rows, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.attn.qkv.bias": (3 * width,),
        "blocks.0.attn.proj.weight": (width, width),
        "blocks.0.attn.proj.bias": (width,),
        "blocks.0.mlp.fc1.weight": (hidden, width),
        "blocks.0.mlp.fc1.bias": (hidden,),
        "blocks.0.mlp.fc2.weight": (width, mlp),
        "blocks.0.mlp.fc2.bias": (width,),
    }
    norms = ("blocks.0.norm1", "blocks.0.norm2", "norm")
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    if registers:
        shapes["reg_token"] = (1, registers, width)
    if not marks.get("plain"):
        shapes |= {f"blocks.0.ls{i}.gamma": (width,) for i in (1, 2)}
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=dtype) / 32 for name, shape in shapes.items()}


def save_file(state: dict[str, Any], path: Path) -> Path:
    torch.save(state, path)
    return path


def load_and_remove(path: Path, **options: Any) -> vitlib.ViT:
    """Load a wide model and remove its file, which memory-maps."""
    model = vitlib.load(path, **options)
    path.unlink()
    return model


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_of_timm_gives_embedding_of_the_card(name: str) -> None:
    """The tokens are timm's, and the stated id pools them as the authors' code does."""
    published, pool = FOLDERS[name]
    outputs = load_file(PATHOLOGY / f"{name}.outputs.safetensors")
    model = vitlib.load(PATHOLOGY / name)
    authors = vitlib.load(PATHOLOGY / name, architecture=published)
    assert (model.config.pool, authors.config.pool) == ("cls", pool)
    pixels = make_pixels(*model.config.image_size)
    with torch.inference_mode():
        assert references.distance(model.forward_features(pixels), outputs["tokens"]) < TINY
        assert references.distance(authors(pixels), outputs["embedding"]) < TINY
        if pool == "cls+mean":
            stated = vitlib.load(PATHOLOGY / name, pool="cls+mean")
            assert torch.equal(stated(pixels), authors(pixels))
            # A mean that takes the registers in is another one.
            tokens = model.forward_features(pixels)
            other = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
            assert references.distance(other, outputs["embedding"]) > 100 * TINY


def test_folder_of_timm_keeps_its_own_preprocessing() -> None:
    model = vitlib.load(PATHOLOGY / "h0_mini", architecture="bioptimus/H0-mini")
    assert isinstance(model.image_processor, vitlib.ImageProcessor)
    assert model.image_processor.crop_size == (42, 42)
    assert model.image_processor.image_mean == (0.707223, 0.578729, 0.703617)


def test_hub_id_logs_the_authors_pool(tmp_path: Path) -> None:
    repository = tmp_path / "models--paige-ai--Virchow2"
    shutil.copytree(PATHOLOGY / "virchow2", repository / "snapshots/0123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123")
    source = Source("paige-ai/Virchow2", cache_dir=tmp_path, local_files_only=True)
    assert read_checkpoint(source).notes == (
        "pool='cls' as its files say; its authors use 'cls+mean': give "
        "architecture='paige-ai/Virchow2' (--architecture) or pool='cls+mean' (--pool)",
    )
    assert not read_checkpoint(source, facts=Facts(pool="cls")).notes
    assert not read_checkpoint(source, facts=Facts(architecture="paige-ai/Virchow2")).notes


def test_folder_of_another_architecture_is_rejected() -> None:
    with pytest.raises(
        vitlib.VitlibError, match=r"config\.json says 'vit_huge_patch14_224', expec"
    ):
        vitlib.load(PATHOLOGY / "virchow2", architecture="MahmoodLab/UNI")


def test_folder_without_what_authors_pass_in_code_needs_the_id(tmp_path: Path) -> None:
    """UNI's card passes init_values to timm, for its config.json does not have them."""
    config = json.loads((PATHOLOGY / "uni/config.json").read_text())
    config["model_args"] = {"img_size": 64, "num_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = make_timm_state((1024, 4096, 16, 0), GELU)
    path = save_file(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(vitlib.VitlibError, match=r"layer_scale False .* if this is MahmoodLab/UNI"):
        vitlib.load(tmp_path)
    model = vitlib.load(tmp_path, architecture="MahmoodLab/UNI")
    path.unlink()
    assert (model.config.num_heads, model.config.pool) == (16, "cls")


@pytest.mark.parametrize("name", FILES)
def test_bare_file_is_read_as_its_authors_run_it(name: str, tmp_path: Path) -> None:
    sizes, marks, num_heads, pool, mean, resize = FILES[name]
    state: dict[str, Any] = make_timm_state(sizes, marks)
    if name == "majiabo/GPFM":  # a training checkpoint of DINOv2, with blocks in chunks
        state = {
            f"backbone.{key.replace('blocks.0.', 'blocks.0.0.')}": tensor
            for key, tensor in state.items()
        }
        state["backbone.mask_token"] = torch.zeros(1, sizes[0])
        state["dino_head.last_layer.weight_g"] = torch.zeros(1, 1)
        state = {"teacher": state}
    if name == "MahmoodLab/CONCH":
        state = {f"visual.trunk.{key}": tensor for key, tensor in state.items()}
        state |= {"visual.attn_pool_contrast.query": torch.zeros(1, 512)}
        state |= {"text.cls_emb": torch.zeros(768), "logit_scale": torch.zeros(())}
    path = save_file(state, tmp_path / "pytorch_model.bin")
    model = load_and_remove(path, architecture=name)
    assert (model.config.num_heads, model.config.pool) == (num_heads, pool)
    assert model.config.num_registers == sizes[3]
    processor = model.image_processor
    assert isinstance(processor, vitlib.ImageProcessor)
    assert processor.image_mean is not None
    assert processor.image_mean[0] == pytest.approx(mean)
    assert resize in processor.describe()
    side = 448 if name == "MahmoodLab/CONCH" else 224
    assert processor.crop_size in (None, (side, side))


def test_stated_id_assumes_nothing_and_its_case_does_not_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_timm_state((384, 1536, 16, 0), {"plain": True})
    path = save_file(state, tmp_path / "vits16.pth")
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(path)
    assert "preprocessing assumed" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(path, architecture="Kaiko-AI/VITS16")
    assert not caplog.messages


def test_load_says_what_the_authors_do_not_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_timm_state((384, 1536, 8, 0), {"plain": True})
    path = save_file(state, tmp_path / "dino_vit_small_patch8_ep200.torch")
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(path, architecture="lunit-io/dino_vit_small_patch8")
    assert "state no resize of other sizes" in caplog.text


def test_bare_file_of_one_published_model_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_timm_state((1280, 3416, 14, 4), GATED)
    path = save_file(state, tmp_path / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING, "vitlib"):
        model = load_and_remove(path, layout="timm")
    assert model.config.pool == "cls"
    assert "architecture='paige-ai/Virchow2' (--architecture) gives the pool" in caplog.text


@pytest.mark.parametrize("pool", ["mean", "cls+mean"])
def test_pool_of_tokens_may_be_stated_of_a_bare_file(pool: Any, tmp_path: Path) -> None:
    state = make_timm_state((384, 1536, 8, 0), {"plain": True}, torch.float32)
    path = save_file(state, tmp_path / "vits8.pth")
    pixels = torch.randn(2, 3, 32, 32)
    for layout in ("timm", "meta"):
        model = vitlib.load(path, pool=pool, layout=layout)  # type: ignore[arg-type]
        tokens = model.forward_features(pixels)
        mean = tokens[:, 1:].mean(1)
        expected = mean if pool == "mean" else torch.cat([tokens[:, 0], mean], dim=1)
        torch.testing.assert_close(model(pixels), expected)


def test_pool_of_a_classifier_is_its_own(tmp_path: Path) -> None:
    state = make_timm_state((384, 1536, 16, 0), {"plain": True})
    state |= {"head.weight": torch.zeros(3, 384), "head.bias": torch.zeros(3)}
    path = save_file(state, tmp_path / "model.pth")
    with pytest.raises(vitlib.VitlibError, match="pool='cls"):
        vitlib.load(path, pool="cls+mean")


def save_base_model(kind: str, prefix: str, folder: Path, **changes: Any) -> Path:
    """Save a tiny model of transformers without a classifier and without preprocessing."""
    references.save_model(kind, folder)
    state = load_file(folder / "model.safetensors")
    names = {n: n.removeprefix(prefix) for n in state if not n.startswith("classifier.")}
    torch.save({new: state[old] for old, new in names.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text()) | changes
    config.pop("id2label")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_midnight_folder_of_transformers(tmp_path: Path) -> None:
    """Its card joins both; its folder has no preprocessing."""
    folder = save_base_model("dinov2", "dinov2.", tmp_path / "m", architectures=["Dinov2Model"])
    base = vitlib.load(folder)
    assert (base.config.pool, base.image_processor) == ("cls", None)
    model = vitlib.load(folder, architecture="kaiko-ai/midnight")
    assert isinstance(model.image_processor, vitlib.ImageProcessor)
    assert model.image_processor.image_mean == (0.5, 0.5, 0.5)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = base.forward_features(pixels)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(model(pixels), expected)
    stated = vitlib.load(folder, pool="cls+mean")
    assert torch.equal(stated(pixels), model(pixels))
    with pytest.raises(vitlib.VitlibError, match=r"config\.json says 'dinov2', expected 'vit'"):
        vitlib.load(folder, architecture="owkin/phikon")


def test_hibou_folder_has_registers_under_the_type_of_dinov2(tmp_path: Path) -> None:
    """transformers calls the same tensors dinov2_with_registers."""
    prefix, kind = "dinov2_with_registers.", {"architectures": ["Dinov2ModelWithRegisters"]}
    expected = vitlib.load(save_base_model("registers", prefix, tmp_path / "a", **kind))
    kind |= {"model_type": "dinov2"}
    folder = save_base_model("registers", prefix, tmp_path / "b", **kind)
    shutil.copy(tmp_path / "a/pytorch_model.bin", folder)
    model = vitlib.load(folder, architecture="histai/hibou-b")
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(pixels), expected(pixels))
    assert (model.config.num_registers, model.config.pool) == (3, "cls")


def test_hibou_file_of_the_original_code(tmp_path: Path) -> None:
    state = make_timm_state((768, 2048, 14, 4), GATED)
    state = {
        key.replace("fc1", "w12").replace("fc2", "w3").replace("reg_token", "register_tokens"): t
        for key, t in state.items()
    }
    state["pos_embed"] = state["pos_embed"][:, :17]  # registers of this code have no positions
    path = save_file(state, tmp_path / "hibou-b.pth")
    model = load_and_remove(path, architecture="histai/hibou-b")
    assert (model.config.num_heads, model.config.activation) == (12, "swiglu")
    assert isinstance(model.image_processor, vitlib.ImageProcessor)
    assert model.image_processor.image_std == (0.195, 0.2316, 0.1816)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("owkin/phikon", {"family": "vit"}),
        (
            "histai/hibou-b",
            {"family": "dinov2_with_registers", "num_registers": 4, "patch_size": 14}
            | {"layer_scale": 1.0, "activation": "swiglu", "mlp_dim": 2048, "image_size": 28},
        ),
    ],
)
def test_file_of_transformers_without_config(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = small_model(**{"embed_dim": 768, "num_heads": 12, "num_classes": 0} | fields)
    loaded = load_and_remove(save_bare(model, tmp_path, "hf"), architecture=name)
    config = loaded.config
    assert (config.num_heads, config.pool, config.family) == (12, "cls", fields["family"])
    assert (loaded.image_processor is None) == (name == "owkin/phikon")


def test_every_recipe_names_what_the_tables_have() -> None:
    for name, recipe in list_recipes().items():
        assert recipe.page.startswith("https://"), name
        assert recipe.row is None or get_architecture(recipe.row), name
        fields = recipe.build_fields((224, 224))
        if fields is not None:
            assert vitlib.ImageProcessor(**fields).describe()
