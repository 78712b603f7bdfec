"""Tests of sources of a batch: the order of inputs, and errors of single rows."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixtures.synthetic_photos import DEMO, make_photo, write_photos
from vitlib import Predictor, batch
from vitlib.batch.engines import ray_data
from vitlib.batch.inputs import items, lists
from vitlib.batch.inputs.source import Source
from vitlib.batch.worker import Worker
from vitlib.errors import ImageError, SourceError


@pytest.fixture(scope="module")
def vit() -> Predictor:
    return Predictor.load(DEMO)


def test_ray_engines_compute_equal_rows(vit: Predictor, tmp_path: Path) -> None:
    """Compare the two stages of the Ray engine for GPUs with that for CPUs, without Ray."""
    broken = write_photos(tmp_path, 5)[2]
    broken.write_bytes(b"no image")
    items = list_items(tmp_path)
    inputs = [pickle.dumps(item) for item in items]
    batch = {"item": np.array(inputs, object)}
    engine = vit.engine()

    def make(_: int) -> Worker:
        return Worker(engine, "both", None)

    threads = torch.get_num_threads()
    try:
        cpu_rows = ray_data._CpuActor(make)(batch)
        gpu_rows = ray_data._GpuActor(make)(ray_data._decode(batch, engine.preprocessor()))
    finally:
        torch.set_num_threads(threads)
    assert cpu_rows.keys() == gpu_rows.keys() == {"row", "key", "error", "scores", "vectors"}
    assert [bool(error) for error in cpu_rows["error"]] == [
        item.file == str(broken) for item in items
    ]
    for name, expected in cpu_rows.items():
        has_nan = expected.dtype == np.float32
        assert np.array_equal(expected, gpu_rows[name], equal_nan=has_nan)
    assert len({row.tobytes() for row in cpu_rows["scores"]}) > 1


def list_items(*names: object, **options: Any) -> list[items.Item]:
    return list(
        Source(tuple(map(str, names)), **options).iter_items(lambda _: True, lambda _: None)
    )


def read_data(*names: object, **options: Any) -> list[bytes | str]:
    """Return the bytes of each input, or the message of its error."""
    data: list[bytes | str] = []
    for item in list_items(*names, **options):
        try:
            data.append(item.ref.read())
        except ImageError as error:
            data.append(str(error))
    return data


PHOTOS = [make_photo(n) for n in range(5)]
TEXTS = [base64.b64encode(data).decode() for data in PHOTOS]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for number, data in enumerate(PHOTOS):
        (tmp_path / f"{number}.png").write_bytes(data)
    return tmp_path


# --- folders and patterns -------------------------------------------------------------------------


def test_folder_is_listed_by_name_in_any_order_of_scandir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/x.png", "b/a/1.JPG", "a.png", "c.jpeg", "b-.png", "B.webp", "d/e/f/g.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    expected = ["B.webp", "a.png", "b/a/1.JPG", "b/x.png", "b-.png", "c.jpeg", "d/e/f/g.tiff"]
    scandir = os.scandir

    class ReversedScandir:
        def __init__(self, path: Any) -> None:
            self.entries = list(scandir(path))[::-1]

        def __enter__(self) -> Any:
            return iter(self.entries)

        def __exit__(self, *_: Any) -> None: ...

    for _ in range(2):
        names = [Path(item.file).relative_to(tmp_path).as_posix() for item in list_items(tmp_path)]
        assert names == expected
        monkeypatch.setattr(os, "scandir", ReversedScandir)


def test_folder_reports_files_that_are_not_images(tmp_path: Path) -> None:
    for name in ("a.png", "b.txt", ".c.png", "__MACOSX/d.png", "e/.git/f.png", "e/g.heic", "h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    ignored: list[str] = []
    inputs = list(Source((str(tmp_path),)).iter_items(lambda _: True, ignored.append))
    assert [Path(i.file).name for i in inputs] == ["a.png", "g.heic"]
    names = sorted(Path(path).name for path in ignored)
    assert names == [".c.png", ".git", "__MACOSX", "b.txt", "h"]


def test_folder_follows_links_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.png").write_bytes(b"x")
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "2.png").write_bytes(b"x")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "other")
    assert [Path(i.file).name for i in list_items(tmp_path / "in")] == ["1.png", "2.png"]


def test_folder_excludes_output(tmp_path: Path) -> None:
    write_photos(tmp_path, 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.png").write_bytes(b"x")
    assert len(list_items(tmp_path)) == 4
    assert len(list_items(tmp_path, exclude=str(tmp_path / "out"))) == 3


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.png", ["a.png", "b1.png", "b2.png"]),
        ("b?.png", ["b1.png", "b2.png"]),
        ("b[!1].png", ["b2.png"]),
        ("[ab]*.png", ["a.png", "b1.png", "b2.png"]),
        ("*/*.png", ["d/c.png"]),
        ("**/*.png", ["a.png", "b1.png", "b2.png", "d/c.png", "d/e/f.png"]),
        ("d/**/*.png", ["d/c.png", "d/e/f.png"]),
        ("**/e/*", ["d/e/f.png"]),
        ("d*", ["d/c.png", "d/e/f.png"]),  # a folder stands for its files
        ("b{1..2}.png", ["b1.png", "b2.png"]),
        ("*.gif", []),
    ],
)
def test_pattern_lists_matching_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: list[str]
) -> None:
    for name in ("a.png", "b1.png", "b2.png", "d/c.png", "d/e/f.png", ".h.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [i.file for i in list_items(tmp_path / pattern)] == [str(tmp_path / n) for n in names]
    monkeypatch.chdir(tmp_path)
    assert [i.file for i in list_items(pattern)] == names


def test_sources_are_joined_in_order(here: Path) -> None:
    (here / "list.txt").write_text("3.png\n")
    inputs = list_items(here / "1.png", here / "list.txt", here / "*.png")
    assert [i.row for i in inputs] == list(range(7))
    assert [Path(i.file).name for i in inputs[:3]] == ["1.png", "3.png", "0.png"]


# --- lists ----------------------------------------------------------------------------------------


def test_text_list_names_files(here: Path) -> None:
    (here / "l.txt").write_bytes(b"\xef\xbb\xbf1.png\r\n\n  \nno such.png\n0.png")
    assert read_data(here / "l.txt") == [PHOTOS[1], "is not there", PHOTOS[0]]
    assert [i.file for i in list_items(here / "l.txt")] == ["1.png", "no such.png", "0.png"]


def test_paths_in_list_are_relative_to_list_or_root(
    here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "l.txt").write_text(f"1.png\n{here / '2.png'}\nfile://{here / '3.png'}\n")
    assert read_data(other / "l.txt") == ["is not there", PHOTOS[2], PHOTOS[3]]
    assert read_data(other / "l.txt", root=str(here))[0] == PHOTOS[1]


def write_csv(here: Path) -> Path:
    lines = base64.encodebytes(PHOTOS[1]).decode()
    rows = [
        "id,image", f"7,{TEXTS[0]}", f'8,"{lines}"', "9,2.png", "10,", "11,http://x.example/a.png",
        "12,!!!", f'13,"data:image/png;base64,{TEXTS[4]}"', "14", "", "15,a,b",
    ]  # fmt: skip
    (here / "l.csv").write_text("\n".join(rows))
    return here / "l.csv"


def write_jsonl(here: Path) -> Path:
    values = [
        TEXTS[0], base64.encodebytes(PHOTOS[1]).decode(), "2.png", "", "http://x.example/a.png",
        "!!!", f"data:image/png;base64,{TEXTS[4]}", None, 7,
    ]  # fmt: skip
    (here / "l.jsonl").write_text("\n".join(json.dumps({"image": v, "id": 1}) for v in values))
    return here / "l.jsonl"


def write_parquet(here: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    values = [PHOTOS[0], PHOTOS[1], PHOTOS[2], b"", b"no", b"!!!", PHOTOS[4], None, b"x"]
    parquet.write_table(pa.table({"image": values}), here / "l.parquet", row_group_size=4)
    return here / "l.parquet"


def write_hf_parquet(here: Path) -> Path:
    """Write images in the format of Hugging Face's datasets."""
    import pyarrow as pa
    from pyarrow import parquet

    photos = [PHOTOS[0], PHOTOS[1], None, None, b"no", b"!!!", PHOTOS[4], None, b"x"]
    paths = [None, "x.png", "2.png", None, None, None, None, "gone.png", None]
    values = [{"bytes": b, "path": p} for b, p in zip(photos, paths, strict=True)]
    parquet.write_table(pa.table({"image": values}), here / "d.parquet", row_group_size=4)
    return here / "d.parquet"


@pytest.mark.parametrize("make", [write_csv, write_jsonl, write_parquet, write_hf_parquet])
def test_lists_contain_encoded_images(
    here: Path, vit: Predictor, make: Callable[[Path], Path]
) -> None:
    path = make(here)
    data = read_data(path)
    assert [data[i] for i in (0, 1, 2, 6)] == [PHOTOS[i] for i in (0, 1, 2, 4)]
    assert len(data) == 9
    out = here / "out"
    account = batch.run(path, model=vit, out=out, batch_size=2, shard_size=5)
    rows = [json.loads(x) for p in sorted(out.glob("part*")) for x in p.read_text().splitlines()]
    assert [row["error"] is None for row in rows] == [i in (0, 1, 2, 6) for i in range(9)]
    assert (account.ok, account.failed) == (4, 5)
    expected = vit.probabilities([PHOTOS[i] for i in (0, 1, 2, 4)]).max(axis=1)
    assert np.allclose([row["probs"][0] for row in rows if not row["error"]], expected, atol=1e-6)
    assert rows[0]["file"] == str(path)


def test_azure_csv_has_row_within_file(here: Path, vit: Predictor) -> None:
    batch.run(write_csv(here), model=vit, out=here / "out", format="azure-csv")
    import csv

    with (here / "out" / "predictions.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["0", "1", "0", *map(str, range(3, 9))]


def test_column_of_images_is_chosen(here: Path) -> None:
    (here / "l.csv").write_text(f"a,b\n0.png,1.png\n{TEXTS[2]},3.png\n")
    assert read_data(here / "l.csv", column="b") == [PHOTOS[1], PHOTOS[3]]
    assert read_data(here / "l.csv", column="a") == [PHOTOS[0], PHOTOS[2]]
    with pytest.raises(SourceError, match="'a', 'b'"):
        list_items(here / "l.csv")
    (here / "p.csv").write_text("label,Filename,image\nx,0.png,1.png\n")
    assert read_data(here / "p.csv") == [PHOTOS[1]]  # image before filename


def test_lists_reject_long_lines(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "MAX_LINE", 1000)
    (here / "l.jsonl").write_text(json.dumps({"image": "x" * 2000}))
    (here / "l.csv").write_text("image\n" + "x" * 2000)
    (here / "q.csv").write_text('image\n"' + "x\n" * 2000)
    (here / "l.txt").write_text("x" * 100_000)
    for name in ("l.jsonl", "l.csv", "q.csv", "l.txt"):
        with pytest.raises(SourceError, match=r"longer than|is not CSV"):
            list_items(here / name)


def test_images_of_too_many_bytes_fail(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "MAX_BYTES", 1000)
    (here / "big.png").write_bytes(bytes(1001))
    assert "expected at most 1000" in str(read_data(here / "big.png")[0])
    (here / "l.jsonl").write_text(json.dumps({"image": "A" * 2000}))
    assert "expected at most 1000" in str(read_data(here / "l.jsonl")[0])


# --- tars -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_tar_members_are_inputs(here: Path, vit: Predictor, suffix: str) -> None:
    for shard in range(2):
        path = here / f"s-{shard:03d}.{suffix}"
        with tarfile.open(
            path, {"tar": "w", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.get(suffix, "w:gz")
        ) as tar:
            for number in range(3):
                for name, data in (("png", PHOTOS[number + shard]), ("json", b"{}")):
                    member = tarfile.TarInfo(f"d/{shard}{number}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("d/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    source = here / f"s-{{000..001}}.{suffix}"
    data = read_data(source)
    assert data[:3] == PHOTOS[:3]
    assert data[4:7] == PHOTOS[1:4]
    assert "link" in str(data[3])
    account = batch.run(source, model=vit, out=here / "out", shard_size=3, batch_size=2)
    assert (account.inputs, account.ok, account.failed, account.ignored) == (8, 6, 2, 6)
    rows = [
        json.loads(x)
        for p in sorted((here / "out").glob("part*"))
        for x in p.read_text().splitlines()
    ]
    assert rows[0]["file"] == f"{here}/s-000.{suffix}/d/00.png"
    archive = (here / f"s-001.{suffix}").read_bytes()
    (here / f"s-001.{suffix}").write_bytes(archive[: len(archive) // 2])
    with pytest.raises(SourceError, match=r"damaged|ends"):
        batch.run(source, model=vit, out=here / "other")


def test_parquet_reads_only_requested_row_groups(here: Path) -> None:
    """A run that resumes does not read photos of finished shards."""
    rows = {5, 6}
    for path in (write_parquet(here), write_hf_parquet(here)):
        source = Source((str(path),))
        selected = list(source.iter_items(lambda row: row in rows, lambda _: None))
        stamps = [item.ref.fingerprint() for item in selected]
        assert stamps == [item.ref.fingerprint() for item in list_items(path)]
        assert [bool(i.ref.read()) for i in selected[:4]] == [False] * 4
        assert selected[6].ref.read() == PHOTOS[4]
