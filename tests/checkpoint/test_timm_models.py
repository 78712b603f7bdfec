"""Models of timm by architecture and model_args, read and written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from fixtures.timm_folders import CLASSES, TIMM, edit_config, small_model
from vitlib.checkpoint.layouts.timm_models import get_architecture


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_relpos_base_patch16_224", "relative positions by an MLP"),
        ("vit_dwee_patch16_reg1_gap_256", "attention other than softmax of q k"),
        ("vit_base_patch16_xp_224", "attention and MLP in parallel"),
        ("samvit_base_patch16", "windowed attention"),
        (
            "vit_bass_patch16_224",
            "is not in vitlib's table; the nearest that is read is 'vit_base_p",
        ),
    ],
)
def test_load_rejects_architecture_that_vitlib_does_not_compute(
    name: str, reason: str, tmp_path: Path
) -> None:
    folder = edit_config("vit", tmp_path / "m", architecture=name)
    with pytest.raises(vitlib.VitlibError, match=reason) as error:
        vitlib.load(folder)
    assert "\n" not in str(error.value)


def test_load_names_the_architecture_before_the_shapes_of_its_tensors(tmp_path: Path) -> None:
    """SAM has the names of a plain ViT, and positions of four axes."""
    folder = edit_config("vit", tmp_path / "m", architecture="samvit_base_patch16")
    tensors = load_file(folder / "model.safetensors")
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:].unflatten(1, (4, 4)).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(vitlib.VitlibError, match="is not read: windowed attention"):
        vitlib.load(folder)


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
def test_architecture_gives_heads_activation_and_pool(
    name: str, num_heads: int, activation: str, pool: str
) -> None:
    facts = get_architecture(name).facts
    assert (facts["num_heads"], facts["activation"], facts["pool"]) == (num_heads, activation, pool)


def test_load_reads_num_heads_by_architecture(tmp_path: Path) -> None:
    vitlib.save(small_model(embed_dim=768, num_heads=12), tmp_path / "m", layout="timm")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    for name, heads in (("vit_base_patch16_224", 12), ("vit_base_patch16_384", 12)):
        path.write_text(json.dumps(config | {"architecture": name, "model_args": {}}))
        assert vitlib.load(tmp_path / "m").config.num_heads == heads
    other = {"architecture": "vit_base_patch16_gap_224", "model_args": {}, "global_pool": "avg"}
    path.write_text(json.dumps(config | other))
    with pytest.raises(vitlib.VitlibError, match=r"class_token .* \(the tensors have True\)") as e:
        vitlib.load(tmp_path / "m")
    assert "copy the weights file to a folder without one, and load it there with its " in str(
        e.value
    )
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(tmp_path / "m/model.safetensors", tmp_path / "alone")
    assert vitlib.load(alone, architecture="vit_base_patch16_224").config.num_heads == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool_include_prefix": True, "global_pool": "avg"}, "pools 'mean' with class tokens"),
        ({"qk_norm": True}, r"norms Norms\(qk='head'\) \(the tensors have Norms"),
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
def test_load_rejects_model_args_that_change_the_model(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = edit_config("vit", tmp_path / "m", model_args=arguments)
    with pytest.raises(vitlib.VitlibError, match=message):
        vitlib.load(folder)


def test_model_args_override_activation_and_norm_eps(tmp_path: Path) -> None:
    folder = edit_config(
        "vit",
        tmp_path / "m",
        model_args={"act_layer": "quick_gelu", "drop_rate": 0.1, "weight_init": "jax"},
    )
    assert vitlib.load(folder).config.activation == "quick_gelu"
    folder = edit_config("clip", tmp_path / "n", model_args={"norm_layer": "layernorm"})
    assert (
        vitlib.load(folder).config.norm_eps,
        vitlib.load(TIMM / "clip").config.norm_eps,
    ) == (
        1e-6,
        1e-5,
    )


@pytest.mark.parametrize("tokens", [{"class_token": True}, {"reg_tokens": 2}])
def test_load_reads_which_tokens_an_attention_pool_reads(
    tokens: dict[str, Any], tmp_path: Path
) -> None:
    """By default, timm 1.0.31 pools patches alone: no class token and no register."""
    prefix = {"class_token": False, "num_registers": tokens.get("reg_tokens", 0)} | tokens
    prefix.pop("reg_tokens", None)
    model = small_model(
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
    images, logits = torch.randn(1, 3, 32, 32), list[torch.Tensor]()
    for included in (True, False, None):
        args = {} if included is None else {"pool_include_prefix": included}
        path.write_text(json.dumps(config | {"model_args": config["model_args"] | args}))
        loaded = vitlib.load(tmp_path / "m")
        assert loaded.config.attention_pool is not None
        assert loaded.config.attention_pool.prefix_tokens is bool(included)
        logits.append(loaded(images).detach())
    assert torch.equal(logits[0], model(images))
    assert torch.equal(logits[1], logits[2])
    assert not torch.equal(logits[0], logits[1])
    file = shutil.copy(tmp_path / "m/model.safetensors", tmp_path)
    with pytest.raises(vitlib.VitlibError, match=r"whether the pool reads these too.* pool='map'"):
        vitlib.load(file)
    assert vitlib.load(file, pool="map").config.pool == "map"


def test_load_rejects_mean_pool_with_prefix_tokens(tmp_path: Path) -> None:
    """Only timm's test_vit3 pools its register by default, in a mean too."""
    model = small_model(
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


def test_load_asks_for_pool_that_timm_does_not_read(tmp_path: Path) -> None:
    """Only global_pool of model_args sets timm's pool; that of the top level does not."""
    folder = edit_config("vit", tmp_path / "m", global_pool="avg", model_args={"global_pool": None})
    with pytest.raises(vitlib.VitlibError, match=r"state which with pool='mean' or pool='cls'"):
        vitlib.load(folder)
    for pool in ("mean", "cls"):
        assert vitlib.load(folder, pool=pool).config.pool == pool


@pytest.mark.parametrize("source", ["folder", "safetensors", "pth"])
def test_load_rejects_distilled_model_without_heads(source: str, tmp_path: Path) -> None:
    """In timm 1.0.31 such a model returns (class token + distillation token) / 2."""
    args = {"num_classes": 0}
    folder = edit_config(
        "deit_distilled", tmp_path / "m", **args, label_names=None, model_args=args
    )
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


def test_load_reads_timm_wrapper_of_transformers(tmp_path: Path) -> None:
    """The tensors have the prefix timm_model.; the config has the keys of both libraries."""
    wrapper = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    folder = edit_config("vit", tmp_path / "m", **wrapper, label_names=CLASSES, do_pooling=True)
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"timm_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    model, images = vitlib.load(folder), torch.randn(1, 3, 16, 16)
    assert list(model.config.labels) == CLASSES
    with torch.inference_mode():
        assert torch.equal(model(images), vitlib.load(TIMM / "vit")(images))


@pytest.mark.parametrize(
    ("class_token", "pool"),
    [(True, "cls"), (True, "mean"), (True, "map"), (False, "mean"), (False, "map")],
)
@pytest.mark.parametrize("num_registers", [0, 4])
@pytest.mark.parametrize("final_norm", ["tokens", "none"])
def test_saved_tensors_match_model_args(
    class_token: bool, num_registers: int, pool: str, final_norm: str, tmp_path: Path
) -> None:
    """With no_embed_class, timm has no position rows for prefix tokens, else one each."""
    fields: dict[str, Any] = {"class_token": class_token, "num_registers": num_registers}
    fields |= {"pool": pool, "attention_pool": pool == "map", "final_norm": final_norm}
    model = small_model(embed_dim=48, num_heads=3, position_resize="bicubic_antialias", **fields)
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
        (
            {"embed_dim": 1536, "num_heads": 24},
            "vit_base_patch16_siglip_224",
        ),  # no published name: model_args say the sizes
        ({"embed_dim": 768, "patch_size": 32}, "vit_base_patch32_siglip_256"),
    ],
)
def test_save_chooses_published_architecture(fields: dict[str, Any], name: str) -> None:
    from vitlib.checkpoint.layouts.timm_write import choose_architecture

    siglip = {"family": "siglip", "class_token": False, "pool": "map", "attention_pool": True}
    siglip |= {"activation": "gelu_tanh", "image_size": 256}
    extra = siglip if "siglip" in name else {"image_size": 224}
    assert choose_architecture(vitlib.ViTConfig(**fields | extra)) == name
