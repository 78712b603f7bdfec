"""convert: what was written is what was read, and what is not is told before it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

import vitlib
from fixtures import references
from paths import FIXTURES
from vitlib import ImageProcessor
from vitlib.checks import convert
from vitlib.errors import CheckpointError, ConfigError, SourceError

TINY = 2e-6


def logits(source: Path, **how: object) -> Tensor:
    model = vitlib.load(source, **how)
    torch.manual_seed(5)
    with torch.inference_mode():
        return model(torch.randn(2, model.config.in_channels, *model.config.image_size))


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A tiny classifier with labels and preprocessing, saved by transformers."""
    references.saved("vit", tmp_path / "vit")
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_there_and_back(vit: Path, tmp_path: Path) -> None:
    there = convert(vit, tmp_path / "timm", layout="timm")
    assert (there.source_layout, there.layout) == ("hf", "timm")
    assert there.files == ("config.json", "model.safetensors")
    assert there.drift < 1e-5
    back = convert(tmp_path / "timm", tmp_path / "hf", layout="hf")
    assert back.drift < TINY
    assert references.distance(logits(tmp_path / "hf"), logits(vit)) < 1e-5
    # The tensors are the same bits; labels went along in timm's form.
    theirs, ours = (
        load_file(vit / "model.safetensors"),
        load_file(tmp_path / "hf/model.safetensors"),
    )
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs | ours)
    config = json.loads((tmp_path / "timm/config.json").read_text())
    assert config["label_names"] == [f"thing {i}" for i in range(5)]
    assert vitlib.load(tmp_path / "hf").config.labels == vitlib.load(vit).config.labels
    assert ImageProcessor.load(tmp_path / "timm") is not None


def test_transformers_opens_it(tmp_path: Path) -> None:
    done = convert(FIXTURES / "timm" / "vit", tmp_path / "hf", layout="hf")
    assert done.drift < TINY
    opened = hf.ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    expected = references.ask(opened, images := torch.randn(2, 3, 16, 16)).logits
    with torch.inference_mode():
        assert references.distance(vitlib.load(FIXTURES / "timm/vit")(images), expected) < TINY


def test_each_number_that_is_lost_is_told_with_what_it_does(vit: Path, tmp_path: Path) -> None:
    done = convert(vit, tmp_path / "out", layout="torchvision")
    changes = {change.field: change for change in done.changes}
    assert set(changes) == {"norm_eps", "position_resize", "labels"}
    assert (changes["norm_eps"].source_value, changes["norm_eps"].target_value) == (1e-12, 1e-6)
    assert 0 < changes["norm_eps"].difference < 1e-5
    assert changes["position_resize"].difference == 0
    # It is the whole of the difference off the grid, which is not counted as drift.
    assert changes["position_resize"].off_grid == pytest.approx(done.off_grid_drift, rel=0.05)
    assert done.off_grid_drift > 1e-3 > 1e-5 > done.drift
    assert changes["labels"].difference == 0
    assert any("no place for it" in line for line in done.preprocessing)
    json.dumps(done.as_dict(), allow_nan=False)


def test_another_function_is_refused_and_named(tmp_path: Path) -> None:
    references.saved("vit tanh gelu", tmp_path / "vit")
    target = tmp_path / "out"
    told = r"activation gelu_tanh becomes gelu \(\d.*--allow-drift"
    with pytest.raises(CheckpointError, match=told):
        convert(tmp_path / "vit", target, layout="torchvision")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit"]
    done = convert(tmp_path / "vit", target, layout="torchvision", allow_drift=True)
    assert done.drift > 5e-5
    by_field = {change.field: change.difference for change in done.changes}
    assert by_field["activation"] == pytest.approx(done.drift, rel=0.05)
    assert (target / "model.pth").is_file()


def test_a_refusal_leaves_the_target_as_it_was(vit: Path, tmp_path: Path) -> None:
    convert(vit, tmp_path / "out", layout="torchvision")
    before = listing(tmp_path / "out")
    references.saved("vit tanh gelu", tmp_path / "tanh")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "tanh", tmp_path / "out", layout="torchvision")
    assert listing(tmp_path / "out") == before


def test_jax_to_transformers_keeps_its_gelu(tmp_path: Path) -> None:
    done = convert(FIXTURES / "jax" / "vit.npz", tmp_path / "hf", layout="hf")
    assert done.drift < TINY
    assert (
        json.loads((tmp_path / "hf/config.json").read_text())["hidden_act"] == "gelu_pytorch_tanh"
    )
    assert {change.field for change in done.changes} == {"position_resize"}


def test_under_another_profile(tmp_path: Path) -> None:
    """A file run as another library does keeps those numbers, where the target can say them."""
    done = convert(FIXTURES / "timm" / "vit", tmp_path / "hf", layout="hf", profile="hf")
    assert done.source_profile == "hf"
    assert done.changes == ()
    assert vitlib.load(tmp_path / "hf").config.norm_eps == 1e-12


def test_heads_that_no_file_says(tmp_path: Path) -> None:
    references.saved("vit", tmp_path / "vit")
    convert(tmp_path / "vit", tmp_path / "tv", layout="torchvision")
    assert vitlib.load(tmp_path / "tv").config.num_heads == 4  # from vitlib.json; 1 were assumed
    (tmp_path / "tv/vitlib.json").unlink()
    assert vitlib.load(tmp_path / "tv").config.num_heads == 1
    done = convert(tmp_path / "tv", tmp_path / "hf", layout="hf", num_heads=4)
    assert done.drift < TINY
    assert references.distance(logits(tmp_path / "hf"), logits(tmp_path / "vit")) < 1e-5


def test_what_is_not_written_is_named(tmp_path: Path) -> None:
    references.saved("vit base", tmp_path / "vit")
    done = convert(tmp_path / "vit", tmp_path / "timm", layout="timm")
    assert done.not_written == ("pooler.dense.bias", "pooler.dense.weight")
    references.saved("clip both towers", tmp_path / "clip")
    done = convert(tmp_path / "clip", tmp_path / "tower", layout="openclip")
    assert any(name.startswith("text_model.") for name in done.not_written)
    assert done.drift < TINY


def test_bfloat16_is_compared_in_float32(tmp_path: Path) -> None:
    model = references.build("vit").bfloat16()
    model.save_pretrained(tmp_path / "vit")
    done = convert(tmp_path / "vit", tmp_path / "timm", layout="timm")
    assert 0 < done.drift < 1e-5  # bfloat16 has steps of 4e-3
    assert {t.dtype for t in load_file(tmp_path / "timm/model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("layout", ["hf", "timm", "meta", "torchvision", "openclip", "jax"])
def test_what_vitlib_writes_it_reads_back_as_that(layout: str, tmp_path: Path) -> None:
    name = "clip projection" if layout == "openclip" else "msn"
    references.saved(name, tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "out", layout=layout, allow_drift=True)
    assert done.reads_as == layout
    assert sorted(listing(tmp_path / "out")) == list(done.files)
    assert (done.drift < TINY) == (layout != "jax")  # which has no erf GELU


# --- where it is written --------------------------------------------------------------------------


def test_the_source_is_never_the_target(vit: Path, tmp_path: Path) -> None:
    before = listing(vit)
    (tmp_path / "link").symlink_to(vit)
    for source in (vit, vit / "model.safetensors", tmp_path / "link"):
        with pytest.raises(SourceError, match="is what is read"):
            convert(source, vit, layout="timm")
    assert listing(vit) == before


def test_other_weights_in_the_target_are_left_alone(vit: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"another")
    with pytest.raises(SourceError, match=r"holds model\.safetensors of another checkpoint"):
        convert(vit, target, layout="torchvision")
    assert listing(target) == {"model.safetensors": b"another"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match="is a file: expected a folder"):
        convert(vit, tmp_path / "file", layout="timm")


def test_converting_again_replaces_all_of_the_old(vit: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    references.saved("dinov2", target)
    (target / "preprocessor_config.json").write_text('{"image_processor_type": "X"}')
    (target / "vitlib.json").write_text('{"num_heads": 1}')
    (target / "README.md").write_text("mine")
    done = convert(vit, target, layout="timm")
    assert sorted(listing(target)) == ["README.md", *done.files]
    assert references.distance(logits(target), logits(vit)) < 1e-5


def test_a_kill_leaves_no_folder_that_opens(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between any two renames, the folder holds no weights, or all that belongs to them."""
    old = tmp_path / "old"
    references.saved("vit tanh gelu", old)
    renames = 0
    while True:
        target = tmp_path / f"out{renames}"
        convert(old, target, layout="hf")
        left = [renames]
        rename = Path.rename

        def stop(self: Path, to: Path, left: list[int] = left, real: object = rename) -> object:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(self, to)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", stop)
            try:
                convert(vit, target, layout="timm")
            except KeyboardInterrupt:
                with pytest.raises(SourceError, match="no weights"):
                    vitlib.load(target)
            else:
                break
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        renames += 1
    assert renames == 2


def test_what_cannot_be_asked(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout='tf': expected one of hf, timm"):
        convert(vit, tmp_path / "out", layout="tf")
    references.saved("dinov3", tmp_path / "dinov3")
    with pytest.raises(ConfigError, match=r"rope_theta=100\.0"):
        convert(tmp_path / "dinov3", tmp_path / "out", layout="torchvision")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
