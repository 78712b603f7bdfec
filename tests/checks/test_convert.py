"""Tests of vitlib.checks.convert: equal logits, listed losses, and atomic writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitlib
from fixtures import references
from paths import FIXTURES
from vitlib import ImageProcessor
from vitlib.checks import convert
from vitlib.checks.preprocessing import compare_preprocessing
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
    references.save_model("vit", tmp_path / "vit")
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_convert_to_timm_and_back_keeps_tensors_and_labels(vit: Path, tmp_path: Path) -> None:
    to_timm = convert(vit, tmp_path / "timm", layout="timm")
    assert (to_timm.source_layout, to_timm.layout) == ("hf", "timm")
    assert to_timm.files == ("config.json", "model.safetensors")
    assert to_timm.drift < 1e-5
    back = convert(tmp_path / "timm", tmp_path / "hf", layout="hf")
    assert back.drift < TINY
    assert references.distance(logits(tmp_path / "hf"), logits(vit)) < 1e-5
    # The tensors are equal bit for bit, and timm's config.json holds the labels.
    expected = load_file(vit / "model.safetensors")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    assert all(torch.equal(expected[name], tensors[name]) for name in expected | tensors)
    config = json.loads((tmp_path / "timm/config.json").read_text())
    assert config["label_names"] == [f"thing {i}" for i in range(5)]
    assert vitlib.load(tmp_path / "hf").config.labels == vitlib.load(vit).config.labels
    assert ImageProcessor.load(tmp_path / "timm") is not None


def test_transformers_opens_converted_folder(tmp_path: Path) -> None:
    done = convert(FIXTURES / "timm" / "vit", tmp_path / "hf", layout="hf")
    assert done.drift < TINY
    opened = hf.ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    expected = references.run_reference(opened, images := torch.randn(2, 3, 16, 16)).logits
    with torch.inference_mode():
        assert references.distance(vitlib.load(FIXTURES / "timm/vit")(images), expected) < TINY


def test_convert_reports_effect_of_each_lost_field(vit: Path, tmp_path: Path) -> None:
    done = convert(vit, tmp_path / "out", layout="torchvision")
    changes = {change.field: change for change in done.changes}
    assert set(changes) == {"norm_eps", "position_resize", "labels"}
    assert (changes["norm_eps"].source_value, changes["norm_eps"].target_value) == (1e-12, 1e-6)
    assert 0 < changes["norm_eps"].difference < 1e-5
    assert changes["position_resize"].difference == 0
    # This field makes the whole difference off the grid, which does not count as drift.
    assert changes["position_resize"].off_grid == pytest.approx(done.off_grid_drift, rel=0.05)
    assert done.off_grid_drift > 1e-3 > 1e-5 > done.drift
    assert changes["labels"].difference == 0
    assert any("no place for it" in line for line in done.preprocessing)
    json.dumps(done.as_dict(), allow_nan=False)


def test_convert_refuses_changed_activation_without_allow_drift(tmp_path: Path) -> None:
    references.save_model("vit tanh gelu", tmp_path / "vit")
    target = tmp_path / "out"
    message = r"activation gelu_tanh becomes gelu \(\d.*--allow-drift"
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "vit", target, layout="torchvision")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit"]
    done = convert(tmp_path / "vit", target, layout="torchvision", allow_drift=True)
    assert done.drift > 5e-5
    by_field = {change.field: change.difference for change in done.changes}
    assert by_field["activation"] == pytest.approx(done.drift, rel=0.05)
    assert (target / "model.pth").is_file()


def shrink_embeddings(folder: Path, factor: float) -> None:
    """Make the variance of the tokens small, so that the eps of the norms counts."""
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if "embeddings" in name or "output.dense" in name:
            tensor.mul_(factor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_convert_writes_drift_of_norm_eps_alone(vit: Path, tmp_path: Path) -> None:
    shrink_embeddings(vit, 0.2)
    done = convert(vit, tmp_path / "timm", layout="timm")
    assert 1e-5 < done.drift <= 1e-4
    assert done.drift_without_norm_eps < TINY
    (change,) = (change for change in done.changes if change.difference)
    assert (change.field, change.target_value) == ("norm_eps", 1e-6)
    assert change.difference == pytest.approx(done.drift, rel=0.05)


@pytest.mark.parametrize(("factor", "edit"), [(0.02, {}), (0.3, {"hidden_act": "gelu_new"})])
def test_convert_refuses_larger_or_other_drift(
    vit: Path, tmp_path: Path, factor: float, edit: dict[str, str]
) -> None:
    shrink_embeddings(vit, factor)
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps(config | edit))
    with pytest.raises(CheckpointError, match=r"norm_eps 1e-12 becomes 1e-06 \(\d.*--allow-drift"):
        convert(vit, tmp_path / "out", layout="torchvision")
    done = convert(vit, tmp_path / "out", layout="torchvision", allow_drift=True)
    assert done.drift > 1e-4 if not edit else done.drift_without_norm_eps > 1e-5


def test_convert_describes_changed_pixels_in_grey_levels(tmp_path: Path) -> None:
    references.save_model("vit", tmp_path / "vit")
    processor = hf.CLIPImageProcessor(
        size={"shortest_edge": 35}, crop_size={"height": 32, "width": 32}, do_convert_rgb=False
    )
    processor.save_pretrained(tmp_path / "vit")
    done = convert(tmp_path / "vit", tmp_path / "timm", layout="timm")
    reason, measured = done.preprocessing
    assert reason.endswith("(a crop whose corner falls on half a pixel starts one pixel away)")
    match = re.fullmatch(
        r"preprocessing: a smooth test image of 301x404 pixels differs by (\S+) of 255 grey levels "
        r"on average, at most (\S+), because of crop_rounding; for the source's own pixels, use "
        r"vitlib\.ImageProcessor\.load\(SRC\)", measured
    )  # fmt: skip
    assert match is not None, measured
    assert 1 < float(match[1]) < float(match[2]) <= 255
    before = ImageProcessor.load(tmp_path / "vit")
    assert before is not None
    assert compare_preprocessing(before, before, "hf") == ()
    brighter = compare_preprocessing(before, replace(before, image_mean=(0.0,) * 3), "hf")
    mean = [float(x) for x in re.findall(r"by (\S+) of 255", brighter[-1])]
    assert mean == [pytest.approx(255 * sum(before.image_mean or ()) / 3, rel=0.02)]


def test_refused_conversion_leaves_target_unchanged(vit: Path, tmp_path: Path) -> None:
    convert(vit, tmp_path / "out", layout="torchvision")
    before = listing(tmp_path / "out")
    references.save_model("vit tanh gelu", tmp_path / "tanh")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "tanh", tmp_path / "out", layout="torchvision")
    assert listing(tmp_path / "out") == before


def test_convert_jax_to_hf_keeps_tanh_gelu(tmp_path: Path) -> None:
    done = convert(FIXTURES / "jax" / "vit.npz", tmp_path / "hf", layout="hf")
    assert done.drift < TINY
    assert (
        json.loads((tmp_path / "hf/config.json").read_text())["hidden_act"] == "gelu_pytorch_tanh"
    )
    assert {change.field for change in done.changes} == {"position_resize"}


def test_convert_with_other_profile_writes_its_numerics(tmp_path: Path) -> None:
    """The target's config can store the numerics of the other library."""
    done = convert(FIXTURES / "timm" / "vit", tmp_path / "hf", layout="hf", profile="hf")
    assert done.source_profile == "hf"
    assert done.changes == ()
    assert vitlib.load(tmp_path / "hf").config.norm_eps == 1e-12


def test_convert_takes_num_heads_where_no_file_has_it(tmp_path: Path) -> None:
    references.save_model("vit", tmp_path / "vit")
    convert(tmp_path / "vit", tmp_path / "tv", layout="torchvision")
    assert vitlib.load(tmp_path / "tv").config.num_heads == 4  # from vitlib.json, else 1 is assumed
    (tmp_path / "tv/vitlib.json").unlink()
    assert vitlib.load(tmp_path / "tv").config.num_heads == 1
    done = convert(tmp_path / "tv", tmp_path / "hf", layout="hf", num_heads=4)
    assert done.drift < TINY
    assert references.distance(logits(tmp_path / "hf"), logits(tmp_path / "vit")) < 1e-5


def test_convert_lists_tensors_that_are_not_written(tmp_path: Path) -> None:
    references.save_model("vit base", tmp_path / "vit")
    done = convert(tmp_path / "vit", tmp_path / "timm", layout="timm")
    assert done.not_written == ("pooler.dense.bias", "pooler.dense.weight")
    references.save_model("clip both towers", tmp_path / "clip")
    done = convert(tmp_path / "clip", tmp_path / "tower", layout="openclip")
    assert any(name.startswith("text_model.") for name in done.not_written)
    assert done.drift < TINY


def test_convert_compares_bfloat16_in_float32(tmp_path: Path) -> None:
    model = references.build("vit").bfloat16()
    model.save_pretrained(tmp_path / "vit")
    done = convert(tmp_path / "vit", tmp_path / "timm", layout="timm")
    assert 0 < done.drift < 1e-5  # bfloat16 has steps of 4e-3
    assert {t.dtype for t in load_file(tmp_path / "timm/model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("layout", ["hf", "timm", "meta", "torchvision", "openclip", "jax"])
def test_written_layout_is_detected(layout: str, tmp_path: Path) -> None:
    name = "clip projection" if layout == "openclip" else "msn"
    references.save_model(name, tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "out", layout=layout, allow_drift=True)
    assert done.reads_as == layout
    assert set(listing(tmp_path / "out")) == {*done.files, "conversion.json"}
    assert (done.drift < TINY) == (layout != "jax")  # JAX has no erf GELU


# --- the target folder ----------------------------------------------------------------------------


def test_convert_refuses_to_overwrite_its_source(vit: Path, tmp_path: Path) -> None:
    before = listing(vit)
    (tmp_path / "link").symlink_to(vit)
    for source in (vit, vit / "model.safetensors", tmp_path / "link"):
        with pytest.raises(SourceError, match="is what is read"):
            convert(source, vit, layout="timm")
    assert listing(vit) == before


def test_convert_refuses_folder_with_other_weights(vit: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"another")
    with pytest.raises(SourceError, match=r"holds model\.safetensors and was not written by"):
        convert(vit, target, layout="torchvision")
    assert listing(target) == {"model.safetensors": b"another"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match="is a file: expected a folder"):
        convert(vit, tmp_path / "file", layout="timm")


def test_convert_replaces_earlier_conversion(vit: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    references.save_model("dinov2", tmp_path / "dinov2")
    convert(tmp_path / "dinov2", target, layout="hf")
    (target / "preprocessor_config.json").write_text('{"image_processor_type": "X"}')
    (target / "vitlib.json").write_text('{"num_heads": 1}')
    (target / "README.md").write_text("mine")
    done = convert(vit, target, layout="timm")
    assert set(listing(target)) == {"README.md", *done.files, "conversion.json"}
    assert json.loads((target / "conversion.json").read_text())["layout"] == "timm"
    assert references.distance(logits(target), logits(vit)) < 1e-5


def test_convert_stopped_between_renames_leaves_no_mixed_model(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two renames the folder holds no weights, or one whole model."""
    old = tmp_path / "old"
    references.save_model("vit tanh gelu", old)
    renames = 0
    while True:
        target = tmp_path / f"out{renames}"
        convert(old, target, layout="hf")
        remaining = [renames]
        rename = Path.replace

        def stop(
            self: Path,
            to: Path,
            remaining: list[int] = remaining,
            real: object = rename,
            target: Path = target,
        ) -> object:
            if to.parent != target:  # save() into the temporary folder
                return real(self, to)
            if not remaining[0]:
                raise KeyboardInterrupt
            remaining[0] -= 1
            return real(self, to)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", stop)
            try:
                convert(vit, target, layout="timm")
            except KeyboardInterrupt:
                with pytest.raises(SourceError, match="no weights"):
                    vitlib.load(target)
            else:
                break
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        renames += 1
    assert renames == 3


def test_convert_rejects_unknown_layout_and_unsupported_model(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout='tf': expected one of hf, timm"):
        convert(vit, tmp_path / "out", layout="tf")
    references.save_model("dinov3", tmp_path / "dinov3")
    with pytest.raises(ConfigError, match="rope=Rope"):
        convert(tmp_path / "dinov3", tmp_path / "out", layout="torchvision")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
