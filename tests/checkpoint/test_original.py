"""Files of EVA-02, Perception Encoder, BEiT-3 and ViT-5 in the names of their authors' code.

Their code made the files and their outputs (fixtures/make_original.py). test_layouts.py proves
logits and tokens of each, and the files that vitlib writes; this file proves pooled vectors, that
each fact of the code matters, where facts come from, and what is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vitlib
from fixtures import references
from fixtures.layout_files import load_fixture, make_pixels, weights_path
from fixtures.timm_rotary import rebuild
from paths import FIXTURES
from vitlib.checkpoint.layouts.equivalences import join_rotary_pairs
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.meta import LAYOUT
from vitlib.checkpoint.layouts.table import read_state
from vitlib.checkpoint.layouts.timm_models import list_supported
from vitlib.checkpoint.read import build_empty
from vitlib.config import ViTConfig
from vitlib.errors import VitlibError
from vitlib.source.locate import Source

TINY = 2e-6  # as in test_parity.py
DIFFERS = 1e-3
POOLED = ["eva02", "eva02_tiny", "eva02_clip", "eva02_clip_e", "beit3", "beit3_retrieval"]
POOLED += ["pe_core", "pe_core_no_class_token", "vit5"]
TOKENS = ["pe_lang", "pe_spatial"]
ROTARY = [name for name in (*POOLED, *TOKENS) if "beit3" not in name and name != "eva02_clip_e"]
FAMILIES = {"eva02": "eva02", "vit_pe_": "perception_encoder", "beit3": "beit3"}
Damage = Callable[[vitlib.ViT], vitlib.ViT]


@torch.inference_mode()
def compare(model: vitlib.ViT, name: str) -> float:
    """Return the largest error of all outputs that the authors' code gave, on and off the grid."""
    errors = []
    for key, expected in load_file(FIXTURES / f"meta/{name}.expected.safetensors").items():
        output, _, size = key.partition("@")
        height, width = map(int, size.split("x"))
        images = make_pixels(height, width)
        actual = model(images) if output == "logits" else model.forward_features(images)
        actual = model.pool(actual) if output == "pooled" else actual
        errors.append(references.distance(actual, expected))
    assert len(errors) >= 3
    return max(errors)


def read_tensors(name: str) -> dict[str, Tensor]:
    """Return the tensors of a fixture by the file's names."""
    return dict(Source(weights_path(f"meta/{name}")).tensors())


def save(tensors: dict[str, Tensor], folder: Path) -> Path:
    """Write a .pth file."""
    torch.save(tensors, folder / "model.pth")
    return folder / "model.pth"


@pytest.mark.parametrize("name", [*POOLED, *TOKENS])
def test_load_equals_the_authors_code_on_and_off_the_grid(name: str) -> None:
    assert compare(load_fixture(f"meta/{name}"), name) < TINY


@pytest.mark.parametrize("name", [*POOLED, *TOKENS])
def test_saved_file_equals_the_authors_code(name: str, tmp_path: Path) -> None:
    """The sidecar that vitlib writes says what no tensor does: nothing must be stated."""
    model = load_fixture(f"meta/{name}")
    vitlib.save(model, tmp_path, layout="meta")
    again = vitlib.load(tmp_path)
    assert again.config == model.config
    assert compare(again, name) < TINY


def _without_rope(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, rope=None)


def _other_theta(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "rope", theta=2500.0)


def _apart_pairs(model: vitlib.ViT) -> vitlib.ViT:
    state = dict(model.state_dict())
    join_rotary_pairs(model.config, state, inverse=True)
    model.load_state_dict(state)
    return model


def _other_axes(model: vitlib.ViT) -> vitlib.ViT:
    assert model.config.rope is not None
    return rebuild(model, "rope", axes="ij" if model.config.rope.axes == "xy" else "xy")


def _other_reference_grid(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "rope", reference_grid=(14, 14))


def _without_offset(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "rope", offset=0.0)


def _registers_at_rest(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "rope", register_theta=None)


def _registers_of_patch_theta(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "rope", register_theta=10000.0)


def _layer_norm(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", kind="layer")


def _without_norm_of_keys(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", qk=None)


def _norms_before_branches(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", post=False)


def _without_norm_in_attention(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", attn=False)


def _without_norm_in_mlp(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", mlp=False)


def _other_pool_heads(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "attention_pool", num_heads=4)


def _pool_of_patches(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "attention_pool", prefix_tokens=False)


def _other_resize(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, position_resize="bicubic_antialias")


def _other_eps(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, norm_eps=1e-2)


CONTROLS: list[tuple[str, Damage]] = [
    *((name, _without_rope) for name in ROTARY if name != "vit5"),
    *((name, damage) for name in ROTARY for damage in (_other_theta, _apart_pairs, _other_axes)),
    *((name, _other_reference_grid) for name in ("eva02", "eva02_tiny", "eva02_clip", "vit5")),
    *((name, _without_offset) for name in ("pe_core", *TOKENS)),
    *((name, _without_norm_in_mlp) for name in ("eva02", "eva02_clip", "beit3")),
    *((name, _without_norm_in_attention) for name in ("eva02_clip", "beit3", "beit3_retrieval")),
    *((name, _other_pool_heads) for name in ("pe_core", "pe_core_no_class_token")),
    *((name, _other_resize) for name in (*POOLED, *TOKENS)),
    *((name, _other_eps) for name in (*POOLED, *TOKENS)),
    ("pe_core", _pool_of_patches),
    ("eva02_clip_e", _norms_before_branches),
    ("vit5", _registers_at_rest),
    ("vit5", _registers_of_patch_theta),
    ("vit5", _layer_norm),
    ("vit5", _without_norm_of_keys),
]


@pytest.mark.parametrize(
    ("name", "damage"), CONTROLS, ids=lambda value: getattr(value, "__name__", value)
)
def test_another_fact_gives_other_numbers(name: str, damage: Damage) -> None:
    assert compare(damage(load_fixture(f"meta/{name}")), name) > DIFFERS


# --- facts that no tensor says --------------------------------------------------------------------


def write_published(name: str) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Return a published model as its authors run it, and its tensors without memory."""
    family = next(family for word, family in FAMILIES.items() if word in name)
    cfg = ViTConfig.named(name, num_classes=0)
    assert cfg.family == family
    if family == "perception_encoder" and cfg.rope is not None:
        cfg = replace(cfg, rope=replace(cfg.rope, reference_grid=None))
    return cfg, LAYOUT.write(cfg, dict(build_empty(cfg).state_dict())).tensors


PUBLISHED = [
    model.name
    for model in list_supported()
    if any(word in model.name for word in FAMILIES) and "giant_patch14" not in model.name
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_say_heads_and_rotation(name: str) -> None:
    cfg, tensors = write_published(name)
    # Some people save parameters alone: without the rotary tables of EVA-02.
    tensors = {key: tensor for key, tensor in tensors.items() if "rope.freqs" not in key}
    name_match = LAYOUT.find(tensors)
    state = read_state(tensors, name_match)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    parsed = LAYOUT.read(lambda _: None, shapes, name_match, Facts())
    assert "num_heads" not in parsed.doubtful
    for field in ("num_heads", "rope", "norms", "attention_pool", "family", "activation"):
        assert getattr(parsed.config, field) == getattr(cfg, field), field
    with pytest.raises(VitlibError, match=r"num_heads=1 is stated, and no published model"):
        LAYOUT.read(lambda _: None, shapes, name_match, Facts(num_heads=1))


def test_rotary_tables_say_the_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vitlib"):
        model = vitlib.load(weights_path("meta/eva02"))
    assert model.config.num_heads == 2
    assert "num_heads" not in caplog.text
    tensors = read_tensors("eva02")
    bare = {name: tensor for name, tensor in tensors.items() if "rope.freqs" not in name}
    with pytest.raises(VitlibError, match=r"no rotary table .*no published model has"):
        vitlib.load(save(bare, tmp_path), num_heads=2)
    stated = vitlib.load(save(bare, tmp_path), num_heads=2, architecture="eva02_base_patch14_224")
    assert compare(stated, "eva02") < TINY


def test_rounded_rotary_tables_are_read(tmp_path: Path) -> None:
    tensors = read_tensors("eva02")
    rounded = {n: t.bfloat16() if "rope.freqs" in n else t for n, t in tensors.items()}
    assert compare(vitlib.load(save(rounded, tmp_path)), "eva02") < TINY


def test_heads_of_unpublished_shapes_are_assumed_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vitlib"):
        vitlib.load(weights_path("meta/beit3"))
    assert "assumed, because no file states it: num_heads=1" in caplog.text


def test_pool_of_models_without_one_is_assumed_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vitlib"):
        load_fixture("meta/pe_lang")
    assert "pool='mean'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="vitlib"):
        model = load_fixture("meta/pe_lang", pool="cls")
    assert "pool=" not in caplog.text
    assert model.config.pool == "cls"


# --- wrong files ----------------------------------------------------------------------------------


def _drop(tensors: dict[str, Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


def _change_tables(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "freqs" in name]:
        tensors[name] = tensors[name].flip(-1) + 0.1


def _drop_pool(tensors: dict[str, Tensor]) -> None:
    for part in ("attn_pool", "ln_post", "proj"):
        for name in [n for n in tensors if n.startswith(part)]:
            del tensors[name]


def _add_second_norm(tensors: dict[str, Tensor]) -> None:
    for leaf in ("weight", "bias"):
        tensors[f"beit3.encoder.layer_norm.A.{leaf}"] = torch.ones(16)


WRONG: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "eva02 of other angles": ("eva02", _change_tables, "its angles are not EVA-02's"),
    "vit5 of other periods": ("vit5", _change_tables, "its frequencies are not ViT-5's"),
    "eva02 without a norm": ("eva02", lambda t: _drop(t, "fc_norm"), "missing: norm"),
    "beit3 with two norms": ("beit3", _add_second_norm, "vitlib computes one final norm"),
    "beit3 without a norm": ("beit3", lambda t: _drop(t, "fc_norm"), "neither fc_norm.weight nor"),
    "vit5 without registers": (
        "vit5",
        lambda t: _drop(t, "reg_token"),
        "no registers .reg_token.: expected both",
    ),
    "CLIP's names alone": ("pe_core_no_class_token", _drop_pool, "without its final norm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_is_refused(case: str, tmp_path: Path) -> None:
    name, damage, message = WRONG[case]
    tensors = read_tensors(name)
    damage(tensors)
    with pytest.raises(VitlibError, match=message):
        vitlib.load(save(tensors, tmp_path), num_heads=2)


@pytest.mark.parametrize("name", ["pe_lang", "pe_spatial", "eva02_clip_e"])
def test_tensors_of_several_models_need_an_architecture(name: str) -> None:
    with pytest.raises(VitlibError, match=r"(final norm|before the branches).*: "):
        vitlib.load(weights_path(f"meta/{name}"), num_heads=2)


def test_rms_norms_of_other_code_are_refused(tmp_path: Path) -> None:
    """EVA-CLIP-8B and -18B have the same names; in one norms stand before, in one after."""
    tensors = read_tensors("eva02_clip_e")
    tower = {n.removeprefix("visual."): t for n, t in tensors.items() if n.startswith("visual.")}
    without_biases = {
        name: tensor
        for name, tensor in tower.items()
        if not name.endswith(("norm1.bias", "norm2.bias", "norm.bias", "q_bias", "v_bias"))
    }
    with pytest.raises(VitlibError, match=r"Norms.kind='rms'. in names .* EVA-CLIP-8B"):
        vitlib.load(save(without_biases, tmp_path), num_heads=2, layout="meta")


STATED = [
    ("eva02", "eva02_base_patch16_clip_224", r"norms mlp=1 attn=1|norms attn=1 mlp=1"),
    ("pe_lang", "vit_pe_spatial_base_patch16_512", "layer_scale 0 .the tensors have 1"),
    ("pe_core", "vit_pe_core_gigantic_patch14_448", "class_token 0 .the tensors have 1"),
    ("beit3", "vit_base_patch16_224", "norms 0 .the tensors have attn=1 mlp=1"),
]


@pytest.mark.parametrize(("name", "architecture", "message"), STATED)
def test_another_architecture_is_refused(name: str, architecture: str, message: str) -> None:
    with pytest.raises(VitlibError, match=message):
        vitlib.load(weights_path(f"meta/{name}"), num_heads=2, architecture=architecture)


def test_layout_of_clip_names_that_of_perception_encoder() -> None:
    with pytest.raises(VitlibError, match=r"layout='meta' .on the command line --source-layout"):
        vitlib.load(weights_path("meta/pe_core"), layout="openclip")


def test_clip_is_still_read_as_clip() -> None:
    result = load_fixture("openclip/openai_clip")
    assert (result.config.family, result.config.rope) == ("clip", None)


SAVED: list[tuple[str, dict[str, Any]]] = [
    ("pe_core", {"rope": {"coords": "index", "axes": "xy", "offset": 1.0, "reference_grid": 4}}),
    ("vit5", {"rope": {"coords": "index", "theta": 10000.0, "reference_grid": 4}}),
    ("eva02", {"rope": {"coords": "index", "theta": 100.0, "reference_grid": 16}}),
    ("beit3", {"norms": {"attn": True}}),
]


@pytest.mark.parametrize(("name", "changes"), SAVED)
def test_models_that_the_code_cannot_run_are_not_written(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = rebuild(load_fixture(f"meta/{name}"), **changes)
    with pytest.raises(VitlibError, match="the original code cannot run a model with"):
        vitlib.save(model, tmp_path / "out", layout="meta")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["eva02", "pe_core", "beit3", "vit5"])
def test_oblong_grids_are_not_written(name: str, tmp_path: Path) -> None:
    stated = {"image_size": (12, 20), "num_heads": 2}
    model = vitlib.load(weights_path(f"meta/{name}"), **stated)
    if name == "vit5" and model.config.rope is not None:
        model = rebuild(model, "rope", reference_grid=(3, 5))
    with pytest.raises(VitlibError, match=r"expected squares, which alone the original code"):
        vitlib.save(model, tmp_path / "out", layout="meta")


# Of a model of 16 pixels: shorter edge or (height, width), Pillow's filter, first mean.
TRANSFORMS: dict[str, tuple[object, int, float]] = {
    "eva02": (18, 3, 0.481),
    "eva02_tiny": (18, 3, 0.481),
    "eva02_clip": (16, 3, 0.481),
    "eva02_clip_e": (16, 3, 0.481),
    "pe_core": ((16, 16), 2, 0.5),
    "pe_spatial": ((16, 16), 2, 0.5),
    "beit3": (16, 3, 0.485),
    "beit3_retrieval": ((16, 16), 3, 0.5),
    "vit5": (16, 3, 0.485),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_preprocessing_is_the_authors(name: str) -> None:
    processor = load_fixture(f"meta/{name}").image_processor
    assert processor is not None
    assert processor.image_mean is not None
    size = processor.shortest_edge or processor.size
    assert (size, processor.resample, round(processor.image_mean[0], 3)) == TRANSFORMS[name]
