"""Load a checkpoint: the forms of its files, and the memory of its tensors."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import vitlib
from fixtures import references
from fixtures.checkpoints import edit_config, load_and_run
from vitlib.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("name", ["vit", "deit two heads", "dinov2", "dinov2 swiglu", "registers"])
def test_load_reads_names_of_transformers_5_memory(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path / "files")
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
        assert torch.equal(load_and_run(tmp_path / folder), load_and_run(tmp_path / "files"))
    assert any("gate_proj" in key for key in state) == ("swiglu" in name)


def test_load_reads_shards_pickles_and_single_files(vit: Path, tmp_path: Path) -> None:
    expected = load_and_run(vit)
    model = hf.ViTForImageClassification.from_pretrained(vit)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(load_and_run(tmp_path / "shards"), expected)
    index = tmp_path / "shards/model.safetensors.index.json"
    assert torch.equal(load_and_run(index), expected)
    tensors = load_file(vit / "model.safetensors")
    for name, new in (("zip", True), ("legacy", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((vit / "config.json").read_text())
        path = tmp_path / name / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=new)
        assert torch.equal(load_and_run(tmp_path / name), expected)
        assert torch.equal(load_and_run(path), expected)
    assert torch.equal(load_and_run(vit / "model.safetensors"), expected)
    assert torch.equal(load_and_run(str(vit)), expected)


def test_load_without_config_infers_from_tensors(vit: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((vit / "model.safetensors").read_bytes())
    config = vitlib.load(vit).config
    with pytest.raises(CheckpointError, match=r"width 48.* state num_heads="):
        vitlib.load(alone)  # no published ViT is so narrow
    assert vitlib.load(alone, num_heads=4).config == replace(config, labels=())
    assert torch.equal(load_and_run(alone, num_heads=4), load_and_run(vit))
    assert torch.equal(load_and_run(alone, config=config), load_and_run(vit))
    with pytest.raises(CheckpointError, match=r"wrong shape: "):
        vitlib.load(alone, config=replace(config, embed_dim=64))


def test_old_config_defaults_equal_transformers(vit: Path) -> None:
    expected = load_and_run(vit)
    edit_config(vit, qkv_bias=None, pooler_act=None, pooler_output_size=None, num_channels=None)
    assert torch.equal(load_and_run(vit), expected)


def test_labels_default_to_empty(tmp_path: Path) -> None:
    references.save_model("vit two classes", tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert vitlib.load(tmp_path).num_classes == 2


def test_labels_may_repeat(vit: Path) -> None:
    edit_config(vit, id2label={"3": "c", "0": "crane", "1": "a", "2": "crane", "4": "d"})
    assert vitlib.load(vit).config.labels == ("crane", "a", "crane", "c", "d")


def test_published_configs_are_read(shared_configs: Path) -> None:
    from vitlib.checkpoint.layouts import hf as layout
    from vitlib.checkpoint.layouts.table import read_state

    checked = 0
    for path in shared_configs.glob("*/config*.json"):
        config = json.loads(path.read_text())
        torch.manual_seed(0)
        with torch.device("meta"):
            model = hf.AutoModel.from_config(hf.AutoConfig.from_pretrained(path))
            if "ForImageClassification" in config["architectures"][0]:
                model = hf.AutoModelForImageClassification.from_config(model.config)
        state = model.state_dict()
        result = layout.find(state)
        shapes = {name: tuple(t.shape) for name, t in read_state(state, result).items()}
        cfg = layout.read_config(config, shapes, result)
        config |= config.get("vision_config", {})
        assert not result.unexpected
        assert cfg.embed_dim == config["hidden_size"]
        assert cfg.norm_eps == config["layer_norm_eps"]
        assert len(cfg.labels) in (0, 31, 1000)
        checked += 1
    assert checked >= 6


# --- nothing is drawn, copied or lost -------------------------------------------------------------


def test_loaded_weights_share_memory_with_file(vit: Path) -> None:
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


def test_training_leaves_file_unchanged(vit: Path) -> None:
    before = (vit / "model.safetensors").read_bytes()
    model = vitlib.load(vit)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (vit / "model.safetensors").read_bytes() == before


def test_save_over_mapped_files(vit: Path) -> None:
    expected = load_and_run(vit)
    model = vitlib.load(vit)
    vitlib.save(model, vit)
    assert torch.equal(load_and_run(vit), expected)
    assert sorted(path.name for path in vit.iterdir()) == ["config.json", "model.safetensors"]


def test_pooler_and_mask_token_survive_saving(tmp_path: Path) -> None:
    references.save_model("vit base", tmp_path / "base")
    model = vitlib.load(tmp_path / "base")
    assert model.pooler is not None
    assert not any(p.requires_grad for p in model.pooler.parameters())
    vitlib.save(model, tmp_path / "again")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "again"))
    assert torch.equal(before["pooler.dense.weight"], after["pooler.dense.weight"])
    references.save_model("dinov2", tmp_path / "dinov2")
    dinov2 = vitlib.load(tmp_path / "dinov2")
    assert dinov2.pooler is None
    with pytest.raises(ConfigError, match="no pooler"):
        dinov2.forward_pooler(torch.zeros(1, 3, 32, 32))
    vitlib.save(dinov2, tmp_path / "dinov2 again")
    tensors = load_file(tmp_path / "dinov2 again/model.safetensors")
    assert tensors["dinov2.embeddings.mask_token"].shape == (1, 48)
    assert tensors["dinov2.embeddings.mask_token"].abs().sum() > 0


def test_killed_save_leaves_no_checkpoint(vit: Path, tmp_path: Path) -> None:
    """The process dies at each of its renames in turn; what is there opens whole or not at all."""
    expected = load_and_run(vit)
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
        assert torch.equal(load_and_run(target), expected)


def test_pickled_model_has_size_of_its_weights(vit: Path, tmp_path: Path) -> None:
    model = vitlib.load(vit)
    assert torch.equal(copy.deepcopy(model).head.weight, model.head.weight)
    torch.save(model.head.state_dict(), tmp_path / "head.pt")
    assert (tmp_path / "head.pt").stat().st_size < 10_000


def test_load_logs_nothing_by_default(vit: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        vitlib.load(vit)
    assert not caplog.records


@pytest.mark.parametrize("name", ["vit", "dinov2 swiglu"])
def test_malformed_config_raises_vitlib_error(name: str, tmp_path: Path) -> None:
    """Every key, each with every kind of JSON value: it loads, or a VitlibError of one line."""
    references.save_model(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    values = [None, "x", -1, 0, 1.5, True, [], [1, 2, 3], {}, {"a": 1}, 10**30, float("nan"), "8"]
    text: list[str] = []
    for key in [*config, "num_labels", "id2label", "architectures", "mlp_ratio"]:
        for value in values:
            (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                vitlib.load(tmp_path)
            except vitlib.VitlibError as error:
                text.append(str(error))
    assert len(text) > 100
    assert not [message for message in text if "\n" in message]
