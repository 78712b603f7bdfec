"""Finding files, and trusting none of them."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from vitlib.checkpoint.layouts.networks import extract_network
from vitlib.errors import CheckpointError, SourceError, VitlibError
from vitlib.source.hub import is_hub_unreachable
from vitlib.source.locate import MAX_JSON_BYTES, Source, read_json


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[1]", "holds a JSON list: expected an object"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": ' + "1" * 10_000 + "}", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
    ):
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(SourceError, match=message):
            read_json(path)
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(SourceError, match="expected at most"):
        read_json(path)


def test_index_outside_folder_is_rejected(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for files, message in (
        ({"a": "../secret.safetensors"}, "expected plain file names"),
        ({"a": "/etc/passwd"}, "expected plain file names"),
        ({"a": ".."}, "expected plain file names"),
        ({"a": 3}, "expected a 'weight_map'"),
        (["a"], "expected a 'weight_map'"),
        ({"a": "gone.safetensors"}, "lacks gone.safetensors, which model.safetensors.index.json"),
    ):
        index.write_text(json.dumps({"weight_map": files}))
        with pytest.raises(VitlibError) as error:
            Source(tmp_path).tensors()
        assert message in str(error.value)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in ("1", "2"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="a stand in an earlier shard too"):
        Source(tmp_path).tensors()


def test_safetensors_come_first(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert [path.name for path in Source(tmp_path).weights()] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clip_names(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert Source(tmp_path).weights() == [tmp_path / name]


@pytest.mark.parametrize("name", ["a.safetensors", "a.NPZ", "a.pth", "a.pt", "a.bin"])
def test_the_only_file_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    for other in ("config.json", "README.md", ".hidden.pth"):
        (tmp_path / other).write_text("{}")
    assert Source(tmp_path).weights() == [tmp_path / name]
    assert Source(tmp_path).json("config.json") == {}
    (tmp_path / "b.pth").write_bytes(b"")
    with pytest.raises(SourceError, match=r"holds a\..*, b\.pth: name the one to load"):
        Source(tmp_path).weights()


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no weights in .* or one file of \.safetensors, \.npz"):
        Source(tmp_path).weights()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"LoRA adapter alone: merge .* merge_and_unload"):
        Source(tmp_path).weights()


def test_wrapper_keys_and_finite_test_of_selected_tensors(tmp_path: Path) -> None:
    network = {
        "patch_embed.proj.weight": torch.ones(4, 3, 2, 2),
        "blocks.0.attn.qkv.weight": torch.randn(12, 4),
        "blocks.0.mlp.fc2.weight": torch.randn(4, 4),
    }
    student = {f"module.backbone.{name}": torch.full((2,), torch.nan) for name in network}
    teacher = {f"backbone.{name}": tensor for name, tensor in network.items()}
    teacher["head.mlp.0.weight"] = torch.full((2,), torch.nan)
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, tmp_path / "checkpoint.pth")
    source = Source(tmp_path / "checkpoint.pth")
    result, prefix = extract_network(source, source.tensors(), None, None)
    assert result.keys() == network.keys()
    assert all(torch.equal(result[name], network[name]) for name in network)
    assert (prefix, source.wrapper_keys) == ("backbone.", ("teacher", "backbone."))
    student_message = "student (3 tensors: prefix='student.')"
    assert source.ignored == (student_message, "epoch", "head (1 tensor)")
    assert source.is_finite() is True


def test_finite_over_shards(tmp_path: Path) -> None:
    index = {"weight_map": {"module.a": "1.safetensors", "module.b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for bad, expected in ((1.0, True), (torch.inf, False)):
        save_file({"module.a": torch.ones(2)}, tmp_path / "1.safetensors")
        save_file({"module.b": torch.tensor([1.0, bad])}, tmp_path / "2.safetensors")
        source = Source(tmp_path)
        assert source.is_finite() is expected
        assert source.tensors().keys() == {"module.a", "module.b"}


@pytest.mark.parametrize("name", ["./x", "a/b/c", "/nowhere", "~/nowhere/x", "x y", "", "..", "-x"])
def test_invalid_hub_ids_are_rejected(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")  # above which no weights lie about
    with pytest.raises(SourceError, match=r"expected a folder|no weights"):
        Source(name).weights()


# --- the hub, whose client is replaced by what it would do ----------------------------------------


def hub_that(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[tuple[str, str]]:
    requests: list[tuple[str, str]] = []

    monkeypatch.setattr("vitlib.source.hub.is_hub_unreachable", lambda: False)

    def download(repo: str, name: str, **_: object) -> str:
        requests.append((repo, name))
        result = answer(name) if callable(answer) else answer
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return requests


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub said no")
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.LocalEntryNotFoundError, "the hub cannot be reached: check the name, check the"),
        (errors.RepositoryNotFoundError, "not on the hub: check the name, or pass token="),
        (errors.GatedRepoError, "is gated: ask for access"),
        (errors.RevisionNotFoundError, "has no revision 'v9' on the hub"),
        (errors.HfHubHTTPError, "cannot be had from the hub: the hub said no"),
    ],
)
def test_hub_errors(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_that(monkeypatch, http_error(kind))
    with pytest.raises(SourceError) as error:
        Source("someone/something", revision="v9").json("config.json")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_hub_files_are_requested_once_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")

    def answer(name: str) -> object:
        path = tmp_path / name
        return str(path) if path.exists() else http_error(errors.RemoteEntryNotFoundError)

    requests = hub_that(monkeypatch, answer)
    source = Source("someone/something")
    assert source.weights() == source.weights() == [tmp_path / "pytorch_model.bin"]
    names = [name for _, name in requests]
    assert names == ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]


def test_offline_with_the_checkpoint_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")

    def answer(name: str) -> object:
        path = tmp_path / name
        return str(path) if path.exists() else http_error(errors.LocalEntryNotFoundError)

    hub_that(monkeypatch, answer)
    assert Source("someone/something").weights() == [tmp_path / "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("error", "proxy", "expected"),
    [
        (socket.gaierror("Name or service not known"), "", True),
        (ConnectionRefusedError(), "", True),
        (TimeoutError(), "", False),  # a slow network is left to the client, which tries again
        (socket.gaierror("Name or service not known"), "http://proxy:3128", False),
    ],
)
def test_unreachable_hub_fails_fast(
    error: OSError, proxy: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("vitlib.source.hub.PAUSE", 0.01)
    monkeypatch.setattr("vitlib.source.hub.getproxies", lambda: {"https": proxy} if proxy else {})
    assert is_hub_unreachable() is expected
    if expected:
        with pytest.raises(
            SourceError, match=r"cannot be reached.*check the network.*--model demo"
        ):
            Source("someone/that-is-in-no-cache").json("config.json")


def test_the_real_client_offline() -> None:
    source = Source("someone/that-is-in-no-cache", local_files_only=True)
    with pytest.raises(SourceError, match=r"not in the cache .*local_files_only"):
        source.json("config.json")
