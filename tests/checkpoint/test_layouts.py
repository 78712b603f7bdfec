"""Every layout, read and written, against files and outputs that its own library made.

The fixtures are pinned beside (fixtures/make_*.py made them, with the versions that each says):
tiny weights as the library saves them, and what it computes from them. Reading is proved by the
outputs, writing by giving back the library's own file, tensor by tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vitlib
from fixtures import references
from fixtures.layout_files import (
    NAMES,
    UNEQUAL,
    load_fixture,
    make_pixels,
    read_architecture,
    read_manifest,
    read_network,
    weights_path,
)
from paths import FIXTURES
from vitlib.checkpoint.families import FAMILY_NAMES, PROFILES, with_profile
from vitlib.checkpoint.layouts import openclip
from vitlib.checkpoint.layouts.detect import LAYOUTS
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.read import read_checkpoint
from vitlib.config import config_to_json
from vitlib.source.locate import Source

TINY = 2e-6  # as in test_parity.py
# What the library's file holds and vitlib's model of it does not, and so does not write.
DROPPED = {
    "meta/mae": ("decoder", "mask_token"),
    "meta/msn": ("fc.",),
    "meta/dinov3_untied": ("local_cls_norm",),
    "meta/dinov3_bf16_periods": ("rope_embed.periods",),
    "meta/beit": ("relative_position_index",),
    "meta/beit_cls": ("relative_position_index",),
    "meta/beit_shared": ("relative_position_index", "lm_head"),
    # Parts of text, and rows of positions that no forward reads.
    "meta/beit3": (".B.", "beit3.text_embed", "beit3.encoder.embed_positions"),
    "meta/beit3_retrieval": (
        ".B.",
        "beit3.text_embed",
        "beit3.encoder.embed_positions",
        "language_head",
        "logit_scale",
    ),
    "jax/siglip": ("params/txt/", "params/t", "params/b"),
    "openclip/openai_clip": ("",),
    # Positions of rows and of columns are written as the grid of their sums.
    "timm/naflex_parfac": ("embeds.pos_embed",),
    "timm/naflex_fac": ("embeds.pos_embed",),
    # Positions of registers are added to the registers; timm computes the same of both.
    "timm/reg4_map": ("pos_embed", "reg_token"),
    "timm/rms_norm": ("pos_embed", "reg_token"),
}


def answers(name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(which, its pixels, what the library gives), of logits and of all tokens."""
    for key, expected in load_file(FIXTURES / f"{name}.expected.safetensors").items():
        what, _, size = key.partition("@")
        if what in ("logits", "features"):
            height, width = map(int, size.split("x"))
            yield what, make_pixels(height, width), expected


@torch.inference_mode()
def worst(model: vitlib.ViT, name: str) -> float:
    result = []
    for what, images, expected in answers(name):
        actual = model(images) if what == "logits" else model.forward_features(images)
        result.append(references.distance(actual, expected))
    assert result
    return max(result)


def test_there_are_fixtures() -> None:
    assert {name.partition("/")[0] for name in NAMES} == set(LAYOUTS) - {"hf", "vitlib"}
    assert len(NAMES) > 50


@pytest.mark.parametrize("name", sorted({*NAMES} - UNEQUAL))
def test_layout_files_equal_their_library(name: str) -> None:
    model = load_fixture(name)
    assert worst(model, name) < TINY
    log = read_manifest(name)
    eps = log.get("norm_layer_eps", log.get("norm_eps", model.config.norm_eps))
    assert model.config.norm_eps in (eps if isinstance(eps, list) else [eps])


@pytest.mark.parametrize("name", sorted({*NAMES} - UNEQUAL))
def test_reading_would_notice(name: str) -> None:
    model = load_fixture(name)
    with torch.no_grad():
        attention = model.blocks[-1].attn
        attention.q.weight, attention.k.weight = attention.k.weight, attention.q.weight
        assert worst(model, name) > 10 * TINY


@pytest.mark.parametrize("name", sorted({*NAMES} - {"jax/bigvit_sincos"}))
def test_writes_what_they_wrote(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their file, read and written again, is their file: every name, shape and value."""
    layout = name.partition("/")[0]
    if name.startswith("openclip/timm_"):  # timm's models with smaller numbers under their names
        real = read_manifest(name)["config"]["vision_cfg"]["timm_model_name"]
        monkeypatch.setattr(openclip, "_timm_name", lambda _: real)
    stated = {"architecture": read_architecture(name), "num_heads": read_heads(name)}
    model = vitlib.load(weights_path(name), **stated)
    vitlib.save(model, tmp_path, layout=layout)
    reference_output, actual = read_network(weights_path(name)), read_network(tmp_path)
    reference_output = {k: v for k, v in reference_output.items() if not is_dropped(name, k)}
    actual = {k: v for k, v in actual.items() if not is_dropped(name, k)}
    reference_output, actual = respell(name, reference_output), respell(name, actual)
    assert reference_output.keys() == actual.keys()
    for key, tensor in reference_output.items():
        assert tensor.shape == actual[key].shape, key
        if (
            key.endswith("qkv.bias") and f"{key}_mask" in reference_output
        ):  # the keys' part is masked away
            mask = reference_output[f"{key}_mask"]
            assert torch.equal(tensor * mask, actual[key] * mask)
        else:
            assert torch.equal(tensor.float(), actual[key].float()), key
    again = vitlib.load(tmp_path, architecture=read_architecture(name))
    assert again.config == model.config
    for what, images, _ in answers(name):
        if what == "logits":
            with torch.inference_mode():
                assert torch.equal(again.float()(images), model.float()(images))


def read_heads(name: str) -> int | None:
    return None if name.startswith(("timm/", "jax/")) else load_fixture(name).config.num_heads


def is_dropped(name: str, key: str) -> bool:
    if name == "openclip/openai_clip" or name.startswith("openclip/"):
        return not key.startswith("visual.")
    parts = DROPPED.get(name, ())
    return any(
        key.startswith(part) or key.endswith(part) or part in key * part.startswith(".")
        for part in parts
    )


def respell(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Older or scanned spellings as the ones that are written."""
    if "dinov2_chunks" in name or "dinov2_train" in name:
        tensors = LAYOUTS["meta"].prepare(tensors)
    if name == "jax/bigvit_map_scan":
        tensors = LAYOUTS["jax"].prepare(tensors)
    if name == "jax/vit_gap":  # today's names of the one repository; written in the other's
        prefix, old = "params/", "Transformer/posembed_input/pos_embedding"
        tensors = {
            k.removeprefix(prefix).replace(old, "pos_embedding"): t for k, t in tensors.items()
        }
    if name == "torchvision/vit_legacy":
        swaps = {"mlp.linear_1": "mlp.0", "mlp.linear_2": "mlp.3"}
        for old, new in swaps.items():
            tensors = {key.replace(old, new): t for key, t in tensors.items()}
    return tensors


def test_the_table_tells_what_is_proved() -> None:
    from checkpoint_table import END, PAGE, START, table

    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(START)[2].partition(END)[0] == table(), "run tests/checkpoint_table.py"


@pytest.mark.parametrize("layout", sorted({*LAYOUTS} - {"hf"}))
@pytest.mark.parametrize("name", references.MODELS)
def test_layout_saves_or_refuses_family(name: str, layout: str, tmp_path: Path) -> None:
    """A saved model is the same function, but for the numerics that the layout cannot say."""
    references.save_model(name, tmp_path / "hf")
    model = vitlib.load(tmp_path / "hf")
    refused = ""
    try:
        lost = vitlib.save(model, tmp_path / layout, layout=layout)
    except vitlib.VitlibError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        assert not (tmp_path / layout).exists()
        return
    again = vitlib.load(tmp_path / layout)
    mine, reference_output = model.config, again.config
    for field in ("norm_eps", "activation", *["position_resize"] * mine.pos_embed):
        assert (field in lost) == (getattr(mine, field) != getattr(reference_output, field)), field
    numerics = {"norm_eps": mine.norm_eps, "activation": mine.activation}
    same = vitlib.load(tmp_path / layout, config=replace(reference_output, **numerics))
    images = torch.randn(2, mine.in_channels, *mine.image_size)
    with torch.inference_mode():
        assert references.distance(same(images), model(images)) < TINY


# --- profiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_profiles_set_the_numerics_and_nothing_else(profile: str, family: str) -> None:
    cfg = vitlib.ViTConfig(family=family, activation="gelu_tanh", norm_eps=0.1)
    other = with_profile(cfg, profile)
    log = {"norm_eps", "activation", "position_resize", "relative_resize"}
    before, after = config_to_json(cfg), config_to_json(other)
    changed = {name for name in before if before[name] != after[name]}
    assert "norm_eps" in changed
    assert changed <= log
    assert (family == "clip") <= (other.activation == "gelu_tanh")
    assert with_profile(replace(cfg, activation="swiglu"), profile).activation == "swiglu"


def test_a_profile_runs_one_librarys_file_as_another_does(tmp_path: Path) -> None:
    """Tensors of timm under JAX's numerics are what JAX computes from them, and the other way."""
    jax, timm = load_fixture("jax/vit"), vitlib.load(weights_path("jax/vit"), profile="timm")
    assert (jax.config.activation, timm.config.activation) == ("gelu_tanh", "gelu")
    vitlib.save(jax, tmp_path, layout="timm")
    again = vitlib.load(tmp_path, profile="jax")
    assert worst(again, "jax/vit") < TINY  # JAX's own outputs, off the grid too
    assert worst(vitlib.load(tmp_path), "jax/vit") > 10 * TINY
    assert worst(vitlib.load(weights_path("jax/vit"), profile="jax"), "jax/vit") < TINY
    with pytest.raises(vitlib.VitlibError, match="profile='keras': expected one of hf, timm"):
        vitlib.load(weights_path("jax/vit"), profile="keras")


def test_the_profile_brings_its_preprocessing() -> None:
    by_timm = vitlib.load(weights_path("jax/vit"), profile="timm").image_processor
    by_jax = load_fixture("jax/vit").image_processor
    assert by_timm.describe() != by_jax.describe()


# --- detection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*NAMES} - {"jax/bigvit_sincos"}))
def test_layout_and_what_is_assumed(name: str) -> None:
    facts = Facts(architecture=read_architecture(name))
    result = read_checkpoint(Source(weights_path(name)), facts=facts)
    layout = name.partition("/")[0]
    assert result.layout.name == layout
    # A table of offsets and the periods of rotary angles say how many heads there are.
    telling = ("beit", "dinov3", "eva02", "vit5")
    silent = layout in ("torchvision", "meta") and not any(word in name for word in telling)
    silent |= name in ("meta/beit3", "meta/beit3_retrieval", "meta/eva02_clip_e")
    assert ("num_heads" in result.assumed) == (silent or "timm_" in name or "openai" in name)
    assert not result.problems or "num_heads" in result.assumed


def test_names_that_fit_two_layouts_say_so(tmp_path: Path) -> None:
    torch.save(Source(weights_path("timm/vit")).tensors(), tmp_path / "bare.pth")
    result = read_checkpoint(Source(tmp_path / "bare.pth"), facts=Facts(num_heads=2))
    assert (result.layout.name, result.also_fits) == ("timm", ("meta",))
    remedy = read_checkpoint(Source(tmp_path / "bare.pth"), facts=Facts(num_heads=2), layout="meta")
    assert (remedy.layout.name, remedy.also_fits) == ("meta", ())
    assert remedy.model.config.position_resize != result.model.config.position_resize
    assert (
        read_checkpoint(Source(weights_path("timm/vit"))).also_fits == ()
    )  # its config.json says whose it is
    assert (
        read_checkpoint(Source(weights_path("meta/dinov2")), facts=Facts(num_heads=2)).also_fits
        == ()
    )  # its mask token does


def test_unread_content_is_listed() -> None:
    result = read_checkpoint(Source(weights_path("meta/dino_full")), facts=Facts(num_heads=2))
    assert {"optimizer", "epoch", "args", "dino_loss"} <= {
        name.split(" ")[0] for name in result.ignored
    }
    assert any(name.startswith("student") for name in result.ignored)


def test_two_models_in_one_file_are_not_guessed(tmp_path: Path) -> None:
    timm, vision = (
        Source(weights_path(f"{name}/vit")).tensors() for name in ("timm", "torchvision")
    )
    torch.save({**timm, **vision}, tmp_path / "both.pth")
    with pytest.raises(vitlib.VitlibError, match=r"two models in one file.*layout='timm'"):
        vitlib.load(tmp_path / "both.pth")
    with pytest.raises(vitlib.VitlibError, match="unexpected: class_token"):
        vitlib.load(tmp_path / "both.pth", layout="timm")


def test_half_renamed(tmp_path: Path) -> None:
    tensors = Source(weights_path("timm/vit")).tensors()
    half = {
        key.replace("blocks.1.mlp.fc1", "encoder.layer.1.intermediate.dense"): t
        for key, t in tensors.items()
    }
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(vitlib.VitlibError) as error:
        vitlib.load(tmp_path / "half.pth", num_heads=2)
    assert "missing: blocks.1.mlp.fc1.weight" in str(error.value)
    assert "are names of 'hf': is it half renamed?" in str(error.value)


def test_unknown_model_is_named(tmp_path: Path) -> None:
    torch.save(
        {"layer1.0.conv1.weight": torch.ones(3), "fc.weight": torch.ones(2)}, tmp_path / "r.pth"
    )
    with pytest.raises(vitlib.VitlibError, match="no name that a ViT has"):
        vitlib.load(tmp_path / "r.pth")


def test_oblong_grid_survives_saving(tmp_path: Path) -> None:
    cfg = vitlib.ViTConfig(image_size=(16, 24), patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model = vitlib.ViT(cfg).eval()
    for layout in ("hf", "timm", "meta", "jax"):
        vitlib.save(model, tmp_path / layout, layout=layout)
        assert vitlib.load(tmp_path / layout).config.image_size == (16, 24)
    (tmp_path / "meta/vitlib.json").unlink()
    with pytest.raises(vitlib.VitlibError, match="7 positions are no square grid"):
        vitlib.load(tmp_path / "meta")


def test_labels_and_preprocessing_travel(tmp_path: Path) -> None:
    cfg = vitlib.ViTConfig(
        image_size=16,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=3,
        labels=("a", "b", "a"),
    )
    processor = vitlib.ImageProcessor(shortest_edge=18, crop_size=(16, 16), resample=3)
    for layout in ("hf", "timm", "meta", "torchvision", "jax"):
        folder = tmp_path / layout
        vitlib.save(vitlib.ViT(cfg), folder, layout=layout, image_processor=processor)
        again = vitlib.Predictor.load(folder, device="cpu")
        assert again.labels == ("a", "b", "a"), layout
        assert again.image_processor.shortest_edge == 18, layout
        assert again.image_processor.crop_size == (16, 16), layout
    log = json.loads((tmp_path / "timm/config.json").read_text())
    assert log["label_names"] == ["a", "b", "a"]
    assert int(16 / log["pretrained_cfg"]["crop_pct"]) == 18
