"""Deltas: what they hold, the base they are of, and files that are not to be trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitlib
from fixtures.adapted import EVERY_PART, adapted, base, largest, move
from fixtures.families import FAMILIES, RARE, pixels
from vitlib.adapters import delta, merge_lora
from vitlib.errors import CheckpointError, ConfigError, SourceError

everyone = pytest.mark.parametrize("family", FAMILIES | RARE)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A delta of every part on base("vit")."""
    path = tmp_path / "delta.safetensors"
    vitlib.save_delta(adapted(base("vit"), **EVERY_PART), path)
    return path


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as opened:
        value: dict[str, Any] = json.loads(opened.metadata()[delta.HEADER])
    return value


def rewrite(
    path: Path, change: Callable[[dict[str, Tensor]], None] | None = None, **fields: Any
) -> Path:
    """Change the tensors of a delta, and fields of its header."""
    tensors, text = load_file(path), header(path) | fields
    if change is not None:
        change(tensors)
    save_file(tensors, path, {delta.HEADER: json.dumps(text)})
    return path


@everyone
@pytest.mark.parametrize(
    "parts",
    [EVERY_PART, {"adapters": {"dim": 8, "parallel": True}, "lora": {"rank": 2, "on": "q fc1"}}],
)
def test_delta_gives_the_model_again(family: str, parts: dict[str, Any], tmp_path: Path) -> None:
    model, images = base(family), pixels(2)
    changed = adapted(model, **parts)
    vitlib.save_delta(changed, tmp_path / "delta.safetensors")
    before = torch.get_rng_state()
    again = vitlib.load_delta(base(family), tmp_path / "delta.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(again(images), changed(images))
    assert again.adaptation == changed.adaptation
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in changed.named_parameters()
    }
    assert again.config == changed.config


def test_delta_holds_parts_and_head_alone(file: Path) -> None:
    names = set(load_file(file))
    trained = vitlib.adapt(base("vit"), **EVERY_PART).named_parameters()
    assert names == {name for name, p in trained if p.requires_grad}
    text = header(file)
    assert text["version"] == vitlib.__version__
    assert text["parts"]["prompts"] == {"count": 3, "deep": True}
    assert text["parts"]["lora"]["on"] == ["q", "k", "v", "proj", "fc1", "fc2"]
    again = file.with_name("again.safetensors")
    vitlib.save_delta(vitlib.load_delta(base("vit"), file), again)
    assert again.read_bytes() == file.read_bytes()


def test_another_head_comes_with_the_delta(tmp_path: Path) -> None:
    model, images = base("vit", labels=tuple("abcde")), pixels(2)
    changed = vitlib.adapt(model, lora=2)
    changed.reset_classifier(7)
    vitlib.save_delta(move(changed), tmp_path / "d")
    for other in (model, base("vit", num_classes=3), base("vit", num_classes=0)):
        again = vitlib.load_delta(other, tmp_path / "d")
        with torch.no_grad():
            assert torch.equal(again(images), changed(images))
        assert again.config.num_classes == 7
        assert again.config.labels == ()
        assert other.config.num_classes != 7
    changed.reset_classifier(0)
    vitlib.save_delta(changed, tmp_path / "d")
    with torch.no_grad():
        assert torch.equal(vitlib.load_delta(model, tmp_path / "d")(images), changed(images))


def test_head_of_ones_own_needs_its_modules(tmp_path: Path) -> None:
    def own_head() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 4))

    model = base("vit")
    changed = vitlib.adapt(model, lora=2)
    changed.head = own_head()
    changed.train()(pixels(4))  # moves the statistics of the norm
    vitlib.save_delta(move(changed.eval()), tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"head is no linear layer: give the model a head"):
        vitlib.load_delta(model, tmp_path / "d")
    model.head = own_head()
    with torch.no_grad():
        again = vitlib.load_delta(model.eval(), tmp_path / "d")
        assert torch.equal(again(pixels(2)), changed(pixels(2)))


def test_all_that_trains_is_written(tmp_path: Path) -> None:
    model, images = base("vit"), pixels(2)
    changed = merge_lora(adapted(model, prompts=2, lora={"rank": 2, "on": "qv"}))
    changed.norm.weight = nn.Parameter(changed.norm.weight + 1)
    vitlib.save_delta(changed, tmp_path / "d")
    names = load_file(tmp_path / "d").keys()
    assert {"norm.weight", "blocks.0.attn.q.weight", "blocks.2.attn.v.weight"} <= names
    assert "norm.bias" not in names
    again = vitlib.load_delta(model, tmp_path / "d")
    with torch.no_grad():
        assert torch.equal(again(images), changed(images))
    assert not torch.equal(again.norm.weight, model.norm.weight)


def test_frozen_head_is_written(tmp_path: Path) -> None:
    changed = adapted(base("vit"), lora=2).requires_grad_(False)
    vitlib.save_delta(changed, tmp_path / "d")
    again = vitlib.load_delta(base("vit"), tmp_path / "d")
    assert torch.equal(again.head.weight, changed.head.weight)
    with torch.no_grad():  # torch multiplies frozen weights by another kernel
        assert largest(again(pixels(2)), changed(pixels(2))) <= 1e-6


def test_dtypes_of_base_and_delta_stay(tmp_path: Path) -> None:
    model = base("vit").bfloat16()
    changed = adapted(model, prompts=2, lora=2)
    vitlib.save_delta(changed, tmp_path / "d")
    again = vitlib.load_delta(model, tmp_path / "d")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match=r"of another base: .* in the same dtype"):
        vitlib.load_delta(base("vit"), tmp_path / "d")


def change_weight(model: vitlib.ViT) -> None:
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] += 1e-3


def swap_blocks(model: vitlib.ViT) -> None:
    model.blocks = nn.ModuleList([model.blocks[1], model.blocks[0], model.blocks[2]])


def add_module(model: vitlib.ViT) -> None:
    model.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("change", [change_weight, swap_blocks, add_module])
def test_delta_of_another_base_is_refused(change: Callable[[vitlib.ViT], None], file: Path) -> None:
    model = base("vit")
    change(model)
    with pytest.raises(CheckpointError, match=r"is a delta of another base: its weights") as error:
        vitlib.load_delta(model, file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_eps": 1e-3}, "with other settings: norm_eps 1e-06, in the model 0.001; load the"),
        ({"activation": "gelu_tanh"}, "activation 'gelu', in the model 'gelu_tanh'"),
    ],
)
def test_delta_of_a_base_with_other_numerics_is_refused(
    values: dict[str, Any], message: str, file: Path
) -> None:
    other = base("vit", **values)
    other.load_state_dict(base("vit").state_dict())
    with pytest.raises(CheckpointError, match=message) as error:
        vitlib.load_delta(other, file)
    assert "\n" not in str(error.value)


def test_rates_and_names_of_the_base_may_differ(file: Path) -> None:
    for values in ({"dropout": 0.1}, {"family": "deit"}, {"labels": tuple("vwxyz")}):
        other = base("vit", **values)
        other.load_state_dict(base("vit").state_dict())
        assert vitlib.load_delta(other, file).adaptation is not None


def test_path_that_is_none_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match="path=None: expected the path of a file"):
        vitlib.load_delta(base("vit"), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="path=None: expected the path of a file"):
        vitlib.save_delta(vitlib.load_delta(base("vit"), file), None)  # type: ignore[arg-type]


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.attn.q.upper"] = tensors.pop("blocks.0.attn.q.up")


def widen(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.attn.q.up"] = torch.zeros(32, 3)


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["patch_embed.prompt_token"][0, 1, 2] = float("nan")


def count_down(tensors: dict[str, Tensor]) -> None:
    tensors["patch_embed.prompt_token"] = torch.zeros(1, 3, 32, dtype=torch.int64)


def drop_head(tensors: dict[str, Tensor]) -> None:
    del tensors["head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"blocks.0.attn.q.up is missing; blocks.0.attn.q.upper is not known"),
        (widen, r"blocks.0.attn.q.up is \(32, 3\), expected \(32, 2\)"),
        (poison, r"patch_embed.prompt_token has NaN or infinity"),
        (count_down, r"prompt_token is torch.int64, expected floats"),
        (drop_head, r"does not fit the model: 5 classes and a head of"),
    ],
)
def test_changed_tensors_are_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, file: Path
) -> None:
    model = base("vit")
    assert vitlib.load_delta(model, rewrite(file)).adaptation is not None
    with pytest.raises(CheckpointError, match=message) as error:
        vitlib.load_delta(model, rewrite(file, change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 1}, "header that cannot be read .*format 1, expected 2"),
        ({"base": 3}, "header that cannot be read .*no settings"),
        ({"base": {"x" * 99: 1}}, r"with other settings: x{40} 1, in the model None; image_size"),
        ({"format": [[]] * 1000}, "header that cannot be read"),
        ({"parts": [1]}, "header that cannot be read .*no settings"),
        ({"parts": {}}, "does not fit the model: nothing to add"),
        ({"parts": {"hooks": {}}}, "does not fit the model: .*hooks"),
        ({"parts": {"prompts": {"count": 2**40}}}, r"does not fit .* expected less than 2\*\*31"),
        (
            {"parts": {**EVERY_PART, "prompts": {"count": 10**6, "deep": True}}},
            r"prompt_token is \(1, 3, 32\), expected \(1, 1000000, 32\)",
        ),
        ({"parts": {"lora": {"rank": "2"}}}, "lora: rank='2': expected a whole number"),
        ({"parts": {"lora": {"rank": 2, "on": [["q"]]}}}, "lora: on=.*: expected some of"),
        ({"head": {"num_classes": 5}}, "does not fit the model: 'pool'"),
        (
            {"head": {"num_classes": 5, "pool": "cls", "labels": [1], "problem_type": None}},
            "labels: expected names",
        ),
        (
            {"head": {"num_classes": 5, "pool": [], "labels": [], "problem_type": None}},
            r"pool=\[\]: expected one of",
        ),
        ({"base_sha256": "0" * 64}, "is a delta of another base"),
    ],
)
def test_changed_headers_are_refused(fields: dict[str, Any], message: str, file: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        vitlib.load_delta(base("vit"), rewrite(file, **fields))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 4000


def test_classes_of_a_header_take_no_memory(file: Path) -> None:
    head = {"num_classes": 2**31 - 1, "pool": "cls", "labels": [], "problem_type": None}
    with pytest.raises(CheckpointError, match=r"2147483647 classes and a head of"):
        vitlib.load_delta(base("vit", num_classes=3), rewrite(file, head=head))


def test_files_that_are_no_delta(file: Path, tmp_path: Path) -> None:
    model = base("vit")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"is truncated or not a safetensors file"):
        vitlib.load_delta(model, file)
    file.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    with pytest.raises(CheckpointError, match=r"has a header of 1099511627776 bytes"):
        vitlib.load_delta(model, file)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is truncated or not a safetensors file"):
        vitlib.load_delta(model, file)
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"is no delta: expected a file of vitlib.save_delta"):
        vitlib.load_delta(model, file)
    save_file({"a": torch.zeros(2)}, file, {delta.HEADER: "[" * 100_000})
    with pytest.raises(CheckpointError, match=r"has a header that cannot be read"):
        vitlib.load_delta(model, file)
    with pytest.raises(SourceError, match=r"cannot be read: No such file"):
        vitlib.load_delta(model, tmp_path / "none")


def test_load_says_how_to_open_a_delta(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for parts in ({"prompts": 2}, {"adapters": 4}, {"lora": 2}):
        vitlib.save_delta(vitlib.adapt(base("vit"), **parts), path)
        with pytest.raises(CheckpointError, match=r"without its base, .* to vitlib.load_delta"):
            vitlib.load(path)


def test_nothing_is_written_where_nothing_can_be(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"save_delta: expected a model of vitlib.adapt"):
        vitlib.save_delta(base("vit"), tmp_path / "out")
    changed = adapted(base("vit"), prompts=2)
    data = file.read_bytes()
    with torch.no_grad():
        changed.head.bias[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"head.bias: NaN or infinity"):
        vitlib.save_delta(changed, file)
    assert file.read_bytes() == data
    with pytest.raises(SourceError, match=r"is a folder"):
        vitlib.save_delta(adapted(base("vit"), prompts=2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]
    with pytest.raises(ConfigError, match=r"load_delta: the model has prompts already"):
        vitlib.load_delta(changed, file)


def test_delta_of_the_base_shares_its_memory(file: Path) -> None:
    model = base("vit")
    again = vitlib.load_delta(model, file)
    weight = model.blocks[0].norm1.weight
    assert again.blocks[0].norm1.weight.data_ptr() == weight.data_ptr()
    assert weight.requires_grad
    again.train()(pixels(2)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert largest(again(pixels(2)), model(pixels(2))) > 1e-3


def test_functions_of_a_model_are_not_lost_silently(tmp_path: Path) -> None:
    model = vitlib.adapt(base("vit"), lora=2)
    attend = torch.nn.functional.scaled_dot_product_attention
    for changed in (model.with_attention(attend), model.with_tokens(vitlib.tokens.merge(2))):
        with pytest.raises(ConfigError, match="which no file holds"):
            vitlib.save_delta(changed, tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())
