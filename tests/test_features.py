"""Features at every depth and attention that is always right: ViT.forward_intermediates, attention.

Distances from transformers' eager attention are absolute, of probabilities: 2e-6 for tiny models is
some units in the last place of float32; eager itself is 1e-5 to 4e-5 from float64 on real models.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import vitlib
from fixtures import references
from vitlib import ViT, ViTConfig
from vitlib.encoder import Block
from vitlib.errors import ConfigError, ImageError

TINY, REAL = 2e-6, 3e-5


def tiny(**changes: object) -> ViT:
    cfg = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
    torch.manual_seed(0)
    model = ViT(ViTConfig(**{**cfg, "num_classes": 5, **changes})).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images_for(model: ViT, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    cfg = model.config
    return torch.randn(batch, cfg.in_channels, *(size or cfg.image_size))


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", references.MODELS)
def test_hidden_states_equal_transformers(name: str, tmp_path: Path) -> None:
    """Compare with hidden_states: the input of the blocks, then the output of each."""
    reference = references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path)
    images = references.make_pixels(reference)
    _, other = references.run_layers(reference, images)
    with torch.inference_mode():
        first = model.norm_pre(model.patch_embed(images))
        pairs = model.forward_intermediates(images, return_prefix_tokens=True)
    assert len(other) == len(pairs) + 1
    assert references.distance(first, other[0]) <= TINY
    for (patches, prefix), state in zip(pairs, other[1:], strict=True):
        actual = torch.cat([prefix, patches], dim=1)
        if state is other[-1] and references.distance(actual, state) > 1e-3:
            actual = model.norm(actual)  # some of transformers' models norm the last one
        assert references.distance(actual, state) <= 2 * TINY


def test_get_intermediate_layers_of_dinov2(dinov2_small: Path) -> None:
    """DINOv2's own: the last n blocks' patches through the final norm, the class token apart."""
    model = vitlib.load(dinov2_small)
    images = images_for(model, 1, (98, 126))
    with torch.inference_mode():
        result = model.forward_intermediates(images, 2, norm=True, return_prefix_tokens=True)
        tokens = model.forward_features(images)
        maps = model.forward_intermediates(images, 1, norm=True, reshape=True)
    assert [p.shape for p, _ in result] == [(1, 63, 384)] * 2
    assert torch.equal(torch.cat([result[-1][1], result[-1][0]], dim=1), tokens)
    assert torch.equal(maps[0], tokens[:, 1:].transpose(1, 2).reshape(1, 384, 7, 9))


def test_indices_select_blocks_as_in_timm() -> None:
    model = tiny()
    images = images_for(model)
    every = model.forward_intermediates(images)
    assert len(every) == 4
    for wanted, blocks in (
        (1, [3]), (3, [1, 2, 3]), ([0], [0]), ([-1], [3]), ([3, 0], [0, 3]), ((1, -2), [1, 2]),
        ([2, 2], [2]), ([], []), (np.int64(2), [2, 3]), (np.array([-1, 0]), [0, 3]),
    ):  # fmt: skip
        result = model.forward_intermediates(images, wanted)
        assert isinstance(result, list)
        assert len(result) == len(blocks)
        assert all(torch.equal(a, every[b]) for a, b in zip(result, blocks, strict=True))


def test_blocks_after_last_index_do_not_run() -> None:
    model = tiny()
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.forward_intermediates(images_for(model), [1])
    assert ran == [0, 1]
    ran.clear()
    model.attention(images_for(model), [2])
    assert ran == [0, 1]  # the third block's attention needs what goes into it, and no more


@pytest.mark.parametrize("family", ["plain", "registers", "no class token", "distilled"])
def test_prefix_tokens(family: str) -> None:
    model = tiny(
        num_registers=3 if family == "registers" else 0,
        class_token=family != "no class token",
        pool="mean" if family == "no class token" else "cls",
        dist_token=family == "distilled",
    )
    first = {"plain": 1, "registers": 4, "no class token": 0, "distilled": 2}[family]
    images = images_for(model, 3, (16, 40))
    ((maps, prefix),) = model.forward_intermediates(
        images, [-1], norm=True, reshape=True, return_prefix_tokens=True
    )
    assert maps.shape == (3, 48, 2, 5)
    assert prefix.shape == (3, first, 48)
    tokens = torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(tokens, model.forward_features(images))


def test_features_have_gradients() -> None:
    model = tiny()
    model.train()
    model.set_grad_checkpointing()
    images = images_for(model).requires_grad_()
    sum(x.square().sum() for x in model.forward_intermediates(images, [0, 2])).backward()  # type: ignore[union-attr]
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.blocks[2].parameters())
    assert all(p.grad is None for p in model.blocks[3].parameters())


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", references.MODELS)
def test_attention_equals_transformers(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path)
    images = references.make_pixels(reference)
    with torch.inference_mode():
        before = model.forward_features(images)
        actual = model.attention(images)
        after = model.forward_features(images)
    other, _ = references.run_layers(reference, images)
    assert torch.equal(before, after)
    assert len(actual) == len(other) == model.config.depth
    for a, b in zip(actual, other, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= TINY
        assert (a.sum(dim=-1) - 1).abs().max() <= 1e-6
    h, w = model.patch_grid(images)
    assert actual[0].shape[-1] == model.num_prefix_tokens + h * w


@pytest.mark.parametrize("name", ["vit", "registers", "dinov3", "beit", "clip", "siglip"])
def test_attention_is_as_near_float64_as_transformers(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path)
    images = references.make_pixels(reference, batch=8)
    truth, _ = references.run_layers(copy.deepcopy(reference).double(), images.double())
    other, _ = references.run_layers(reference, images)
    with torch.inference_mode():
        actual = model.attention(images)
    for a, b, exact in zip(actual, other, truth, strict=True):
        assert 0 < references.rms_error(a, exact) <= 1.5 * references.rms_error(b, exact) + 1e-8


@pytest.mark.parametrize("which", ["deit_tiny", "dinov2_small"])
def test_attention_of_real_models(
    which: str, request: pytest.FixtureRequest, two_cats: Path
) -> None:
    folder: Path = request.getfixturevalue(which)
    model = vitlib.load(folder)
    kind = hf.ViTModel if which == "deit_tiny" else hf.Dinov2Model
    photo = vitlib.ImageProcessor.load(folder)(two_cats)
    images = torch.cat([photo, torch.randn(3, *photo.shape[1:])])
    reference = kind.from_pretrained(folder).eval()
    other, _ = references.run_layers(reference, images)
    with torch.inference_mode():
        actual = model.attention(images)
    assert max(float((a - b).abs().max()) for a, b in zip(actual, other, strict=True)) <= REAL
    truth, _ = references.run_layers(reference.double(), images.double())
    for a, b, exact in zip(actual, other, truth, strict=True):
        assert 0 < references.rms_error(a, exact) <= 1.5 * references.rms_error(b, exact)
    assert_makes_the_branch(model, images)


def assert_makes_the_branch(model: ViT, images: Tensor) -> None:
    """Probabilities times values, through the output projection, are what the block adds."""
    with torch.inference_mode():
        probabilities, positions = model.attention(images), list(model.attn_positions(images))
        streams = model.iter_hidden_states(images, model.config.depth)
        for x, block, attn_pos, a in zip(
            streams, model.blocks, positions, probabilities, strict=False
        ):
            y = block.norm1(x)
            assert (a.sum(dim=-1) - 1).abs().max() <= 1e-6
            assert (
                references.distance(block.attn.apply_probs(a, y), block.attn(y, None, attn_pos))
                <= 5e-6
            )


@pytest.mark.parametrize("name", ["vit", "registers", "dinov3", "beit", "beit shared", "clip"])
def test_attention_probabilities_reproduce_forward(name: str, tmp_path: Path) -> None:
    references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path)
    assert_makes_the_branch(model, images_for(model))


@pytest.mark.parametrize("name", ["vit", "deit two heads", "registers", "dinov3", "beit", "clip"])
def test_prefix_rows_equal_rows_of_full_attention(name: str, tmp_path: Path) -> None:
    references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path)
    images, first = images_for(model), model.num_prefix_tokens
    with torch.inference_mode():
        whole = model.attention(images, [0, -1])
        rows = model.attention(images, [0, -1], rows="prefix")
    assert [x.shape for x in rows] == [(2, 4, first, whole[0].shape[-1])] * 2
    assert all((a[:, :, :first] - b).abs().max() <= 1e-6 for a, b in zip(whole, rows, strict=True))


def test_attention_has_gradients() -> None:
    model = tiny()
    images = images_for(model).requires_grad_()
    model.attention(images, 1)[0][..., 0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_attention_rows_of_bfloat16_sum_to_1() -> None:
    model = tiny().bfloat16()
    result = model.attention(images_for(model))
    assert all(x.dtype == torch.float32 for x in result)
    assert all((x.sum(dim=-1) - 1).abs().max() <= 1e-6 for x in result)


def test_parity_detects_swapped_queries_and_keys(tmp_path: Path) -> None:
    reference = references.save_model("vit", tmp_path)
    model = vitlib.load(tmp_path)
    images = references.make_pixels(reference)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attn.q, block.attn.k = block.attn.k, block.attn.q
    other, _ = references.run_layers(reference, images)
    assert (model.attention(images)[0] - other[0]).abs().max() > 1e-2


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0, 5, -1, [4], [-5], ["1"], "all", True, [0.5], 1.5])
def test_block_indices_out_of_range_are_rejected(wanted: object) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=r"indices=.*expected"):
        model.forward_intermediates(images_for(model), wanted)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"layers=.*expected"):
        model.attention(images_for(model), wanted)  # type: ignore[arg-type]


def test_attention_rejects_unknown_rows() -> None:
    model = tiny(class_token=False, pool="mean")
    with pytest.raises(ConfigError, match=r"no class token.*rows='all'"):
        model.attention(images_for(model), rows="prefix")
    with pytest.raises(ConfigError, match="rows='both': expected 'all' or 'prefix'"):
        model.attention(images_for(model), rows="both")  # type: ignore[arg-type]


def test_attention_rejects_images_too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size that the message says does fit."""
    model = tiny()
    images = images_for(model, 1, (320, 320))
    monkeypatch.setattr("vitlib.system.memory.available_memory", lambda _: 2**23)
    with pytest.raises(ImageError, match=r"of 320x320 pixels takes .* GiB are free") as text:
        model.attention(images)
    size = re.search(r"images of (\d+)x(\d+) pixels fit", str(text.value))
    assert size is not None
    down, across = map(int, size.groups())
    assert model.attention(images_for(model, 1, (down, across)))
    with pytest.raises(ImageError):
        model.attention(images_for(model, 1, (down + 16, across + 16)))
    assert len(model.attention(images, rows="prefix")) == 4


def test_intermediates_of_a_model_without_final_norm_have_none() -> None:
    cfg = vitlib.ViTConfig(
        image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, final_norm="none"
    )
    model = vitlib.ViT(cfg).eval()
    images = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        (tokens,) = model.forward_intermediates(images, [1], norm=True)
        assert torch.equal(tokens, model.forward_features(images)[:, 1:])
