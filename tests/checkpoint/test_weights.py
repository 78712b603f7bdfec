"""load and save: how files lie, what is adapted, what is refused, and that nothing is lost."""

from __future__ import annotations

import copy
import json
import logging
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitlib
from fixtures import references
from vitlib.errors import CheckpointError, ConfigError, SourceError


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A tiny classifier saved by transformers."""
    references.saved("vit", tmp_path / "vit")
    return tmp_path / "vit"


def logits(source: Path, **options: object) -> Tensor:
    model = vitlib.load(source, **options)
    torch.manual_seed(5)
    with torch.inference_mode():
        return model(torch.randn(2, model.config.in_channels, *model.config.image_size))


def edit(folder: Path, **changes: object) -> None:
    """Change config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: object) -> None:
    """Change the tensors."""
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- every way that a checkpoint lies on a disk ---------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "deit two heads", "dinov2", "dinov2 swiglu", "registers"])
def test_names_as_transformers_5_holds_them(name: str, tmp_path: Path) -> None:
    reference = references.saved(name, tmp_path / "files")
    model = references.build(name)
    prefix = model.base_model_prefix + "."
    state = {key: t.contiguous() for key, t in model.state_dict().items()}
    # With and without the prefix in one file, as some published ones are.
    mixed = {
        key.removeprefix(prefix) if index % 2 else key: t
        for index, (key, t) in enumerate(state.items())
    }
    for folder, tensors in (("memory", state), ("mixed", mixed)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        reference.config.save_pretrained(tmp_path / folder)
        assert torch.equal(logits(tmp_path / folder), logits(tmp_path / "files"))
    assert any("gate_proj" in key for key in state) == ("swiglu" in name)


def test_shards_pickles_and_single_files(vit: Path, tmp_path: Path) -> None:
    expected = logits(vit)
    model = hf.ViTForImageClassification.from_pretrained(vit)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "shards"), expected)
    index = tmp_path / "shards/model.safetensors.index.json"
    assert torch.equal(logits(index), expected)
    tensors = load_file(vit / "model.safetensors")
    for name, new in (("zip", True), ("legacy", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((vit / "config.json").read_text())
        path = tmp_path / name / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=new)
        assert torch.equal(logits(tmp_path / name), expected)
        assert torch.equal(logits(path), expected)
    assert torch.equal(logits(vit / "model.safetensors"), expected)
    assert torch.equal(logits(str(vit)), expected)


def test_a_file_without_config_is_read_by_its_tensors(vit: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((vit / "model.safetensors").read_bytes())
    config = vitlib.load(vit).config
    with pytest.raises(CheckpointError, match=r"width 48.* state num_heads="):
        vitlib.load(alone)  # no published ViT is so narrow
    assert vitlib.load(alone, num_heads=4).config == replace(config, labels=())
    assert torch.equal(logits(alone, num_heads=4), logits(vit))
    assert torch.equal(logits(alone, config=config), logits(vit))
    with pytest.raises(CheckpointError, match=r"wrong shape: "):
        vitlib.load(alone, config=replace(config, embed_dim=64))


def test_an_old_config_means_what_transformers_took_it_for(vit: Path) -> None:
    expected = logits(vit)
    edit(vit, qkv_bias=None, pooler_act=None, pooler_output_size=None, num_channels=None)
    assert torch.equal(logits(vit), expected)


def test_two_classes_without_names(tmp_path: Path) -> None:
    references.saved("vit two classes", tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert vitlib.load(tmp_path).num_classes == 2


def test_labels_may_repeat(vit: Path) -> None:
    edit(vit, id2label={"3": "c", "0": "crane", "1": "a", "2": "crane", "4": "d"})
    assert vitlib.load(vit).config.labels == ("crane", "a", "crane", "c", "d")


def test_real_config_files(shared_configs: Path) -> None:
    from vitlib.checkpoint.layouts import hf as layout
    from vitlib.checkpoint.layouts.table import read_state

    seen = 0
    for path in shared_configs.glob("*/config*.json"):
        config = json.loads(path.read_text())
        torch.manual_seed(0)
        with torch.device("meta"):
            model = hf.AutoModel.from_config(hf.AutoConfig.from_pretrained(path))
            if "ForImageClassification" in config["architectures"][0]:
                model = hf.AutoModelForImageClassification.from_config(model.config)
        state = model.state_dict()
        found = layout.find(state)
        shapes = {name: tuple(t.shape) for name, t in read_state(state, found).items()}
        cfg = layout.read_config(config, shapes, found)
        config |= config.get("vision_config", {})
        assert not found.unexpected
        assert cfg.embed_dim == config["hidden_size"]
        assert cfg.norm_eps == config["layer_norm_eps"]
        assert len(cfg.labels) in (0, 31, 1000)
        seen += 1
    assert seen >= 6


# --- nothing is drawn, copied or lost -------------------------------------------------------------


def test_weights_are_the_files_own_memory(vit: Path) -> None:
    state = torch.get_rng_state()
    model = vitlib.load(vit)
    assert torch.equal(torch.get_rng_state(), state)
    parameters = list(model.parameters())
    assert not any(p.is_meta for p in parameters)
    assert all(p.requires_grad for p in parameters)
    # A parameter's storage is its own part of the mapping: saving one saves no more.
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)
    with Path("/proc/self/maps").open() as maps:
        spans = [line.split()[0] for line in maps if line.rstrip().endswith("model.safetensors")]
    ranges = [tuple(int(end, 16) for end in span.split("-")) for span in spans]
    assert all(any(a <= p.data_ptr() < b for a, b in ranges) for p in parameters)


def test_training_does_not_write_to_the_file(vit: Path) -> None:
    before = (vit / "model.safetensors").read_bytes()
    model = vitlib.load(vit)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (vit / "model.safetensors").read_bytes() == before


def test_saving_over_the_files_that_are_mapped(vit: Path) -> None:
    expected = logits(vit)
    model = vitlib.load(vit)
    vitlib.save(model, vit)
    assert torch.equal(logits(vit), expected)
    assert sorted(path.name for path in vit.iterdir()) == ["config.json", "model.safetensors"]


def test_pooler_and_mask_token_are_kept(tmp_path: Path) -> None:
    references.saved("vit base", tmp_path / "base")
    model = vitlib.load(tmp_path / "base")
    assert model.pooler is not None
    assert not any(p.requires_grad for p in model.pooler.parameters())
    vitlib.save(model, tmp_path / "again")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "again"))
    assert torch.equal(before["pooler.dense.weight"], after["pooler.dense.weight"])
    references.saved("dinov2", tmp_path / "dinov2")
    dinov2 = vitlib.load(tmp_path / "dinov2")
    assert dinov2.pooler is None
    with pytest.raises(ConfigError, match="no pooler"):
        dinov2.forward_pooler(torch.zeros(1, 3, 32, 32))
    vitlib.save(dinov2, tmp_path / "dinov2 again")
    tensors = load_file(tmp_path / "dinov2 again/model.safetensors")
    assert tensors["dinov2.embeddings.mask_token"].shape == (1, 48)
    assert tensors["dinov2.embeddings.mask_token"].abs().sum() > 0


def test_a_kill_while_saving_leaves_nothing_that_opens(vit: Path, tmp_path: Path) -> None:
    """The process dies at each of its renames in turn; what is there opens whole or not at all."""
    expected = logits(vit)
    script = (
        "import os, sys, pathlib, vitlib\n"
        "model = vitlib.load(sys.argv[1])\n"
        "left, real = int(sys.argv[3]), pathlib.Path.replace\n"
        "def replace(self, target):\n"
        "    global left\n"
        "    if left == 0: os._exit(9)\n"
        "    left -= 1\n"
        "    return real(self, target)\n"
        "pathlib.Path.replace = replace\n"
        "vitlib.save(model, sys.argv[2])\n"
    )
    for renames in (0, 1):
        target = tmp_path / f"killed{renames}"
        command = [sys.executable, "-c", script, str(vit), str(target), str(renames)]
        assert subprocess.run(command, check=False).returncode == 9
        with pytest.raises(vitlib.VitlibError):
            vitlib.load(target)
        vitlib.save(vitlib.load(vit), target)
        assert torch.equal(logits(target), expected)


def test_copies_and_pickles_are_as_large_as_they_should_be(vit: Path, tmp_path: Path) -> None:
    model = vitlib.load(vit)
    assert torch.equal(copy.deepcopy(model).head.weight, model.head.weight)
    torch.save(model.head.state_dict(), tmp_path / "head.pt")
    assert (tmp_path / "head.pt").stat().st_size < 10_000


# --- what load adapts when asked ------------------------------------------------------------------


def test_image_size(vit: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, resized = vitlib.load(vit), vitlib.load(vit, image_size=(40, 24))
    assert resized.config.image_size == (40, 24)
    assert [r.message for r in caplog.records if r.name == "vitlib"] == [
        f"{vit}: positions resampled from 4x4 to 5x3 patches (bicubic)"
    ]
    images = torch.randn(1, 3, 40, 24)
    with torch.inference_mode():
        assert torch.equal(plain(images), resized(images))
    assert vitlib.load(vit, image_size=32).config == plain.config
    with pytest.raises(ConfigError, match=r"image_size=\(7, 7\) is smaller than"):
        vitlib.load(vit, image_size=7)


def test_num_classes(vit: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = vitlib.load(vit, num_classes=7)
    assert [r.message for r in caplog.records] == [f"{vit}: a new, untrained head of 7 classes"]
    assert model.head.weight.shape == (7, 48)
    assert model.config.labels == ()
    assert 0.01 < model.head.weight.std() < 0.03
    assert not model.head.bias.any()
    vitlib.save(model, tmp_path / "seven")
    opened = hf.ViTForImageClassification.from_pretrained(tmp_path / "seven").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert references.distance(model(images), opened(images).logits) < 2e-6
    caplog.clear()
    assert vitlib.load(vit, num_classes=5).config.labels  # the checkpoint's own
    assert vitlib.load(vit, num_classes=0).num_classes == 0
    assert not caplog.records


def test_a_head_on_dinov2_reads_what_transformers_reads(tmp_path: Path) -> None:
    references.saved("dinov2 base", tmp_path / "base")
    loaded = vitlib.load(tmp_path / "base", num_classes=3)
    assert loaded.config.pool == "cls+mean"
    reset = vitlib.load(tmp_path / "base")
    reset.reset_classifier(3)
    assert reset.config.pool == "cls"
    images = torch.randn(2, 3, 32, 32)
    for name, model in (("loaded", loaded), ("reset", reset)):
        vitlib.save(model, tmp_path / name)
        opened = hf.Dinov2ForImageClassification.from_pretrained(tmp_path / name).eval()
        with torch.inference_mode():
            assert references.distance(model(images), opened(images).logits) < 2e-6


def test_two_new_heads_for_a_distilled_model(tmp_path: Path) -> None:
    references.saved("deit two heads", tmp_path)
    model = vitlib.load(tmp_path, num_classes=3)
    assert model.head.weight.shape == model.head_dist.weight.shape == (3, 48)
    assert not torch.equal(model.head.weight, model.head_dist.weight)


def test_a_missing_head_is_an_error_unless_it_is_replaced(vit: Path) -> None:
    rewrite(vit, lambda tensors: [tensors.pop(f"classifier.{leaf}") for leaf in ("weight", "bias")])
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight, classifier\.bias"):
        vitlib.load(vit)
    assert vitlib.load(vit, num_classes=5).head.weight.shape == (5, 48)
    assert vitlib.load(vit, num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 48)


def test_one_channel_is_three_equal_ones(vit: Path, caplog: pytest.LogCaptureFixture) -> None:
    three, one = vitlib.load(vit), vitlib.load(vit, in_channels=1)
    assert "patch kernel summed over its 3 channels" in caplog.text
    gray = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert references.distance(one(gray), three(gray.expand(-1, 3, -1, -1))) < 2e-6


def test_more_channels(vit: Path) -> None:
    three, six = vitlib.load(vit), vitlib.load(vit, in_channels=6)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert references.distance(six(images.repeat(1, 2, 1, 1)), three(images)) < 2e-6
        mapped = vitlib.load(vit, in_channels=4, band_map=(2, None, 0, 1))
        bands = torch.stack([images[:, 2], torch.randn(2, 32, 32), images[:, 0], images[:, 1]], 1)
        assert references.distance(mapped(bands), three(images)) < 2e-6
    for band_map in ((0, 1), (0, 1, 2, 3)):
        with pytest.raises(ConfigError, match=r"band_map=.*expected 4 entries"):
            vitlib.load(vit, in_channels=4, band_map=band_map)


def test_preprocessing_follows(deit_tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = vitlib.load(deit_tiny, in_channels=1, image_size=(256, 320))
    assert "one channel is normalised with the mean of image_mean and of image_std" in caplog.text
    processor = one.image_processor
    assert processor.in_channels == 1
    assert processor.crop_size == (256, 320)
    assert processor.shortest_edge == round(256 * 320 / 224)
    assert processor.image_mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    four = vitlib.load(deit_tiny, band_map=(0, 1, 2, None)).image_processor
    assert four.image_std[:3] == (0.229, 0.224, 0.225)
    assert len(four.image_std) == 4


def test_dtype_and_device(vit: Path) -> None:
    model = vitlib.load(vit, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    rewrite(vit, lambda t: t.update({k: v.half() for k, v in t.items()}))
    assert {p.dtype for p in vitlib.load(vit).parameters()} == {torch.float16}
    with pytest.raises(ConfigError, match="cannot be had"):
        vitlib.load(vit, device="cuda:99")
    with pytest.raises(ConfigError, match="cannot be had"):
        vitlib.load(vit, dtype=torch.int8)


@pytest.mark.parametrize(
    ("body", "norms", "widest"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_tensors_of_several_dtypes_become_the_widest(
    body: torch.dtype,
    norms: torch.dtype,
    widest: torch.dtype,
    vit: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rewrite(
        vit,
        lambda t: t.update({k: v.to(norms if "layernorm" in k else body) for k, v in t.items()}),
    )
    model = vitlib.load(vit)
    assert {p.dtype for p in model.parameters()} == {widest}
    [line] = caplog.messages
    for dtype in {body, norms, widest}:
        assert str(dtype).removeprefix("torch.") in line
    theirs = hf.ViTForImageClassification.from_pretrained(vit, dtype=widest).eval()
    torch.manual_seed(5)
    pixels = torch.randn(2, 3, 32, 32).to(widest)
    with torch.inference_mode():
        expected = theirs(pixels).logits
        assert model(pixels) == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-6)
    caplog.clear()
    narrow = vitlib.load(vit, dtype=torch.bfloat16)  # asked for: nothing is widened or told
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert not caplog.messages


def test_a_norm_that_no_file_holds_widens_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = hf.BeitConfig(**references.SMALL, intermediate_size=96)
    hf.BeitModel(config, add_pooling_layer=False).bfloat16().save_pretrained(tmp_path)
    model = vitlib.load(tmp_path)
    assert model.config.final_norm == "none"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "are loaded as" not in caplog.text


# --- what load refuses, all of it in one message --------------------------------------------------


def test_every_problem_in_one_message(vit: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        layer = "vit.encoder.layer."
        for block in range(3):
            del tensors[f"{layer}{block}.output.dense.bias"]
        tensors["vit.layernorm.weight"] = torch.ones(47)
        tensors["vit.surprise"] = torch.ones(1)
        tensors[f"{layer}1.intermediate.dense.bias"][3] = torch.nan
        tensors[f"{layer}2.intermediate.dense.bias"][0] = torch.inf
        tensors["classifier.bias"] = torch.ones(5, dtype=torch.int32)

    rewrite(vit, damage)
    with pytest.raises(CheckpointError) as error:
        vitlib.load(vit)
    for part in (
        "missing: vit.encoder.layer.0-2.output.dense.bias",
        "unexpected: vit.surprise",
        "wrong shape: vit.layernorm.weight is 47, expected 48",
        "NaN or infinite values in: vit.encoder.layer.1-2.intermediate.dense.bias",
        "not floating point: classifier.bias (torch.int32)",
    ):
        assert part in str(error.value)


def test_large_finite_values_are_no_infinity(vit: Path) -> None:
    """A sum may overflow where no value does."""
    rewrite(vit, lambda tensors: tensors["vit.layernorm.bias"].fill_(3e38))
    assert vitlib.load(vit).norm.bias.max() > 2e38


def test_the_same_tensor_twice(vit: Path) -> None:
    rewrite(vit, lambda t: t.update({"layernorm.weight": t["vit.layernorm.weight"].clone()}))
    with pytest.raises(CheckpointError, match=r"repeated: .*layernorm\.weight"):
        vitlib.load(vit)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers 4 (the tensors have 3)"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000 (the tensors have 3)"),
        ({"hidden_size": 64}, "hidden_size 64 (the tensors have 48)"),
        ({"intermediate_size": 95}, "intermediate_size 95 (the tensors have 96)"),
        ({"patch_size": 16}, "patch_size (16, 16) (the tensors have (8, 8))"),
        ({"num_channels": 1}, "num_channels 1 (the tensors have 3)"),
        ({"image_size": 64}, "image_size 64x64, 65 positions (the tensors have 17 positions)"),
        ({"id2label": {"0": "a", "1": "b"}}, "2 labels, a head of 5 classes"),
        ({"id2label": {"0": "a", "7": "b"}}, "expected id2label to number 2 labels from 0"),
        ({"id2label": ["a"]}, "expected id2label to map numbers to names"),
        ({"num_attention_heads": 5}, "embed_dim=48 is not a multiple of num_heads=5"),
        ({"num_attention_heads": "4"}, "num_heads='4': expected a whole number"),
        ({"layer_norm_eps": "small"}, "norm_eps='small'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu': vitlib computes gelu"),
        ({"model_type": "swin"}, "model_type 'swin' (its attention is within windows)"),
        ({"model_type": 7}, "model_type 7"),
        ({"image_size": [32]}, "image_size"),
        ({"patch_size": "8"}, "patch_size"),
        ({"image_size": {"height": 32}}, "image_size"),
        ({"problem_type": "guess"}, "problem_type='guess'"),
    ],
)
def test_a_config_that_contradicts(change: dict[str, object], told: str, vit: Path) -> None:
    edit(vit, **change)
    with pytest.raises(vitlib.VitlibError) as error:
        vitlib.load(vit)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_lost_block_is_told(vit: Path) -> None:
    rewrite(vit, lambda t: [t.pop(key) for key in list(t) if ".layer.1." in key])
    with pytest.raises(CheckpointError, match=r"num_hidden_layers 3 \(the tensors have blocks 0,2"):
        vitlib.load(vit)


def test_what_the_layout_cannot_say_is_not_written(tmp_path: Path) -> None:
    small = vitlib.ViTConfig(
        image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=3
    )
    for changes, told in (
        ({"pool": "mean"}, "pool='mean'"),
        ({"num_registers": 2}, "num_registers=2"),
        ({"activation": "swiglu"}, "activation='swiglu'"),
        ({"rope_theta": 100.0, "pos_embed": False}, "rope_theta=100.0"),
        ({"final_norm": "none"}, "final_norm='none'"),
        ({"pre_norm": True}, "pre_norm=True"),
        ({"family": "dinov2", "position_resize": "bicubic_fp32"}, "layer_scale=None"),
        ({"family": "swin"}, "family='swin'"),
    ):
        with pytest.raises(ConfigError, match=told):
            vitlib.save(vitlib.ViT(replace(small, **changes)), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="layout='tf'"):
        vitlib.save(vitlib.ViT(small), tmp_path / "no", layout="tf")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be written"):
        vitlib.save(vitlib.ViT(small), tmp_path / "file")


def test_what_the_layout_cannot_hold_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = vitlib.ViTConfig(
        image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=3
    )
    lost = vitlib.save(vitlib.ViT(replace(small, position_resize="bilinear")), tmp_path / "a")
    assert lost == {"position_resize": ("bilinear", "bicubic")}
    assert "cannot hold: position_resize bilinear becomes bicubic" in caplog.text
    assert vitlib.save(vitlib.ViT(small), tmp_path / "b") == {}
    gains = replace(small, layer_scale=0.1)  # ViT has no gains there: it becomes a DINOv2
    assert "position_resize" in vitlib.save(vitlib.ViT(gains), tmp_path / "c")
    assert vitlib.load(tmp_path / "c").config.family == "dinov2"


def test_other_weights_in_the_folder_are_not_shadowed(vit: Path, tmp_path: Path) -> None:
    model = vitlib.load(vit)
    vitlib.save(model, tmp_path / "both")
    with pytest.raises(SourceError, match=r"holds model\.safetensors of another checkpoint"):
        vitlib.save(model, tmp_path / "both", layout="torchvision")


@pytest.mark.parametrize("layout", ["hf", "torchvision"])
def test_the_umask_says_who_may_read(layout: str, tmp_path: Path) -> None:
    config = vitlib.ViTConfig.named("Ti/16", image_size=32, num_classes=3)
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            vitlib.save(vitlib.ViT(config), tmp_path / str(umask), layout=layout)
        finally:
            os.umask(before)
        files = list((tmp_path / str(umask)).iterdir())
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_a_fresh_model_opens_in_theirs(tmp_path: Path) -> None:
    config = vitlib.ViTConfig.named("Ti/16", image_size=64, num_classes=3)
    model = vitlib.ViT(replace(config, labels=("a", "b", "c"))).eval()
    vitlib.save(model, tmp_path)
    opened = hf.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert opened.config.id2label == {0: "a", 1: "b", 2: "c"}
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert references.distance(model(images), opened(images).logits) < 2e-6


def test_silent_where_nothing_was_asked(vit: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        vitlib.load(vit)
    assert not caplog.records


@pytest.mark.parametrize("name", ["vit", "dinov2 swiglu"])
def test_a_config_of_anything_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    """Every key, each with every kind of JSON value: it loads, or a VitlibError of one line."""
    references.saved(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    values = [None, "x", -1, 0, 1.5, True, [], [1, 2, 3], {}, {"a": 1}, 10**30, float("nan"), "8"]
    told: list[str] = []
    for key in [*config, "num_labels", "id2label", "architectures", "mlp_ratio"]:
        for value in values:
            (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                vitlib.load(tmp_path)
            except vitlib.VitlibError as error:
                told.append(str(error))
    assert len(told) > 100
    assert not [message for message in told if "\n" in message]
