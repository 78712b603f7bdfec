"""Remedies in messages: each case makes a mistake, reads the remedy, and follows it.

`remedies.txt` lists every message of vitlib that names a remedy: a new one needs a case here or in
the test of its module, and then its line, which `python tests/test_remedies.py` writes.
"""

# ruff: noqa: ARG005  (each step has the folder, used or not)
from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vitlib
from fixtures.synthetic_photos import SAMPLES
from vitlib import explain
from vitlib.data import LabelledPhotos, Photo, read_photos, read_split
from vitlib.errors import VitlibError
from vitlib.train import TrainConfig, finetune

RULE = vitlib.ImageProcessor(size=(8, 8))
PHOTO = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
LISTED = Path(__file__).parent / "remedies.txt"
ROOT = Path(vitlib.__file__).parent
Step = Callable[[Path], Any]


def tiny(**fields: Any) -> vitlib.ViT:
    """A model of two blocks."""
    sizes = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    model = vitlib.ViT(vitlib.ViTConfig(**{**sizes, "num_classes": 3, **fields})).eval()
    model.image_processor = RULE
    return model


def fast(folder: Path) -> Path:
    """An optimized model in a folder, without its preprocessing."""
    model = tiny()
    model.image_processor = None
    vitlib.optimize(model).save(folder / "fast")
    return folder / "fast"


def save_tiny(folder: Path, **fields: Any) -> Path:
    vitlib.save(tiny(**fields), folder / "model")
    return folder / "model"


def two_files(folder: Path) -> Path:
    """A folder of two weights files, of which none has the usual name."""
    save_tiny(folder)
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(folder / "model/model.safetensors", folder / "model" / name)
    (folder / "model/model.safetensors").unlink()
    return folder / "model"


def photos(folder: Path, *classes: str) -> Path:
    for index, name in enumerate(classes or ("bag", "coat")):
        (folder / "photos" / name).mkdir(parents=True)
        shutil.copy(SAMPLES[index], folder / "photos" / name / f"{index}.png")
    return folder / "photos"


def several(folder: Path) -> Path:
    """Photos of several labels each."""
    rows = [{"image": str(SAMPLES[i]), "label": ["bag", "coat"]} for i in range(2)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "a.jsonl"


def own_parts() -> vitlib.ViT:
    model = tiny()
    model.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
    return model


def five_channels() -> vitlib.ViT:
    return tiny(in_channels=5)


def tune_tiny(folder: Path, **options: Any) -> Any:
    chosen = {"num_train_epochs": 1, "validation_split": 0, **options.pop("config", {})}
    return finetune(
        photos(folder) if not (folder / "photos").exists() else folder / "photos",
        options.pop("model", tiny(num_classes=2)), folder / options.pop("out", "run"),
        config=TrainConfig.from_dict(chosen), **options,
    )  # fmt: skip


def held_out(folder: Path) -> Path:
    for part in ("train", "val"):
        photos(folder / part)
        (folder / part / "photos").rename(folder / part / "x")
        for item in (folder / part / "x").iterdir():
            item.rename(folder / part / item.name)
        (folder / part / "x").rmdir()
    return folder


def crane() -> tuple[str, ...]:
    return ("crane", "dog", "crane")


def doubly(folder: Path) -> LabelledPhotos:
    return LabelledPhotos((Photo(SAMPLES[0], ("crane",)),), ("crane",), False, str(folder))


# The remedy as the message has it; the mistake; what the remedy says.
LEARNED: dict[str, Any] = {"rope": {"coords": "index", "learned": True}}
SAPIENS: dict[str, Any] = {"family": "sapiens2", "norms": {"kind": "rms", "qk": "head"}}
SAPIENS |= {"rope": True, "pos_embed": False, "activation": "swiglu", "layer_scale": 0.5}
SAPIENS |= {"num_registers": 8, "num_classes": 0}


def shorten(model: vitlib.ViT) -> vitlib.ViT:
    """Drop the last block of a model."""
    del model.blocks[-1]
    return model


def keep_frequencies(model: vitlib.ViT) -> vitlib.ViT:
    """Give a shortened model the frequencies of its blocks."""
    position = shorten(model).attn_position
    position.freqs = nn.Parameter(position.freqs[:, :-1])
    return model


CASES: list[tuple[str, Step, Step]] = [
    ("expected coords='index'", lambda t: tiny(rope={"offset": 1.0}),
     lambda t: tiny(rope={"offset": 1.0, "coords": "index"})),
    ("give model.attn_position.freqs the frequencies of these blocks",
     lambda t: shorten(tiny(**LEARNED))(torch.zeros(1, 3, 8, 8)),
     lambda t: keep_frequencies(tiny(**LEARNED))(torch.zeros(1, 3, 8, 8))),
    ("none of its published architectures has these; choose another layout",
     lambda t: vitlib.save(tiny(norms={"qk": "width"}), t / "out", layout="timm"),
     lambda t: vitlib.save(tiny(norms={"qk": "width"}), t / "out", layout="vitlib")),
    ("has no LayerScale on its MLPs; save the model in another layout",
     lambda t: vitlib.save(tiny(**SAPIENS), t / "out", layout="timm"),
     lambda t: vitlib.save(tiny(**SAPIENS), t / "out", layout="vitlib")),
    ("leave it out, or give config=",
     lambda t: vitlib.load(save_tiny(t), num_heads=4), lambda t: vitlib.load(t / "model")),
    ("leave it out, or give config=ViTConfig",
     lambda t: vitlib.load(save_tiny(t), num_heads=4),
     lambda t: vitlib.load(t / "model", config=dataclasses.replace(tiny().config, num_heads=4))),
    ("config= says 2: give one of both",
     lambda t: vitlib.load(save_tiny(t), num_heads=4, config=tiny().config),
     lambda t: vitlib.load(t / "model", config=tiny().config)),
    ("name the one to load, such as",
     lambda t: vitlib.load(two_files(t)), lambda t: vitlib.load(t / "model/a.safetensors")),
    ("open it with vitlib.fast.load or vitlib.Predictor.load",
     lambda t: vitlib.load(fast(t)), lambda t: vitlib.fast.load(t / "fast")),
    ("has no preprocessing: give image_processor=",
     lambda t: vitlib.Predictor.load(fast(t)),
     lambda t: vitlib.Predictor.load(t / "fast", image_processor=RULE)),
    ("holds no fast.safetensors", lambda t: vitlib.fast.load(save_tiny(t)),
     lambda t: vitlib.optimize(vitlib.load(t / "model"))),
    ("give an empty folder",
     lambda t: (save_tiny(t), vitlib.save(tiny(), t / "model", layout="meta")),
     lambda t: vitlib.save(tiny(), t / "new", layout="meta")),
    ("save it with layout='timm'",
     lambda t: vitlib.save(tiny(num_classes=0), t / "out", layout="openclip"),
     lambda t: vitlib.save(tiny(num_classes=0), t / "out", layout="timm")),
    ("torch.save(model.state_dict(), ...)",
     lambda t: vitlib.save(own_parts(), t / "out"),
     lambda t: torch.save(own_parts().state_dict(), t / "x.pth")),
    ("torch.save(model.state_dict(), ...)",
     lambda t: vitlib.optimize(own_parts()).save(t / "out"),
     lambda t: torch.save(own_parts().state_dict(), t / "x.pth")),
    ("use Predictor.load(..., in_channels=)",
     lambda t: vitlib.Predictor(five_channels(), RULE),
     lambda t: vitlib.Predictor.load(save_tiny(t), in_channels=5)),
    ("or give an ImageProcessor of as many",
     lambda t: vitlib.Predictor(five_channels(), RULE),
     lambda t: vitlib.Predictor(five_channels(), vitlib.ImageProcessor(in_channels=5,
                                                                       size=(8, 8)))),
    ("use embed(), or finetune trains one",
     lambda t: vitlib.Predictor(tiny(num_classes=0), RULE).classify(PHOTO),
     lambda t: (vitlib.Predictor(tiny(num_classes=0), RULE).embed(PHOTO),
                vitlib.Predictor.load(save_tiny(t, num_classes=0), num_classes=3).classify(PHOTO))),
    ("load the checkpoint it was made from",
     lambda t: vitlib.Predictor.load(fast(t), image_processor=RULE).attention(PHOTO),
     lambda t: vitlib.Predictor.load(save_tiny(t)).attention(PHOTO)),
    ("has no pooler: use embed()",
     lambda t: tiny().forward_pooler(RULE([PHOTO])), lambda t: tiny().embed(RULE([PHOTO]))),
    ("expected rows='all'",
     lambda t: tiny(class_token=False, pool="mean").attention(RULE([PHOTO]), rows="prefix"),
     lambda t: tiny(class_token=False, pool="mean").attention(RULE([PHOTO]), rows="all")),
    ("use at least 4x8",
     lambda t: tiny()(torch.zeros(1, 3, 3, 8)), lambda t: tiny()(torch.zeros(1, 3, 4, 8))),
    ("give patch_size",
     lambda t: RULE.with_image_size("keep"), lambda t: RULE.with_image_size("keep", (4, 4))),
    ("normalise them with an ImageProcessor",
     lambda t: tiny()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
     lambda t: tiny()(RULE([PHOTO]))),
    ("give the patch to compare with",
     lambda t: explain.similarity(tiny(class_token=False, pool="mean"), RULE([PHOTO])),
     lambda t: explain.similarity(tiny(class_token=False, pool="mean"), RULE([PHOTO]), (0, 1))),
    ("say which, 0, 2",
     lambda t: explain.class_named(crane(), "crane"), lambda t: explain.class_named(crane(), "2")),
    ("leave it out for fp32",
     lambda t: vitlib.optimize(tiny(), calibrate=[PHOTO]), lambda t: vitlib.optimize(tiny())),
    ("call eval()",
     lambda t: vitlib.optimize(own_parts().train()), lambda t: vitlib.optimize(own_parts().eval())),
    ("use the model it was made from, or detach()",
     lambda t: vitlib.optimize(tiny())(torch.zeros(1, 3, 8, 8, requires_grad=True)),
     lambda t: vitlib.optimize(tiny())(torch.zeros(1, 3, 8, 8, requires_grad=True).detach())),
    ("or set image_processor before optimize()",
     lambda t: vitlib.fast.load(fast(t)).forward_uint8(torch.zeros(1, 3, 8, 8).byte()),
     lambda t: vitlib.optimize(tiny()).forward_uint8(torch.zeros(1, 3, 8, 8).byte())),
    ("give some of yours with calibrate=",
     lambda t: vitlib.Predictor(tiny(), RULE, precision="auto").fast(),
     lambda t: vitlib.Predictor(tiny(), RULE, precision="auto", calibrate=[PHOTO] * 2).fast()),
    ("use multi_label=True",
     lambda t: read_photos(several(t)), lambda t: read_photos(several(t), multi_label=True)),
    ("or read both with read_split",
     lambda t: read_photos(held_out(t)), lambda t: read_split(t)),
    ("map them (class_map=, --class-map)",
     lambda t: read_photos(photos(t, "x1", "x2"), labels=("bag", "coat")),
     lambda t: ((t / "m.csv").write_text("x1,bag\nx2,1\n"),
                read_photos(t / "photos", labels=("bag", "coat"), class_map=t / "m.csv"))),
    ("choose by a table of numbers (class_map=",
     lambda t: doubly(t).with_labels(crane()),
     lambda t: ((t / "m.csv").write_text("crane,2\n"),
                read_photos(photos(t, "crane"), labels=crane(), class_map=t / "m.csv"))),
    ("this model came without preprocessing: give image_processor=",
     lambda t: tune_tiny(t, model=vitlib.ViT(tiny(num_classes=2).config)),
     lambda t: tune_tiny(t, model=vitlib.ViT(tiny(num_classes=2).config), image_processor=RULE)),
    ("go on with it (resume=True",
     lambda t: (tune_tiny(t), tune_tiny(t)), lambda t: tune_tiny(t, resume=True)),
    ("is not an empty folder: name another",
     lambda t: (photos(t / "busy"), tune_tiny(t, out="busy")), lambda t: tune_tiny(t, out="new")),
    ("or call model.reset_classifier(2)",
     lambda t: tune_tiny(t, model=own_parts()),
     lambda t: tune_tiny(t, model=(m := own_parts(), m.reset_classifier(2))[0])),
    ("put in a LayerNorm, or track_running_stats=False",
     lambda t: tune_tiny(t, model=with_normed_mean(track_running_stats=True)),
     lambda t: tune_tiny(t, model=with_normed_mean(track_running_stats=False))),
    ("name a folder outside of it",
     lambda t: (photos(t), tune_tiny(t, out="photos/run")), lambda t: tune_tiny(t)),
]  # fmt: skip


def with_normed_mean(track_running_stats: bool) -> vitlib.ViT:
    model = tiny()
    norm = nn.BatchNorm1d(8, track_running_stats=track_running_stats)
    model.head = nn.Sequential(norm, nn.Linear(8, 2))
    return model


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: CASES[i][0][:40])
def test_remedy_works(index: int, tmp_path: Path) -> None:
    remedy, mistake, followed = CASES[index]
    with pytest.raises(VitlibError, match=re.escape(remedy)):
        mistake(tmp_path)
    followed(tmp_path)


# --- every message with a remedy is listed --------------------------------------------------------

WORDS = re.compile(
    r"\b(give|pass|use|choose|run|load|open|save|write|call|set|put|name|leave|add|say|state|read) "
    r"|pip install|--[a-z]|`|\b[a-z_]+=(?!\{)"
)


def text_of(node: ast.expr) -> str:
    """A message's text, {} for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{}"
    return text_of(node.left) + text_of(node.right) if isinstance(node, ast.BinOp) else ""


def messages() -> set[str]:
    """Return "file: text" of every error that names a remedy after its colon."""
    result = set()
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                text = " ".join(text_of(argument) for argument in node.exc.args)
                if WORDS.search(text.rpartition(": ")[2]):
                    result.add(f"{path.relative_to(ROOT).as_posix()}: {' '.join(text.split())}")
    return result


def test_every_message_with_a_remedy_is_listed() -> None:
    listed = set(LISTED.read_text(encoding="utf-8").splitlines())
    new = sorted(messages() - listed)
    assert not new, (
        f"{len(new)} messages name a remedy that no test has followed: add a case to CASES or to "
        f"the test of the module, then run python tests/test_remedies.py\n" + "\n".join(new)
    )


if __name__ == "__main__":
    LISTED.write_text("\n".join(sorted(messages())) + "\n", encoding="utf-8")
