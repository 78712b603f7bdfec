"""Tests of vitlib attend, similar, classify --plot and embed FOLDER: files and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures import references
from fixtures.pictures import find_frames, read_texts
from vitlib import ImageProcessor, Predictor
from vitlib.cli.attend import METHODS

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")

Run = Callable[..., tuple[int, str, str]]


def image_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model("vit", tmp_path / "model")


def save_model(name: str, folder: Path) -> Path:
    references.save_model(name, folder)
    processor = ImageProcessor(shortest_edge=36, crop_size=(32, 32), resample=3)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png", "below/c.png"):
        pixels = random.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_attend_draws_by_every_method(
    method: str, run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "picture.png"
    status, stdout, err = run_cli(
        "attend", photo, "--method", method, "-m", model, "-o", out, "--json"
    )
    assert (status, err) == (0, "")
    result = json.loads(stdout)
    assert result["grid"] == [4, 4]
    assert np.isfinite(np.array(result["map"], float)).all()
    assert max(image_size(out)) >= 600
    assert ("label" in result) == (method in ("relevance", "gradient", "occlusion"))


@pytest.mark.parametrize("method", METHODS)
def test_attend_names_class_score_and_method(
    method: str, run_cli: Run, model: Path, photo: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    drawn = []
    monkeypatch.setattr("vitlib.plots.save", lambda figure, _: drawn.append(figure))
    status, stdout, _ = run_cli(
        "attend", photo, "--method", method, "-m", model, "-o", tmp_path / "p.png", "--json"
    )
    assert status == 0
    texts, result = read_texts(drawn[0]), json.loads(stdout)
    if "label" in result:
        assert f"{result['label']} {result['score']:.3f}" in texts
    assert any(text.startswith(f"{method}: ") for text in texts)
    scale = "least attention of a tile" if method == "heads" else "dark is low, bright is high"
    if method not in ("pca", "mask"):
        assert any(scale in text for text in texts)
    if method == "mask":
        assert any("more of the class token's attention" in text for text in texts)
    if method != "heads":
        assert find_frames(drawn[0])


def test_attend_explains_class_of_given_name(
    run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    args = ("attend", photo, "--method", "relevance", "-m", model, "-o", tmp_path / "p.png")
    status, out, _ = run_cli(*args, "--class", "Thing 3")
    assert status == 0
    assert out.startswith(f"{tmp_path / 'p.png'}: relevance of thing 3 (0.")
    assert out.endswith("4x4 patches\n")
    status, out, err = run_cli(*args, "--class", "thin 3")
    assert (status, out) == (1, "")
    assert err.startswith("vitlib: error: no label 'thin 3' among 5: did you mean 'thing 3'")


def test_attend_draws_single_head_over_photo(
    run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.png"
    args = ("attend", photo, "--method", "heads", "-m", model, "-o", out)
    assert run_cli(*args, "--layer", -1, "--head", 2)[0] == 0
    assert max(image_size(out)) >= 600
    status, _, err = run_cli(*args, "--layer", 7)
    assert (status, err) == (1, (
        "vitlib: error: layers=[7]: expected numbers of blocks, 0 to 2, or from the end, -1 to -3\n"
    ))  # fmt: skip
    status, _, err = run_cli(*args, "--head", 9)
    assert (status, err) == (
        1,
        "vitlib: error: --head [9]: expected numbers of heads, 0 to 3, or from the end, -1 to -4\n",
    )


@pytest.mark.parametrize("size", ["keep", "64", "32x64"])
def test_attend_accepts_image_sizes(
    size: str, run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    status, stdout, _ = run_cli(
        "attend", photo, "-m", model, "-o", tmp_path / "p.png", "--image-size", size, "--json"
    )
    assert status == 0
    width, height = image_size(photo)
    short = round(36 / 8)  # patches on the shorter side, before the crop to 32 pixels
    ratio = max(width, height) / min(width, height)
    expected = [4, round(4 * ratio)] if width >= height else [round(4 * ratio), 4]
    assert json.loads(stdout)["grid"] == {"keep": expected, "64": [8, 8], "32x64": [4, 8]}[size]
    assert short >= 4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--method", "rollout", "--class", "x"), "--class is for relevance, gradient, occlusion"),
        (("--method", "gradient", "--layer", "1"), "--layer is for heads"),
        (("--method", "pca", "--layer", "1", "--layer", "2"), "several --layer are for heads"),
        (("--method", "pca", "--head", "1"), "--head is for heads"),
        (("--patch", "1,2"), "--patch is for similarity"),
        (("--method", "similarity", "--patch", "1"), "expected two whole numbers, such as 3,7"),
        (("--image-size", "7"), "expected at least one patch, 8x8"),
        (("--image-size", "big"), "expected N, HxW or keep"),
    ],
)
def test_attend_rejects_options_of_other_methods(
    options: tuple[str, ...], match: str, run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    status, _, err = run_cli("attend", photo, "-m", model, "-o", tmp_path / "p.png", *options)
    assert status == 2
    assert match in " ".join(err.split())
    assert not (tmp_path / "p.png").exists()


def test_attend_on_model_without_class_token(run_cli: Run, photo: Path, tmp_path: Path) -> None:
    folder = save_model("ijepa base", tmp_path / "model")
    args = ("attend", photo, "-m", folder, "-o", tmp_path / "p.png")
    assert run_cli(*args)[0] == 0
    assert run_cli(*args, "--method", "heads")[0] == 0
    for method, match in (("mask", "no class token"), ("relevance", "no head")):
        status, _, err = run_cli(*args, "--method", method)
        assert status == 1
        assert match in err
        assert len(err.splitlines()) == 1


def test_attend_rejects_optimized_model(
    run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    Predictor.load(model).fast().save(tmp_path / "fast")  # type: ignore[union-attr]
    status, _, err = run_cli("attend", photo, "-m", tmp_path / "fast", "-o", tmp_path / "p.png")
    assert status == 1
    assert "is an optimized model or an exported file, which has no attention" in err


def test_similar_lists_nearest_photos(
    run_cli: Run, model: Path, photos: Path, tmp_path: Path
) -> None:
    args = ("similar", photos / "b.png", photos, "-m", model, "--top-k", 2)
    status, out, err = run_cli(*args, "--plot", tmp_path / "p.png")
    assert (status, err) == (0, "")
    first, second = out.splitlines()
    assert first == f"1.000  {photos / 'b.png'}"
    assert second.startswith(("0.", "-0."))
    assert image_size(tmp_path / "p.png")[0] == 600
    (photos / "bad.jpg").write_bytes(b"no")
    status, out, err = run_cli(*args, "--json")
    assert status == 1
    assert json.loads(out)[0]["image"] == str(photos / "b.png")
    assert "bad.jpg' is not an image" in err
    status, out, err = run_cli("similar", photos / "bad.jpg", photos, "-m", model)
    assert (status, out) == (1, "")


def test_classify_plots_single_photo_or_contact_sheet(
    run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.png"
    expected = run_cli("classify", photo, "-m", model)
    assert run_cli("classify", photo, "-m", model, "--plot", out) == expected
    assert image_size(out)[0] == 600
    out.unlink()
    status, _, _ = run_cli("classify", photo, "nope", photo, "-m", model, "--plot", out)
    assert status == 1
    assert image_size(out)[0] == 600
    out.unlink()
    assert run_cli("classify", "nope", "-m", model, "--plot", out)[0] == 1
    assert not out.exists()


def test_classify_sheet_has_names_labels_and_unreadable_photo(
    run_cli: Run, model: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr("vitlib.plots.save", lambda figure, _: drawn.append(figure))
    args = ("classify", photo, "nope.jpg", "-m", model, "-k", 3, "--plot", tmp_path / "p.png")
    status, stdout, _ = run_cli(*args, "--json")
    assert status == 1
    texts = read_texts(drawn[0])
    assert {photo.name, "nope.jpg", "unreadable"} <= set(texts)
    for prediction in json.loads(stdout)[0]["predictions"]:
        assert f"{prediction['score']:.2f}  {prediction['label']}" in texts
    run_cli("classify", photo, "-m", model, "--plot", tmp_path / "p.png")
    assert photo.name in read_texts(drawn[1])


def test_similar_sheet_has_tiles_of_unreadable_photos(
    run_cli: Run, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr("vitlib.plots.save", lambda figure, _: drawn.append(figure))
    for index in range(9):
        (photos / f"bad{index}.jpg").write_bytes(b"no")
    args = ("similar", photos / "b.png", photos, "-m", model, "--top-k", 2)
    assert run_cli(*args, "--plot", tmp_path / "p.png")[0] == 1
    texts = read_texts(drawn[0])
    assert texts.count("unreadable") == 7
    assert texts.count("b.png") == 2
    assert {"query", "cosine 1.000", "bad0.jpg", "and 2 more unreadable"} <= set(texts)


def test_embed_writes_vectors_of_folder(
    run_cli: Run, model: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.npy"
    status, stdout, err = run_cli("embed", photos, "-m", model, "-o", out, "--json")
    assert (status, err) == (0, "")
    result = json.loads(stdout)
    assert result["shape"] == [3, 48]
    assert result["images"] == [str(photos / n) for n in ("a.png", "b.png", "below/c.png")]
    assert np.load(out).shape == (3, 48)
    (tmp_path / "empty").mkdir()
    status, _, err = run_cli("embed", tmp_path / "empty", "-m", model, "-o", out)
    assert status == 2
    assert "no photo in it" in " ".join(err.split())


def test_unwritable_picture_is_reported_before_model_loads(
    run_cli: Run, photos: Path, tmp_path: Path
) -> None:
    """The model is missing too, so an error that names the picture comes first."""
    (tmp_path / "a.txt").touch()
    for command in (("attend", "a.png", "-o"), ("classify", "a.png", "--plot"),
                 ("similar", "a.png", photos, "--plot")):  # fmt: skip
        for name, match in (
            ("a.txt", "expected a name that ends in .png"),
            ("a.txt/x.png", "cannot be written: Not a directory"),
        ):
            status, out, err = run_cli(*command, tmp_path / name, "-m", tmp_path / "nothing")
            assert (status, out) == (1, "")
            assert match in err
            assert len(err.splitlines()) == 1


def test_out_of_memory_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vitlib import cli

    def fail(**_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    monkeypatch.setattr(cli.vitlib_command, "main", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("vitlib: error: out of memory (DefaultCPUAllocator")
    assert len(message.splitlines()) == 1
