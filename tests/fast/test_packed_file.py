"""Test the file of packed weights: mapped where it fits, packed again where it does not."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vitlib
from fixtures.fast_models import FAMILIES, all_outputs, pixels, tiny
from vitlib.errors import CheckpointError
from vitlib.fast import FastViT, cpu, load, onednn_memory
from vitlib.fast.cpu import kernel_plan
from vitlib.fast.packed_file import FILE, packed_layers

PRECISIONS = ["fp32", "bf16", *(["int8"] if kernel_plan("int8") else [])]
PACKS = cpu.kernel_plan("fp32").packed and onednn_memory.has_packed_memory(torch.float32)
needs_packing = pytest.mark.skipif(not PACKS, reason="this CPU or this torch maps no packed weight")


def is_mapped(fast: FastViT) -> bool:
    layers = packed_layers(fast.trunk).values()
    return bool(layers) and all("memory" in vars(layer.packed) for layer in layers)


def same_bits(fast: FastViT, other: FastViT, name: str) -> bool:
    before, after = (all_outputs(model, pixels(tiny(name), 3)) for model in (fast, other))
    return all(torch.equal(before[key], after[key]) for key in before)


def rewrite(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the header of a file of packed weights, whose length stays."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length])
    change(about)
    header = json.dumps(about).encode()
    assert len(header) <= length
    path.write_bytes(content[:8] + header.ljust(length) + content[8 + length :])


@needs_packing
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_weights_are_mapped(name: str, precision: str, tmp_path: Path) -> None:
    model = tiny(name)
    calibrate = pixels(model, 8) if precision == "int8" else None
    fast = vitlib.optimize(model, precision, calibrate=calibrate)
    fast.save(tmp_path)
    again = load(tmp_path)
    assert is_mapped(again)
    assert same_bits(fast, again, name)
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert not is_mapped(other)
        assert same_bits(fast, other, name)
    (tmp_path / FILE).unlink()  # the mapping stays
    assert same_bits(fast, again, name)
    again.save(tmp_path)
    assert is_mapped(load(tmp_path))


def of_another_torch(path: Path) -> None:
    rewrite(path, lambda about: about.update(torch="2.12.1"))


def of_another_cpu(path: Path) -> None:
    rewrite(path, lambda about: about["layers"]["blocks.1.out"].update(layout="0" * 64))  # type: ignore[index]


def of_another_model(path: Path) -> None:
    rewrite(path, lambda about: about.update(id="0" * 64))


def beyond_the_end(path: Path) -> None:
    rewrite(path, lambda about: about["layers"]["blocks.1.out"].update(start=10**6))  # type: ignore[index]


def of_another_size(path: Path) -> None:
    rewrite(path, lambda about: about["layers"]["blocks.1.out"].update(size=64))  # type: ignore[index]


def without_a_layer(path: Path) -> None:
    rewrite(path, lambda about: about["layers"].pop("blocks.1.out"))  # type: ignore[attr-defined]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def with_nan(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1000] + b"\xff" * 1000)


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "another torch": (of_another_torch, "is for torch 2.12.1 and this is"),
    "another CPU": (of_another_cpu, "is for another kind of CPU"),
    "another model": (of_another_model, "is not of this model"),
    "beyond the end": (beyond_the_end, "is damaged"),
    "another size": (of_another_size, "is damaged"),
    "without a layer": (without_a_layer, "is for another kind of CPU"),
    "truncated": (truncated, "is damaged"),
    "NaN": (with_nan, "holds NaN or infinity"),
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "no header": (lambda path: path.write_bytes(b"\xff" * 100), "is damaged"),
    "JSON of another kind": (lambda path: path.write_bytes(b"\2\0\0\0\0\0\0\0[]"), "is damaged"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is damaged"),
}


@needs_packing
@pytest.mark.parametrize("case", UNFIT)
def test_unfit_file_is_packed_again(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fast = vitlib.optimize(tiny())
    fast.save(tmp_path)
    change, message = UNFIT[case]
    change(tmp_path / FILE)
    with caplog.at_level(logging.WARNING, logger="vitlib"):
        again = load(tmp_path)
    assert [message in record.getMessage() for record in caplog.records] == [True]
    assert caplog.records[0].getMessage().endswith("packing the weights again")
    assert not any("memory" in vars(layer.packed) for layer in packed_layers(again.trunk).values())
    assert same_bits(fast, again, "class token")


@needs_packing
def test_folder_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CPU without AVX-512 packs nothing, and takes torch's own kernels."""
    model = tiny()
    vitlib.optimize(model).save(tmp_path)
    monkeypatch.setattr(cpu, "this_machine", lambda: cpu.Machine("x86_64", "intel", "old"))
    again = load(tmp_path)
    assert "another kind of CPU" in caplog.text
    assert not packed_layers(again.trunk)
    assert same_bits(vitlib.optimize(model), again, "class token")


@needs_packing
@pytest.mark.parametrize("name", ["norm.weight", "blocks.1.qkv.bias", "blocks.2.qkv.weight"])
def test_plain_weights_that_are_read_are_checked(name: str, tmp_path: Path) -> None:
    """Beside the packed weights these are used; from the last block also the weight of q, k, v."""
    vitlib.optimize(tiny()).save(tmp_path)
    path = tmp_path / "fast.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load(tmp_path)


def test_torch_without_packed_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fast = vitlib.optimize(tiny())
    fast.save(tmp_path)
    monkeypatch.setattr(onednn_memory, "has_packed_memory", lambda _: False)
    again = load(tmp_path)
    assert same_bits(fast, again, "class token")
    assert ("maps no packed weights here" in caplog.text) == PACKS
    fast.save(tmp_path)
    assert not (tmp_path / FILE).exists()
    caplog.clear()
    assert same_bits(fast, load(tmp_path), "class token")
    assert not caplog.records


def test_save_without_packed_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fast = vitlib.optimize(tiny())
    fast.save(tmp_path)
    fast.save(tmp_path, packed=False)
    assert [path.name for path in tmp_path.iterdir()] == ["fast.safetensors"]
    assert same_bits(fast, load(tmp_path), "class token")
    assert not caplog.records


def test_folder_of_an_earlier_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its header does not speak of packed weights."""
    fast = vitlib.optimize(tiny())
    fast.save(tmp_path, packed=False)
    path = tmp_path / "fast.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vitlib_fast"])
    assert header.pop("packed") is None
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"vitlib_fast": json.dumps(header)})
    assert same_bits(fast, load(tmp_path), "class token")
    assert not caplog.records
