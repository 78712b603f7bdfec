"""Names of classes: one Unicode form, tables of synsets, numbers, and what is hidden."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import unicodedata
from pathlib import Path

import pytest

import vitlib
from fixtures.synthetic_photos import SAMPLES
from vitlib import explain
from vitlib.data import LabelledPhotos, Photo, read_photos
from vitlib.data.class_map import ClassMap
from vitlib.errors import ConfigError, DataError
from vitlib.evaluate import evaluate
from vitlib.train import TrainConfig, finetune

NFC = "caf\u00e9"
NFD = unicodedata.normalize("NFD", NFC)


def folders(root: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        shutil.copy(SAMPLES[index], root / name / f"{index}.png")
    return root


@pytest.fixture
def imagenet(shared_configs: Path) -> tuple[str, ...]:
    table = json.loads((shared_configs / "imagenet1k_id2label.json").read_text("utf-8"))
    return tuple(table[str(index)] for index in range(1000))


def test_two_folders_that_differ_by_form_alone_are_one_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = read_photos(folders(tmp_path, NFC, NFD, "tea"))
    if len(list(tmp_path.iterdir())) == 3:  # on a disk that tells them apart
        assert "written in two Unicode forms, read as one class" in caplog.text
    assert photos.labels == (NFC, "tea")
    assert photos.counts()[NFC] == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", f"filename,label\n0.png,{NFC}\n1.png,{NFD}\n2.png,tea\n"),
        ("a.jsonl", "".join(
            json.dumps({"image": f"{i}.png", "label": label}) + "\n"
            for i, label in enumerate((NFC, NFD, "tea"))
        )),
    ],
)  # fmt: skip
def test_labels_of_a_file_are_read_in_one_form(name: str, text: str, tmp_path: Path) -> None:
    for index in range(3):
        shutil.copy(SAMPLES[index], tmp_path / f"{index}.png")
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_photos(tmp_path / name).counts() == {NFC: 2, "tea": 1}


def test_columns_of_one_class_in_two_forms_are_refused(tmp_path: Path) -> None:
    shutil.copy(SAMPLES[0], tmp_path / "0.png")
    (tmp_path / "a.csv").write_text(f"filename,{NFC},{NFD}\n0.png,1,0\n", encoding="utf-8")
    with pytest.raises(DataError, match="a class is declared in two Unicode forms: keep one"):
        read_photos(tmp_path / "a.csv", multi_label=True)


@pytest.mark.parametrize(("mine", "model"), [(NFC, NFD), (NFD, NFC)])
def test_photos_meet_a_model_in_either_form(
    mine: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = read_photos(folders(tmp_path, mine, "tea"), labels=(model, "tea", "milk"))
    assert photos.labels == (model, "tea", "milk")
    assert photos.targets().tolist() == [0, 1]
    assert ("only in Unicode form" in caplog.text) == (model == NFD)
    assert explain.class_named((model, "tea"), mine.upper()) == 0


def test_synsets_are_mapped_by_a_table(
    tmp_path: Path, imagenet: tuple[str, ...], shared_configs: Path
) -> None:
    words = shared_configs / "synset_words_imagenet1k.txt"
    synsets = [line.split()[0] for line in words.read_text("utf-8").splitlines()]
    cranes = [index for index, label in enumerate(imagenet) if label == "crane"]
    assert cranes == [134, 517]
    chosen = [281, *cranes]
    root = folders(tmp_path / "photos", *(synsets[index] for index in chosen))
    tables = {
        "ids.json": json.dumps({synset: index for index, synset in enumerate(synsets)}),
        "text.json": json.dumps({synset: str(index) for index, synset in enumerate(synsets)}),
        "index.json": json.dumps(
            {str(i): [synset, imagenet[i].split(",")[0]] for i, synset in enumerate(synsets)}
        ),
        "ids.csv": "synset,class\n" + "".join(f"{s},{i}\n" for i, s in enumerate(synsets)),
        "tabs.txt": words.read_text("utf-8").replace(" ", "\t", 1),
        "words.txt": words.read_text("utf-8"),  # in the model's order, so "crane" is known
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        photos = read_photos(root, labels=imagenet, class_map=tmp_path / name)
        assert sorted(photos.targets().tolist()) == sorted(chosen), name
        assert photos.labels[134] == "crane (class 134)"
        assert photos.labels[281] == imagenet[281]
    # Names alone do not say which crane.
    lines = words.read_text("utf-8").splitlines()
    (tmp_path / "part.txt").write_text("\n".join(lines[i] for i in chosen), encoding="utf-8")
    with pytest.raises(DataError, match="the name of classes 134 and 517: give the number of"):
        read_photos(root, labels=imagenet, class_map=tmp_path / "part.txt")
    by_number = {synsets[281]: 281, synsets[134]: "134", synsets[517]: 517}  # the remedy
    (tmp_path / "part.json").write_text(json.dumps(by_number))
    photos = read_photos(root, labels=imagenet, class_map=tmp_path / "part.json")
    assert sorted(photos.targets().tolist()) == sorted(chosen)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '{"n1": "cat", "n1": "dog"}', "'n1' has two classes, 'cat' and 'dog'"),
        ("a.json", '{"n1": true}', "'n1' is True: expected a name or a number"),
        ("a.json", '["n1"]', "is not a JSON object"),
        ("a.json", "{}", "is empty"),
        (
            "a.json",
            '{"n1": 9}',
            "not one of the model's 2 classes: give the number of the class, 0",
        ),
        ("a.json", '{"n1": "cow"}', "'cow', not one of the model's 2 classes"),
        ("a.json", '{"n2": "cat"}', r"the labels 'n1' \(photos: 1\) are not in .*a.json: add them"),
        ("a.csv", "n1,cat,0\n", "line 1 has 3 columns: expected two"),
        ("a.txt", "n1\n", "line 1 has one word"),
        ("a.tsv", "n1\tcat\n", "ends in .tsv: expected a .json such as"),
        ("none.json", None, "cannot be read"),
    ],
)
def test_a_table_that_is_none_is_refused(
    name: str, text: str | None, expected: str, tmp_path: Path
) -> None:
    photos = LabelledPhotos((Photo(tmp_path / "0.png", ("n1",)),), ("n1",), False, "photos")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=expected):
        ClassMap.read(tmp_path / name).apply(photos, ("cat", "dog"))


def test_numbers_are_ids_only_where_nothing_else_is_meant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folders(tmp_path / "a", "0", "2")
    assert read_photos(root, labels=("cat", "dog", "cow")).targets().tolist() == [0, 2]
    assert "read as numbers of the classes: 0 is 'cat'" in caplog.text
    assert read_photos(root, labels=("2", "1", "0")).targets().tolist() == [2, 0]  # names
    for names in (("1", "3"), ("0", "02"), ("0", "cat")):
        other = folders(tmp_path / "-".join(names), *names)
        with pytest.raises(DataError, match=r"map them \(class_map=, --class-map\)"):
            read_photos(other, labels=("cat", "dog", "cow"))
    with pytest.raises(DataError, match="not among"):  # a training set's numbers mean nothing
        read_photos(root).with_labels(("cat", "dog", "cow"))


def test_hidden_files_are_no_photos_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folders(tmp_path, "bag", "coat", "__MACOSX", ".ipynb_checkpoints")
    for name in (".DS_Store", "bag/.DS_Store", "bag/._0.png", "bag/Thumbs.db", "coat/desktop.ini"):
        (root / name).write_bytes(b"no image")
    with caplog.at_level(logging.INFO, logger="vitlib"):
        photos = read_photos(root)
    assert (photos.labels, len(photos)) == (("bag", "coat"), 2)
    assert "7 hidden files and folders are not read" in caplog.text


def test_evaluate_and_finetune_take_a_table(tmp_path: Path, run_cli: object) -> None:
    root = folders(tmp_path / "photos", "n1", "n2")
    (tmp_path / "map.json").write_text('{"n1": "bag", "n2": "coat"}')
    status, out, err = run_cli(  # type: ignore[operator]
        "evaluate", "demo", root, "--out", tmp_path / "report", "--class-map",
        tmp_path / "map.json", "--bootstrap", 0, "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["metrics"]["accuracy"] is not None
    config = TrainConfig.from_dict({"num_train_epochs": 1, "validation_split": 0})
    done = finetune(
        root, None, tmp_path / "out", from_scratch="8x1x2/4", class_map=tmp_path / "map.json",
        config=config.with_changes({"image_size": 8}),
    )  # fmt: skip
    assert done.labels == ("bag", "coat")
    (tmp_path / "ids.json").write_text('{"n1": 0, "n2": 1}')
    with pytest.raises(DataError, match="a number, and no model gives the classes: write names"):
        finetune(
            root, None, tmp_path / "new", from_scratch="8x1x2/4", class_map=tmp_path / "ids.json"
        )


def test_positive_and_labels_of_a_report_in_either_form(tmp_path: Path) -> None:
    predictor = vitlib.Predictor.load("demo")
    labels = (NFD, *predictor.labels[1:])
    predictor.model.config = dataclasses.replace(predictor.model.config, labels=labels)
    photos = read_photos(folders(tmp_path / "photos", NFC, labels[1]))
    report = evaluate(predictor, photos, tmp_path / "report", positive=NFC, bootstrap=0)
    assert "f1_score_binary" in report.metrics
    with pytest.raises(ConfigError, match="expected the name of one class"):
        evaluate(predictor, photos, tmp_path / "report", positive="tea", bootstrap=0)


def test_hidden_images_of_a_folder_are_not_embedded(tmp_path: Path, run_cli: object) -> None:
    root = folders(tmp_path / "photos", "bag", ".ipynb_checkpoints")
    (root / "bag/._0.png").write_bytes(b"no image")
    status, out, err = run_cli(  # type: ignore[operator]
        "embed", root, "--model", "demo", "--out", tmp_path / "v.npy", "--json"
    )
    assert (status, json.loads(out)["images"]) == (0, [str(root / "bag/0.png")])
    assert "2 hidden images or folders are not read" in err
