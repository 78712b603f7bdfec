"""Finding files, and trusting none of them."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from vitlib.errors import CheckpointError, SourceError, VitlibError
from vitlib.source import MAX_JSON_BYTES, Source, file_is_finite, read_json, read_tensors


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.randn(()),
        "e": torch.randn(2, 2).half(),
        "f": torch.zeros(0, 3),
        "g": torch.randn(1).double(),
        "h": torch.tensor([True]),
    }


def test_tensors_of_every_dtype(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    for name in ("x.safetensors", "x.bin"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == tensors.keys()
        for key, expected in tensors.items():
            assert found[key].dtype == expected.dtype
            assert torch.equal(found[key], expected)


def test_an_odd_header_shifts_nothing(tmp_path: Path) -> None:
    """Old writers did not pad the header, so that tensors may start anywhere."""
    data = torch.arange(6, dtype=torch.float32)
    for padding in range(8):
        entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
        header = json.dumps({"x": entry}).encode() + b" " * padding
        path = tmp_path / f"{padding}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
        assert torch.equal(read_tensors(path)["x"], data)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(keep: int, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for name, save in (("x.safetensors", save_file), ("x.bin", torch.save)):
        path = tmp_path / name
        save(tensors, path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"truncated or not a .* download it again"):
            read_tensors(path)


def test_headers_that_lie(tmp_path: Path) -> None:
    lies = {
        "long": (2**62).to_bytes(8, "little") + b"{}",
        "beyond": b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
        "shape": b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
        "dtype": b'{"x":{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}}',
        "hole": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "json": b"{{{{",
    }
    for name, header in lies.items():
        path = tmp_path / f"{name}.safetensors"
        if name == "long":
            path.write_bytes(header)
        else:
            path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            read_tensors(path)


class Evil:
    ran: list[int] = []  # noqa: RUF012

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return Evil.ran.append, (1,)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.bin", "plain.bin"):
        with pytest.raises(CheckpointError):
            read_tensors(tmp_path / name)
    assert Evil.ran == []


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A few kilobytes could hold gigabytes of zeros."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.bin")
    with (
        zipfile.ZipFile(tmp_path / "x.bin") as old,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    with pytest.raises(CheckpointError, match="is compressed"):
        read_tensors(tmp_path / "y.bin")


def test_pickles_of_something_else(tmp_path: Path) -> None:
    for value, told in (
        ([torch.zeros(1)], "holds a list"),
        ({"model": {"a": torch.zeros(1)}}, "model is no tensor"),
        ({1: torch.zeros(1)}, "holds a dict"),
    ):
        torch.save(value, tmp_path / "x.bin")
        with pytest.raises(CheckpointError, match=told):
            read_tensors(tmp_path / "x.bin")


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_tensors(path)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, told in (
        ("{", "is not JSON"),
        ("[1]", "holds a JSON list: expected an object"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": ' + "1" * 10_000 + "}", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
    ):
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(SourceError, match=told):
            read_json(path)
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(SourceError, match="expected at most"):
        read_json(path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for files, told in (
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
        assert told in str(error.value)


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


@pytest.mark.parametrize("name", ["./x", "a/b/c", "/nowhere", "~/nowhere/x", "x y", "", "..", "-x"])
def test_what_cannot_be_a_hub_id(name: str) -> None:
    with pytest.raises(SourceError, match=r"expected a folder|no weights"):
        Source(name).weights()


# --- the hub, whose client is replaced by what it would do ----------------------------------------


def hub_that(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[tuple[str, str]]:
    asked: list[tuple[str, str]] = []

    def download(repo: str, name: str, **_: object) -> str:
        asked.append((repo, name))
        found = answer(name) if callable(answer) else answer
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub said no")
    return error


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (errors.LocalEntryNotFoundError, "the hub cannot be reached: check the name and the"),
        (errors.RepositoryNotFoundError, "not on the hub: check the name, or pass token="),
        (errors.GatedRepoError, "is gated: ask for access"),
        (errors.RevisionNotFoundError, "has no revision 'v9' on the hub"),
        (errors.HfHubHTTPError, "cannot be had from the hub: the hub said no"),
    ],
)
def test_what_the_hub_refuses(
    kind: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_that(monkeypatch, http_error(kind))
    with pytest.raises(SourceError) as error:
        Source("someone/something", revision="v9").json("config.json")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_files_are_asked_for_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")

    def answer(name: str) -> object:
        path = tmp_path / name
        return str(path) if path.exists() else http_error(errors.RemoteEntryNotFoundError)

    asked = hub_that(monkeypatch, answer)
    source = Source("someone/something")
    assert source.weights() == source.weights() == [tmp_path / "pytorch_model.bin"]
    names = [name for _, name in asked]
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


def test_the_real_client_offline() -> None:
    source = Source("someone/that-is-in-no-cache", local_files_only=True)
    with pytest.raises(SourceError, match="is not in the cache"):
        source.json("config.json")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    """Anywhere in the file, of either sign, and nothing that is merely large."""
    path = tmp_path / "x.safetensors"
    large = torch.finfo(dtype)
    values = torch.randn(1_500_001).to(dtype)
    values[0], values[1], values[-1] = large.max, large.min, large.tiny
    for bad in (None, torch.nan, -torch.nan, torch.inf, -torch.inf):
        for at in (0, 700_000, 1_500_000):
            changed = values.clone()
            if bad is not None:
                changed[at] = bad
            save_file({"a": changed, "b": torch.zeros(3, dtype=dtype)}, path)
            assert file_is_finite(path, dtype) == (bad is None)
    save_file({"a": torch.zeros(0, dtype=dtype)}, path)
    assert file_is_finite(path, dtype)
    assert file_is_finite(path, torch.int32) is None
