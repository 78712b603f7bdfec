"""timm's architectures by name, model_args and labels: right, or refused with a reason."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from paths import FIXTURES
from vitlib import ImageProcessor
from vitlib.checkpoint.layouts.timm_models import get_architecture

TIMM = FIXTURES / "timm"


def edited(name: str, folder: Path, **changes: Any) -> Path:
    """Copy a fixture and change its config.json; model_args are merged, a None takes one out."""
    shutil.copytree(TIMM / name, folder)
    config = json.loads((folder / "config.json").read_text())
    args = config["model_args"] | changes.pop("model_args", {})
    config["model_args"] = {key: value for key, value in args.items() if value is not None}
    config |= changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def small(**fields: Any) -> vitlib.ViT:
    """Return a random model of published widths, one block and a small image."""
    usual: dict[str, Any] = {"image_size": 32, "depth": 1, "num_classes": 3}
    return vitlib.ViT(vitlib.ViTConfig(**usual | fields)).eval()


def bare(model: vitlib.ViT, folder: Path, layout: str = "timm") -> Path:
    """Save a model and keep its weights file alone."""
    vitlib.save(model, folder / "whole", layout=layout)
    path = next(path for path in (folder / "whole").iterdir() if path.suffix != ".json")
    return Path(shutil.move(path, folder / path.name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_rpn_224", "post-norm blocks"),
        ("vit_base_patch16_rope_224.naver_in1k", "a rotary embedding other than DINOv3's"),
        ("eva02_tiny_patch14_336", "a rotary embedding other than DINOv3's"),
        ("vit_so150m_patch16_reg4_map_256", "an attention pool of the patches alone"),
        ("vit_pe_core_base_patch16_224", "an attention pool with heads of its own"),
        ("aimv2_large_patch14_224", "RMSNorm"),
        ("vit_base_patch16_xp_224", "attention and MLP in parallel"),
        ("beit3_base_patch16_224", "a norm inside attention"),
        ("vit_bass_patch16_224", "none that vitlib knows; the nearest that is read is 'vit_base_p"),
    ],
)
def test_a_named_architecture_that_is_not_computed_is_refused(
    name: str, reason: str, tmp_path: Path
) -> None:
    folder = edited("vit", tmp_path / "m", architecture=name)
    with pytest.raises(vitlib.VitlibError, match=reason) as error:
        vitlib.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "num_heads", "activation", "pool"),
    [
        ("vit_base_patch16_224.augreg_in1k", 12, "gelu", "cls"),
        ("vit_base_patch16_224_in21k", 12, "gelu", "cls"),  # an old name
        ("vit_giantopt_patch16_siglip_256", 16, "gelu_tanh", "map"),
        ("vit_base_patch16_gap_224", 16, "gelu", "mean"),
        ("vit_base_patch16_siglip_512", 12, "gelu", "map"),
        ("vit_base_patch32_siglip_gap_256", 12, "gelu_tanh", "mean"),
        ("vit_large_patch16_siglip_gap_512", 16, "gelu_tanh", "mean"),
        ("vit_large_patch16_siglip_384", 16, "gelu", "map"),
        ("vit_so400m_patch16_siglip_256", 16, "gelu_tanh", "map"),
        ("vit_small_patch16_dinov3", 6, "gelu", "mean"),
        ("test_vit", 2, "gelu", "cls"),
    ],
)
def test_the_name_says_heads_gelu_and_pool(
    name: str, num_heads: int, activation: str, pool: str
) -> None:
    facts = get_architecture(name).facts
    assert (facts["num_heads"], facts["activation"], facts["pool"]) == (num_heads, activation, pool)


def test_the_name_is_used(tmp_path: Path) -> None:
    vitlib.save(small(embed_dim=768, num_heads=12), tmp_path / "m", layout="timm")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    for name, heads in (("vit_base_patch16_224", 12), ("vit_base_patch16_384", 12)):
        path.write_text(json.dumps(config | {"architecture": name, "model_args": {}}))
        assert vitlib.load(tmp_path / "m").config.num_heads == heads
    other = {"architecture": "vit_base_patch16_gap_224", "model_args": {}, "global_pool": "avg"}
    path.write_text(json.dumps(config | other))
    with pytest.raises(vitlib.VitlibError, match=r"class_token .* \(the tensors have True\)") as e:
        vitlib.load(tmp_path / "m")
    assert "copy the weights file to a folder without one, and load it there with arch" in str(
        e.value
    )
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(tmp_path / "m/model.safetensors", tmp_path / "alone")
    assert vitlib.load(alone, architecture="vit_base_patch16_224").config.num_heads == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool_include_prefix": True, "global_pool": "avg"}, "pools 'mean' with class tokens"),
        ({"qk_norm": True}, "qk_norm=True, which vitlib does not run"),
        ({"act_layer": "relu"}, "act_layer='relu': expected gelu"),
        ({"norm_layer": "rmsnorm"}, "norm_layer='rmsnorm': expected layernorm"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad=True"),
        ({"reg_tokens": 4}, "num_registers 4"),
        ({"pos_embed": "none"}, "pos_embed False"),
        ({"block_fn": "ParallelBlock"}, "block_fn='ParallelBlock'"),
        ({"a_new_argument": 1}, "a_new_argument=1"),
        ({"global_pool": "avgmax"}, "global_pool 'avgmax'"),
    ],
)
def test_an_argument_that_changes_the_model_is_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = edited("vit", tmp_path / "m", model_args=arguments)
    with pytest.raises(vitlib.VitlibError, match=message):
        vitlib.load(folder)


@pytest.mark.parametrize("tokens", [{"class_token": True}, {"reg_tokens": 2}])
def test_an_attention_pool_of_the_patches_alone_is_refused(
    tokens: dict[str, Any], tmp_path: Path
) -> None:
    """timm 1.0.31 leaves class tokens and registers out of the pool unless it is told otherwise."""
    prefix = {"class_token": False, "num_registers": tokens.get("reg_tokens", 0)} | tokens
    prefix.pop("reg_tokens", None)
    model = small(
        family="siglip",
        attention_pool=True,
        pool="map",
        pos_embed_cls=False,
        embed_dim=64,
        num_heads=4,
        **prefix,
    )
    vitlib.save(model, tmp_path / "m", layout="timm")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text()) | {"architecture": "vit_base_patch16_siglip_224"}
    assert config["model_args"].pop("pool_include_prefix")
    images = torch.randn(1, 3, 32, 32)
    for included in (True, False, None):
        args = {} if included is None else {"pool_include_prefix": included}
        path.write_text(json.dumps(config | {"model_args": config["model_args"] | args}))
        if included:
            with torch.inference_mode():
                assert torch.equal(vitlib.load(tmp_path / "m")(images), model(images))
        else:
            with pytest.raises(vitlib.VitlibError, match="pools 'map' with class tokens and regis"):
                vitlib.load(tmp_path / "m")
    file = shutil.copy(tmp_path / "m/model.safetensors", tmp_path)
    with pytest.raises(vitlib.VitlibError, match=r"whether the pool reads these too.* pool='map'"):
        vitlib.load(file)
    assert vitlib.load(file, pool="map").config.pool == "map"


def test_a_mean_of_all_tokens_is_refused_by_the_name_of_the_model(tmp_path: Path) -> None:
    """timm's test_vit3 alone includes its register by default, in a mean as in its pool."""
    model = small(
        embed_dim=96,
        num_heads=3,
        mlp_dim=192,
        layer_scale=1e-5,
        class_token=False,
        num_registers=1,
        pool="mean",
        pos_embed_cls=False,
    )
    vitlib.save(model, tmp_path / "m", layout="timm")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text()) | {"architecture": "test_vit3"}
    path.write_text(json.dumps(config))
    with pytest.raises(vitlib.VitlibError, match="pools 'mean' with class tokens and registers to"):
        vitlib.load(tmp_path / "m")
    config["model_args"]["pool_include_prefix"] = False
    path.write_text(json.dumps(config))
    assert vitlib.load(tmp_path / "m").config.pool == "mean"


@pytest.mark.parametrize("source", ["folder", "safetensors", "pth"])
def test_a_distilled_model_without_heads_is_refused(source: str, tmp_path: Path) -> None:
    """timm 1.0.31 gives (class token + distillation token) / 2 of such a model."""
    args = {"num_classes": 0}
    folder = edited("deit_distilled", tmp_path / "m", **args, label_names=None, model_args=args)
    path = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if not name.startswith("head")}
    save_file(tensors, path)
    (tmp_path / "bare").mkdir()
    if source == "folder":
        path = folder
    elif source == "safetensors":
        path = Path(shutil.copy(path, tmp_path / "bare"))
    else:
        path = tmp_path / "bare/model.pth"
        torch.save({"model": tensors}, path)
    with pytest.raises(vitlib.VitlibError, match=r"without its heads gives the mean .*pool='cls'"):
        vitlib.load(path)
    model = vitlib.load(path, pool="cls")
    assert (model.config.pool, model.config.dist_head) == ("cls", False)
    for layout in ("timm", "meta"):
        with pytest.raises(vitlib.VitlibError, match="dist_head=False"):
            vitlib.save(model, tmp_path / layout, layout=layout)


def test_arguments_are_honoured(tmp_path: Path) -> None:
    folder = edited(
        "vit",
        tmp_path / "m",
        model_args={"act_layer": "quick_gelu", "drop_rate": 0.1, "weight_init": "jax"},
    )
    assert vitlib.load(folder).config.activation == "quick_gelu"
    folder = edited("clip", tmp_path / "n", model_args={"norm_layer": "layernorm"})
    assert (
        vitlib.load(folder).config.norm_eps,
        vitlib.load(TIMM / "clip").config.norm_eps,
    ) == (
        1e-6,
        1e-5,
    )


def test_a_pool_that_timm_would_not_read_is_asked_for(tmp_path: Path) -> None:
    """Below the top level of config.json, timm reads global_pool of model_args alone."""
    folder = edited("vit", tmp_path / "m", global_pool="avg", model_args={"global_pool": None})
    with pytest.raises(vitlib.VitlibError, match=r"state which with pool='mean' or pool='cls'"):
        vitlib.load(folder)
    for pool in ("mean", "cls"):
        assert vitlib.load(folder, pool=pool).config.pool == pool


def test_a_wrapper_of_transformers_is_read(tmp_path: Path) -> None:
    """Its tensors have the prefix timm_model., its config timm's keys and transformers' beside."""
    wrapper = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    folder = edited("vit", tmp_path / "m", **wrapper, label_names=FIVE, do_pooling=True)
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"timm_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    model, images = vitlib.load(folder), torch.randn(1, 3, 16, 16)
    assert list(model.config.labels) == FIVE
    with torch.inference_mode():
        assert torch.equal(model(images), vitlib.load(TIMM / "vit")(images))


def test_a_stated_architecture_of_other_tensors_is_refused(tmp_path: Path) -> None:
    path = bare(small(embed_dim=384, num_heads=6), tmp_path)
    with pytest.raises(vitlib.VitlibError, match="architecture='vit_base_patch16_gap_224'") as e:
        vitlib.load(path, architecture="vit_base_patch16_gap_224")
    assert "class_token False (the tensors have True)" in str(e.value)


# --- bare files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "layout", "pool", "assumed"),
    [
        # Google's of these tensors have a mean of 0.5, DINO and DeiT ImageNet's.
        ({"embed_dim": 384, "num_heads": 6}, "timm", "cls", "minus 0.5 0.5 0.5"),
        ({"embed_dim": 384, "num_heads": 6, "num_classes": 0}, "meta", "cls", "minus 0.485"),
        (
            {"embed_dim": 768, "pool": "mean", "final_norm": "pooled", "family": "vit_mae"},
            "meta",
            "mean",
            "",
        ),
        (
            {"embed_dim": 384, "num_heads": 6, "patch_size": 14, "image_size": 28}
            | {"layer_scale": 1.0, "family": "dinov2", "num_classes": 0},
            "meta",
            "cls",
            "",
        ),
    ],
)
def test_a_bare_file_of_a_published_shape_says_what_can_be_wrong(
    fields: dict[str, Any],
    layout: str,
    pool: str,
    assumed: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of the models of one shape all have one architecture here, and not all one preprocessing."""
    path = bare(small(**fields), tmp_path, layout)
    with caplog.at_level(logging.WARNING, "vitlib"):
        config = vitlib.load(path).config
    assert (config.num_heads, config.pool) == (fields.get("num_heads", 12), pool)
    lines = [line for line in caplog.messages if "assumed" in line]
    assert len(lines) == bool(assumed)
    assert all("preprocessing assumed" in line and assumed in line for line in lines)
    caplog.clear()
    # What the line names says it: nothing is assumed then.
    vitlib.load(path, profile="hf")
    vitlib.load(path, image_processor=ImageProcessor(size=(32, 32)))
    rule = ImageProcessor(size=(32, 32), image_mean=(0.1,) * 3, image_std=(0.2,) * 3)
    (path.parent / "preprocessor_config.json").write_text(json.dumps(rule.to_dict()))
    model = vitlib.load(path)
    assert isinstance(model.image_processor, ImageProcessor)
    assert model.image_processor.image_mean == rule.image_mean
    assert not [line for line in caplog.messages if "assumed" in line]


def test_a_bare_file_of_no_published_shape_says_what_is_assumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = bare(small(embed_dim=48, num_heads=1), tmp_path)
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(path)
    (line,) = [line for line in caplog.messages if "assumed" in line]
    assert all(field in line for field in ("num_heads=1", "activation='gelu'", "pool='cls'"))


def test_a_bare_file_of_two_models_is_asked_for(tmp_path: Path) -> None:
    """timm's large SigLIP is GELU of erf or tanh by its image size; every remedy works."""
    fields = {"embed_dim": 1024, "num_heads": 16, "family": "siglip", "attention_pool": True}
    fields |= {"class_token": False, "pool": "map", "num_classes": 0}
    path = bare(small(**fields), tmp_path)
    with pytest.raises(vitlib.VitlibError, match="state which with activation='gelu'") as error:
        vitlib.load(path)
    assert "vit_large_patch16_siglip_512" in str(error.value)
    for stated, activation in (
        ({"activation": "gelu"}, "gelu"),
        ({"activation": "gelu_tanh"}, "gelu_tanh"),
        ({"architecture": "vit_large_patch16_siglip_512"}, "gelu_tanh"),
        ({"architecture": "vit_large_patch16_siglip_256"}, "gelu"),
    ):
        assert vitlib.load(path, **stated).config.activation == activation


def test_a_bare_file_of_a_model_that_is_not_computed_is_refused(tmp_path: Path) -> None:
    """vit_base_patch16_rpn_224 has pre-norm names, but no bias of queries, keys and values."""
    fields = {"qkv_bias": False, "class_token": False, "pool": "mean", "final_norm": "pooled"}
    path = bare(small(**fields), tmp_path)
    with pytest.raises(vitlib.VitlibError, match="'vit_base_patch16_rpn_224' is not read: post"):
        vitlib.load(path)


def test_a_norm_that_is_missing_is_told(tmp_path: Path) -> None:
    """A file without one is a model without one where that is published, as RADIO's, alone."""
    tensors = load_file(bare(small(embed_dim=48, num_heads=1), tmp_path))
    without = {name: t for name, t in tensors.items() if not name.startswith("norm.")}
    save_file(without, tmp_path / "without.safetensors")
    with pytest.raises(vitlib.VitlibError, match=r"missing: norm\.weight"):
        vitlib.load(tmp_path / "without.safetensors")


def test_learned_rotation_is_never_ignored(tmp_path: Path) -> None:
    tensors = load_file(TIMM / "vit/model.safetensors")
    save_file(tensors | {"rope.freqs": torch.ones(2, 2, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(vitlib.VitlibError, match=r"unexpected: rope\.freqs"):
        vitlib.load(tmp_path / "m.safetensors", num_heads=2)


# --- labels ---------------------------------------------------------------------------------------

FIVE = ["n01", "n02", "n03", "n04", "n05"]
WORDS = {"n01": "tench", "n02": "goldfish", "n03": "shark", "n04": "ray", "n05": "cock"}


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"label_names": FIVE}, FIVE),
        ({"pretrained_cfg": {"label_names": FIVE}}, FIVE),
        ({"labels": FIVE}, FIVE),
        ({"id2label": {str(i): name for i, name in enumerate(FIVE)}}, FIVE),
        ({"pretrained_cfg": {"labels": FIVE}}, FIVE),
        ({"label_names": {str(i): name for i, name in enumerate(FIVE)}}, FIVE),
        ({"label_names": {name: i for i, name in enumerate(FIVE)}}, FIVE),
        ({"label_names": {name: str(i) for i, name in enumerate(FIVE)}}, FIVE),
        ({"label_names": FIVE, "label_descriptions": WORDS}, list(WORDS.values())),
        ({"label_names": FIVE, "label_descriptions": list(WORDS.values())}, list(WORDS.values())),
        (
            {"pretrained_cfg": {"label_names": FIVE, "label_descriptions": WORDS}},
            list(WORDS.values()),
        ),
        ({"label_names": [0, 1, 2, 3, 4]}, ["0", "1", "2", "3", "4"]),
    ],
)
def test_labels_are_read_wherever_timm_keeps_them(
    changes: dict[str, Any], labels: list[str], tmp_path: Path
) -> None:
    assert list(vitlib.load(edited("vit", tmp_path / "m", **changes)).config.labels) == labels


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"label_names": FIVE[:4]}, "config.json's label_names is not used: 4 names for 5 classes"),
        ({"pretrained_cfg": {"label_names": {"0": "a", "7": "b"}}}, "pretrained_cfg.label_names"),
        (
            {"label_names": FIVE, "label_descriptions": {"x": "y"}},
            "label_descriptions is not used: it has none of the label_names",
        ),
    ],
)
def test_labels_that_cannot_be_used_are_told(
    changes: dict[str, Any], line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(edited("vit", tmp_path / "m", **changes))
    assert line in caplog.text


# --- what is computed again -----------------------------------------------------------------------


def test_periods_and_masks_that_vitlib_computes_otherwise_are_refused(tmp_path: Path) -> None:
    """The original DINOv3 code reads its periods and its mask from the file."""
    path = TIMM.parent / "meta/dinov3.pth"
    tensors = torch.load(path, weights_only=True)
    for name, other in (
        ("rope_embed.periods", lambda t: t**0.5),
        ("blocks.0.attn.qkv.bias_mask", torch.ones_like),
    ):
        changed = {key: other(t) if key == name else t for key, t in tensors.items()}
        torch.save(changed, tmp_path / "m.pth")
        with pytest.raises(vitlib.VitlibError, match=f"{name}: "):
            vitlib.load(tmp_path / "m.pth")
    assert vitlib.load(path).config.num_heads == 2  # which the periods say


def test_another_index_of_offsets_is_refused(tmp_path: Path) -> None:
    tensors = torch.load(TIMM.parent / "meta/beit.pth", weights_only=True)["model"]
    (name,) = [name for name in tensors if name.endswith("0.attn.relative_position_index")]
    torch.save({"model": tensors | {name: tensors[name].T.contiguous()}}, tmp_path / "m.pth")
    with pytest.raises(vitlib.VitlibError, match="its rows are not BEiT's"):
        vitlib.load(tmp_path / "m.pth")


def test_a_bias_of_keys_changes_nothing(tmp_path: Path) -> None:
    """It adds the same to all scores of a query, so a file's k_bias is left out."""
    shutil.copytree(TIMM / "beit", tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = load_file(path)
    bias = torch.randn(tensors["blocks.0.attn.q_bias"].shape)
    save_file(tensors | {"blocks.0.attn.k_bias": bias}, path)
    images = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(vitlib.load(tmp_path / "m")(images), vitlib.load(TIMM / "beit")(images))
        model = vitlib.load(TIMM / "beit", config=None)
        expected = model(images)
        attention = model.blocks[0].attn
        attention.k.bias = torch.nn.Parameter(bias)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)


def test_verify_says_what_it_cannot_see(tmp_path: Path) -> None:
    from vitlib.checks import verify

    published_shape = bare(small(embed_dim=384, num_heads=6), tmp_path / "a")
    assert verify(published_shape).unverified[0] == "num_heads=6"
    other = bare(small(embed_dim=48, num_heads=1), tmp_path / "b")
    assert verify(other).unverified[0] == "num_heads=1 (can be wrong)"
    assert verify(TIMM / "vit").unverified == ()


# --- written back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_token", "pool"),
    [(True, "cls"), (True, "mean"), (True, "map"), (False, "mean"), (False, "map")],
)
@pytest.mark.parametrize("num_registers", [0, 4])
@pytest.mark.parametrize("final_norm", ["tokens", "none"])
def test_timm_finds_the_tensors_that_its_arguments_say(
    class_token: bool, num_registers: int, pool: str, final_norm: str, tmp_path: Path
) -> None:
    """timm has a row of positions for each prefix token, or for none where no_embed_class."""
    fields: dict[str, Any] = {"class_token": class_token, "num_registers": num_registers}
    fields |= {"pool": pool, "attention_pool": pool == "map", "final_norm": final_norm}
    model = small(embed_dim=48, num_heads=3, position_resize="bicubic_antialias", **fields)
    assert vitlib.save(model, tmp_path / "m", layout="timm") == {}
    config = json.loads((tmp_path / "m/config.json").read_text())
    args, tensors = config["model_args"], load_file(tmp_path / "m/model.safetensors")
    assert get_architecture(config["architecture"])
    rows = 4 + (0 if args["no_embed_class"] else args["class_token"] + args["reg_tokens"])
    assert tensors["pos_embed"].shape[1] == rows
    assert args.get("pool_include_prefix", False) == (
        pool == "map" and bool(class_token or num_registers)
    )
    assert ("norm.weight" in tensors) == args["final_norm"] == (final_norm == "tokens")
    again, images = vitlib.load(tmp_path / "m"), torch.randn(1, 3, 32, 32)
    assert again.config == replace(model.config, pos_embed_cls=again.config.pos_embed_cls)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"embed_dim": 768}, "vit_base_patch16_224"),
        ({"embed_dim": 1536, "num_heads": 16}, "vit_giantopt_patch16_siglip_256"),
        ({"embed_dim": 1536, "num_heads": 24}, "vit_base_patch16_siglip_224"),  # with arguments
        ({"embed_dim": 768, "patch_size": 32}, "vit_base_patch32_siglip_256"),
    ],
)
def test_a_published_model_is_written_by_its_name(fields: dict[str, Any], name: str) -> None:
    from vitlib.checkpoint.layouts.timm import choose_architecture

    siglip = {"family": "siglip", "class_token": False, "pool": "map", "attention_pool": True}
    siglip |= {"activation": "gelu_tanh", "image_size": 256}
    extra = siglip if "siglip" in name else {"image_size": 224}
    assert choose_architecture(vitlib.ViTConfig(**fields | extra)) == name


# --- training checkpoints -------------------------------------------------------------------------


def test_the_name_in_a_training_checkpoint_decides(tmp_path: Path) -> None:
    """timm's train.py saves its architecture under "arch"; any other name is the code's own."""
    fields = {"embed_dim": 1024, "num_heads": 16, "family": "siglip", "attention_pool": True}
    fields |= {"class_token": False, "pool": "map", "num_classes": 0}
    tensors = load_file(bare(small(**fields), tmp_path))

    def saved(arch: str) -> Path:
        path = tmp_path / f"{arch}.pth.tar"
        torch.save({"arch": arch, "state_dict": tensors}, path)
        return path

    for arch, activation in (
        ("vit_large_patch16_siglip_512", "gelu_tanh"),
        ("vit_large_patch16_siglip_256", "gelu"),
    ):
        assert vitlib.load(saved(arch), layout="timm").config.activation == activation
    with pytest.raises(vitlib.VitlibError, match="state which with activation='gelu'"):
        vitlib.load(saved("my_model"), layout="timm")


def test_moco_v3s_small_model_is_asked_for(tmp_path: Path) -> None:
    tensors = load_file(bare(small(embed_dim=384, num_heads=6), tmp_path))
    path = tmp_path / "linear.pth.tar"
    torch.save({"arch": "vit_small", "state_dict": tensors}, path)
    with pytest.raises(vitlib.VitlibError, match=r"num_heads=12 .*moco-v3") as error:
        vitlib.load(path)
    assert "state which with num_heads=6" in str(error.value)
    assert [vitlib.load(path, num_heads=n).config.num_heads for n in (6, 12)] == [6, 12]
