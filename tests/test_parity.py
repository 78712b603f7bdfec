"""Parity with transformers, both ways; test_parity_controls.py shows that these tests can fail.

Tolerances are of max |a - b| / max |b| in float32 on CPU: 2e-6 for tiny models and 5e-6 at ViT-B
size, some units in the last place after that many additions in another order (docs/numerics.md).
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers as hf
from PIL import Image
from torch import Tensor

import vitlib
from fixtures import references
from fixtures.parity import BASE, FAMILIES, TINY, compare
from paths import FIXTURES
from vitlib.config_parts import Pooling
from vitlib.vit import ViT

RESIZING = [
    name
    for name in references.MODELS
    # transformers cannot resize those positions
    if name not in ("vit not square", "aimv2", "aimv2 no pool", "aimv2 biases")
]


@pytest.mark.parametrize("name", references.MODELS)
def test_load_equals_transformers(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path)
    assert not model.training
    assert compare(model, reference, references.make_pixels(reference)) < TINY


@pytest.mark.parametrize("name", RESIZING)
@pytest.mark.parametrize("size", [(43, 27), (32, 64), (16, 71), (8, 8)])
def test_off_the_learned_grid(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images = references.make_pixels(reference, size=size)
    assert compare(vitlib.load(tmp_path), reference, images) < TINY


def output(model: ViT, answer: references.ReferenceOutputs) -> Tensor:
    """Return the part of transformers' output that corresponds to the model's."""
    if answer.logits is not None or answer.projected is not None:
        return answer.logits if answer.logits is not None else answer.projected
    if model.config.pool == "cls" and answer.pooled is None:
        return answer.tokens[:, 0]
    patches = answer.tokens[:, model.num_prefix_tokens :]
    return patches.mean(dim=1) if answer.pooled is None else answer.pooled


# To vitlib these are their image towers: what stands beside is left out, and told.
TOWERS = {
    "vit masked": ({"pooler"}, {"embeddings.mask_token"}),
    "mae pre-training": (set(), set()),
    "clip both towers": (set(), set()),
    "siglip both towers": (set(), set()),
}


# Class tokens after the first hold their positions, whose rows are zeros in the saved file.
FOLDED = {"pixio": {"embeddings.cls_token", "embeddings.position_embeddings"}}


@pytest.mark.parametrize("name", references.MODELS)
def test_save_opens_in_transformers(name: str, tmp_path: Path) -> None:
    original = references.save_model(name, tmp_path / "theirs")
    model = vitlib.load(tmp_path / "theirs")
    vitlib.save(model, tmp_path / "ours")
    named = json.loads((tmp_path / "ours/config.json").read_text())["architectures"][0]
    opened, report = getattr(hf, named).from_pretrained(tmp_path / "ours", output_loading_info=True)
    missing, unexpected = TOWERS.get(name, (set(), set()))
    assert {key.split(".")[0] for key in report["missing_keys"]} == missing
    assert set(report["unexpected_keys"]) == unexpected
    assert not report["mismatched_keys"]
    assert compare(model, opened.eval(), references.make_pixels(original)) < TINY
    assert vitlib.load(tmp_path / "ours").config == model.config
    if name not in TOWERS:
        assert type(opened) is type(original)
        if model.num_classes:
            assert opened.config.id2label == original.config.id2label
            assert opened.config.problem_type == original.config.problem_type
        other, actual = original.state_dict(), opened.state_dict()
        assert other.keys() == actual.keys()
        same = other.keys() - FOLDED.get(name, set())
        assert all(torch.equal(other[key], actual[key]) for key in same)


# One of each family: its classifier where it has one.


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_as_near_float64_as_transformers(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path)
    exact = copy.deepcopy(reference).double()
    images = references.make_pixels(reference, batch=8)
    truth = output(model, references.run_reference(exact, images.double()))
    with torch.inference_mode():
        actual = references.rms_error(model(images), truth)
    other = references.rms_error(output(model, references.run_reference(reference, images)), truth)
    assert 0 < actual <= 1.5 * other + 1e-8


def test_vit_b_16(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = references.randomise(hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)))
    reference.save_pretrained(tmp_path)
    model = vitlib.load(tmp_path)
    assert model.config == replace(
        vitlib.ViTConfig.named("B/16", num_classes=1000),
        norm_eps=1e-12,
        labels=model.config.labels,
    )
    images = torch.randn(8, 3, 224, 224)
    other = references.run_reference(reference, images).logits
    with torch.inference_mode():
        actual = model(images)
    assert references.distance(actual, other) < BASE
    assert compare(model, reference, torch.randn(1, 3, 256, 320)) < BASE
    truth = references.run_reference(reference.double(), images.double()).logits
    assert references.rms_error(actual, truth) <= 1.5 * references.rms_error(other, truth) + 1e-8


def test_deit_tiny_with_a_real_photo(deit_tiny: Path, two_cats: Path) -> None:
    pinned = safetensors.torch.load_file(
        next((deit_tiny / "reference").glob("two_cats_*.safetensors"))
    )
    images = vitlib.ImageProcessor.load(deit_tiny)(two_cats)
    assert torch.equal(images, pinned["pixel_values"])
    with torch.inference_mode():
        assert references.distance(vitlib.load(deit_tiny)(images), pinned["logits"]) < BASE
    reference = hf.ViTForImageClassification.from_pretrained(deit_tiny).eval()
    assert compare(vitlib.load(deit_tiny), reference, torch.randn(2, 3, 160, 256)) < BASE


def test_dinov2_small_with_a_real_photo(dinov2_small: Path, two_cats: Path) -> None:
    model = vitlib.load(dinov2_small)
    reference = hf.Dinov2Model.from_pretrained(dinov2_small).eval()
    processor = hf.AutoImageProcessor.from_pretrained(dinov2_small)
    other = processor(Image.open(two_cats), return_tensors="pt").pixel_values
    images = vitlib.ImageProcessor.load(dinov2_small)(two_cats)
    assert torch.equal(images, other)  # 16x16 patches, from positions learned on 37x37
    assert compare(model, reference, images) < BASE


@pytest.mark.parametrize("name", ["dinov2_small", "deit_tiny"])
def test_real_models_open_in_transformers(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(name)
    vitlib.save(vitlib.load(source), tmp_path)
    other = safetensors.torch.load_file(source / "model.safetensors")
    actual = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert other.keys() == actual.keys()
    assert all(torch.equal(other[key], actual[key]) for key in other)
    vitlib_again = vitlib.load(tmp_path)
    assert vitlib_again.config == vitlib.load(source).config
    opened = hf.AutoModel.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        tokens = opened(images).last_hidden_state
        assert references.distance(vitlib_again.forward_features(images), tokens) < BASE


@pytest.mark.parametrize("name", ["vit", "deit two heads", "dinov2", "registers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resized_positions_equal_transformers_to_the_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Check in both dtypes: each rule resizes in float32 or in the dtype of the weights."""
    reference = references.save_model(name, tmp_path).to(dtype)
    embeddings = getattr(reference, reference.base_model_prefix).embeddings
    model = vitlib.load(tmp_path, dtype=dtype)
    count = embeddings.position_embeddings.shape[1] - 16
    with torch.inference_mode():
        other = embeddings.interpolate_pos_encoding(torch.empty(1, 5 * 3 + count, 48), 40, 24)
        rows, patches = model.patch_embed.resize_pos_embed((5, 3))
    assert torch.equal(torch.cat([rows, patches], dim=1), other)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_near_float32_as_transformers(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images = references.make_pixels(reference, batch=8)
    model = vitlib.load(tmp_path, dtype=torch.bfloat16)
    truth = output(
        model, references.run_reference(copy.deepcopy(reference).double(), images.double())
    )
    other = output(model, references.run_reference(reference.bfloat16(), images.bfloat16()))
    with torch.inference_mode():
        actual = model(images)  # float32 pixels: cast in the projection
    assert actual.dtype == torch.bfloat16
    assert 0 < references.rms_error(actual, truth) < 1.5 * references.rms_error(other, truth)


def test_deit3_opens_as_dinov2(tmp_path: Path) -> None:
    """ViT has no gains in transformers, DINOv2 has: with a class row of zeros it is a DeiT-III."""
    cfg = vitlib.load(FIXTURES / "timm/deit3").config
    torch.manual_seed(0)
    model = ViT(replace(cfg, mlp_dim=4 * cfg.embed_dim)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    vitlib.save(model, tmp_path)
    opened = hf.Dinov2ForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert references.distance(model(images), opened(images).logits) < TINY
        assert references.distance(vitlib.load(tmp_path)(images), model(images)) < TINY


@pytest.mark.parametrize(("name", "heads"), [("timm/vit_gap", None), ("meta/mae_finetuned.pth", 2)])
def test_normed_mean_pool_opens_as_beit(name: str, heads: int | None, tmp_path: Path) -> None:
    """Save a model that pools, then norms: that is a BEiT without offsets or biases of keys."""
    model = vitlib.load(FIXTURES / name, num_heads=heads)
    vitlib.save(model, tmp_path)
    opened = hf.BeitForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert references.distance(model(images), opened(images).logits) < TINY


def with_renamed(folder: Path, rename: object) -> None:
    path = folder / "model.safetensors"
    tensors = {rename(key): tensor for key, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("clip base", lambda key: f"vision_model.{key}"),  # as transformers 4 saved it
        ("siglip base", lambda key: f"vision_model.{key}"),
        ("vit base", lambda key: f"vit.{key}"),
        ("msn", lambda key: key.replace("encoder.", "vit.encoder.")),  # 5.23 leaves that out
        ("dinov3", lambda key: f"model.{key}" if key.startswith("layer.") else key),  # in memory
        ("mae pre-training", lambda key: key.replace("decoder_encoder.layer", "decoder_layers")),
    ],
)
def test_load_accepts_other_tensor_names(name: str, rename: object, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    with_renamed(tmp_path, rename)
    assert compare(vitlib.load(tmp_path), reference, references.make_pixels(reference)) < TINY


@pytest.mark.parametrize("name", references.MODELS)
def test_load_accepts_names_of_state_dict_in_memory(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    state = {key: tensor.contiguous() for key, tensor in reference.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert compare(vitlib.load(tmp_path), reference, references.make_pixels(reference)) < TINY


# --- what files of these families also look like --------------------------------------------------


def test_siglip_without_classifier_has_attention_pool(tmp_path: Path) -> None:
    references.save_model("siglip", tmp_path / "theirs")
    model = vitlib.load(tmp_path / "theirs", num_classes=0)
    assert vitlib.save(model, tmp_path / "ours") == {"attention_pool": (Pooling(), None)}
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(vitlib.load(tmp_path / "ours")(images), model(images))


@pytest.mark.parametrize(
    "name",
    [
        "clip base",
        "siglip base",
        "mlcd",
        "aimv2",
        "aimv2 native",
        "sapiens2",
        "dinov3",
        "beit base",
        "ijepa base",
    ],
)
def test_load_without_config_uses_family_defaults(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    (tmp_path / "config.json").unlink()
    facts = {"clip base": {"activation": "quick_gelu"}, "beit base": {"architecture": "beit"}}
    model = vitlib.load(tmp_path, num_heads=4, **facts.get(name, {}))
    if name == "ijepa base":  # 1e-6 in published files, 1e-12 in the class
        reference.config.layer_norm_eps = model.config.norm_eps
        for module in reference.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = model.config.norm_eps
    assert compare(model, reference, references.make_pixels(reference)) < TINY


def test_trained_aimv2_positions_are_written_as_learned(tmp_path: Path) -> None:
    references.save_model("aimv2 native", tmp_path / "theirs")
    model = vitlib.load(tmp_path / "theirs")
    with torch.no_grad():
        model.patch_embed.pos_embed += 0.01
    assert vitlib.save(model, tmp_path / "ours") == {"position_resize": ("sincos", "bicubic")}
    opened = hf.Aimv2VisionModel.from_pretrained(tmp_path / "ours").eval()
    assert not opened.config.is_native
    assert compare(model, opened, references.make_pixels(opened)) < TINY


def test_untrained_clip_classifier_is_not_a_projection(tmp_path: Path) -> None:
    references.save_model("clip projection", tmp_path / "theirs")
    model = vitlib.load(tmp_path / "theirs", num_classes=3)  # its bias is all zeros
    vitlib.save(model, tmp_path / "ours")
    opened = hf.CLIPForImageClassification.from_pretrained(tmp_path / "ours").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert references.distance(model(images), opened(images).logits) < TINY
    assert not model.norm.weight.requires_grad  # no forward reads it


def test_beit_without_a_pooler(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    for index, reference in enumerate(
        (
            hf.BeitModel(references.beit_config(), add_pooling_layer=False),
            hf.BeitForMaskedImageModeling(
                references.beit_config(vocab_size=9, use_mask_token=True)
            ),
        )
    ):
        references.randomise(reference).save_pretrained(tmp_path / str(index))
        model = vitlib.load(tmp_path / str(index))
        with torch.inference_mode():
            other = getattr(reference, "beit", reference)(images).last_hidden_state
            assert references.distance(model.forward_features(images), other) < TINY
        with pytest.raises(vitlib.VitlibError, match="final_norm='none'"):
            vitlib.save(model, tmp_path / "no")


@pytest.mark.parametrize("name", ["dinov3", "registers base"])
def test_no_registers(name: str, tmp_path: Path) -> None:
    kind = hf.DINOv3ViTModel if name == "dinov3" else hf.Dinov2WithRegistersModel
    config = (references.dinov3_config if name == "dinov3" else references.registers_config)(
        num_register_tokens=0
    )
    reference = references.randomise(kind(config))
    reference.save_pretrained(tmp_path)
    assert compare(vitlib.load(tmp_path), reference, references.make_pixels(reference)) < TINY


def test_openai_clip_opens_in_transformers(tmp_path: Path) -> None:
    model = vitlib.load(FIXTURES / "openclip/openai_clip.pth", num_heads=2, dtype=torch.float32)
    lost = vitlib.save(model, tmp_path)
    assert lost["final_norm"] == ("tokens", "pooled")
    opened = hf.CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert references.distance(model(images), opened(images).image_embeds) < TINY


# --- published values, from the hub ---------------------------------------------------------------

# transformers' own tests hold these for the COCO photo of two cats, to 1e-4 absolute.
PUBLISHED = {
    "google/vit-base-patch16-224": [-0.2744, 0.8215, -0.0836],
    "facebook/deit-base-distilled-patch16-224": [-1.0266, 0.1912, -1.2861],
    "facebook/dinov2-base": [
        [-2.1747, -0.4729, 1.0936],
        [-3.2780, -0.8269, -0.9210],
        [-2.9129, 1.1284, -0.7306],
    ],
    "facebook/dinov2-with-registers-base": [
        [-0.4638, -1.4563, -0.0289],
        [-1.4736, -0.8866, 0.3005],
        [0.0720, -0.2406, -1.5943],
    ],
}


@pytest.mark.hub
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str, two_cats: Path) -> None:
    vit = vitlib.Predictor.load(name, device="cpu")
    images = vit.image_processor(two_cats)
    expected = torch.tensor(PUBLISHED[name])
    with torch.inference_mode():
        if vit.model.num_classes:
            result = vit.model(images)[0, :3]
        else:
            result = vit.model.forward_features(images)[0, :3, :3]
    assert torch.allclose(result, expected, atol=1e-4, rtol=0)
