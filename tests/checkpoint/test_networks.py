"""Files as training code leaves them: any prefix, several networks, heads of any name."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vitlib
from fixtures import references
from fixtures.layout_files import make_pixels, read_network, weights_path
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.networks import find_networks, select_network
from vitlib.errors import CheckpointError, ConfigError
from vitlib.source.locate import Source
from vitlib.weights import read_checkpoint

State = dict[str, Tensor]
VIT, OTHER = read_network(weights_path("timm/vit")), {}  # of timm, with a head of its own
OTHER = {name: tensor + 1 for name, tensor in VIT.items()}
HEAD = {name: VIT[name] for name in ("head.weight", "head.bias")}
TRUNK = {name: tensor for name, tensor in VIT.items() if name not in HEAD}
HEADS = 2  # of the fixture


def under(prefix: str, state: State = TRUNK) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(tmp_path: Path, state: Any, name: str = "x.pth") -> Path:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({key: t.clone() for key, t in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def logits(source: Path, **options: Any) -> Tensor:
    model = vitlib.load(source, num_heads=HEADS, **options)
    with torch.inference_mode():
        return model(make_pixels(*model.config.image_size))


def expected(state: State, tmp_path: Path) -> Tensor:
    return logits(saved(tmp_path, state, "expected.safetensors"))


PREFIXES = [
    "backbone.",
    "trunk.",
    "base_encoder.",
    "model.visual.",
    "module.encoder_q.",
    "vit_model.",
    "image_encoder.",
    "net.backbone.0.",
    "timm_model.",
    "module._orig_mod.model.",
    "_orig_mod.",
    "a/b/",
    "x" * 300 + ".",
    "über.modell.",
    "blocks.",
    "1.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix(prefix: str, tmp_path: Path) -> None:
    path = saved(tmp_path, under(prefix, VIT))
    assert torch.equal(logits(path), expected(VIT, tmp_path))
    beside = saved(tmp_path, {**under(prefix), "criterion.weight": torch.ones(2)}, "y.pth")
    found = read_checkpoint(Source(beside))
    assert not found.problems
    ignored = found.ignored
    assert any(name.startswith("criterion") for name in ignored)


@pytest.mark.parametrize(
    "layout", ["hf", "timm", "meta", "torchvision", "openclip", "jax", "vitlib"]
)
def test_a_prefix_before_every_layout(layout: str, tmp_path: Path) -> None:
    names = {"hf": "vit", "timm": "vit", "meta": "dinov2", "torchvision": "vit"}
    if layout in ("hf", "vitlib"):
        model = vitlib.load(weights_path("timm/vit"))
        vitlib.save(model, tmp_path / "own", layout=layout)
        state = read_network(tmp_path / "own")
    else:
        state = read_network(
            weights_path(f"{layout}/{names.get(layout, 'erf' if layout == 'openclip' else 'vit')}")
        )
    facts = Facts(num_heads=2 if layout == "hf" else None)  # of no published ViT's width
    plain = read_checkpoint(Source(saved(tmp_path, state, "plain.pth")), facts=facts)
    found = read_checkpoint(
        Source(saved(tmp_path, under("lit.net_0.", state), "prefixed.pth")), facts=facts
    )
    assert (found.layout.name, found.model.config) == (layout, plain.model.config)
    assert (plain.prefix, found.prefix) == ("", "lit.net_0.")
    assert not found.problems
    assert all(torch.equal(found.state[name], plain.state[name]) for name in plain.state)


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (module, where)
        for module in ("classifier", "head", "fc", "linear_head", "heads.head", "linear")
        for where in ("outside", "inside", "beside a part")
    ],
)
def test_a_head_of_any_name(module: str, where: str, tmp_path: Path) -> None:
    before = {"outside": "", "inside": "lit.backbone.", "beside a part": "lit."}[where]
    head = {f"{before}{module}.{name.partition('.')[2]}": t for name, t in HEAD.items()}
    path = saved(tmp_path, under("lit.backbone.") | head)
    assert torch.equal(logits(path), expected(VIT, tmp_path))
    del head[f"{before}{module}.bias"]
    none = {**VIT, "head.bias": torch.zeros_like(VIT["head.bias"])}
    path = saved(tmp_path, under("lit.backbone.") | head)
    assert torch.equal(logits(path), expected(none, tmp_path))


@pytest.mark.parametrize(
    "head",
    [
        {"fc.0.weight": torch.ones(5, 16), "fc.0.bias": torch.ones(5)},
        {"linear_head.weight": torch.ones(5, 80), "linear_head.bias": torch.ones(5)},
        {"projector.1.weight": torch.ones(4, 4), "predictor.weight": torch.ones(4, 4)},
        {"fc.weight": torch.ones(5, 16), "classifier.weight": torch.ones(7, 16)},
        {"fc.weight": torch.ones(5, 16, 1)},
    ],
)
def test_a_head_that_is_none_is_left_and_told(head: State, tmp_path: Path) -> None:
    width = TRUNK["cls_token"].shape[-1]
    head = {
        n: torch.ones(t.shape[0], width) if t.shape[1:] == (16,) else t for n, t in head.items()
    }
    for place in (under("backbone.") | head, under("", TRUNK) | head):
        found = read_checkpoint(Source(saved(tmp_path, place)))
        assert not found.problems
        assert found.model.config.num_classes == 0
        told = " ".join((*found.ignored, *found.notes))
        assert all(name.partition(".")[0] in told for name in head)
        assert found.prefix or found.notes


@pytest.mark.parametrize("module", ["head", "fc"])
@pytest.mark.parametrize("biased", [True, False])
def test_a_second_classifier_of_one_name_is_left_and_told(
    module: str, biased: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = {f"{module}.weight": HEAD["head.weight"]}
    inner |= {f"{module}.bias": HEAD["head.bias"]} if biased else {}
    outer = {f"{module}.{leaf}": HEAD[f"head.{leaf}"] + 1 for leaf in ("weight", "bias")}
    bias = HEAD["head.bias"] if biased else torch.zeros_like(HEAD["head.bias"])
    path = saved(tmp_path, under("backbone.", TRUNK | inner) | outer)
    assert torch.equal(logits(path), expected({**VIT, "head.bias": bias}, tmp_path))
    assert f"prefix='backbone.'; not loaded: {module} (2 tensors)" in caplog.text


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (("fc.weight", "fc.bias"), "vit"),
        (("fc.0.weight", "fc.2.weight"), "vit"),
        (("fc.fc1.weight", "fc.bn1.weight"), "vit_msn"),
    ],
)
def test_only_msns_projection_head_makes_a_file_msns(
    names: tuple[str, ...], family: str, tmp_path: Path
) -> None:
    """A classifier that does not fit is training code's: it says nothing of the family."""
    head = {name: torch.ones(5, 7) for name in names}
    found = read_checkpoint(Source(saved(tmp_path, TRUNK | head)))
    assert (found.model.config.family, found.problems) == (family, ())
    assert found.notes[0].startswith("heads that are left out: fc.")
    assert set(names) <= set(found.ignored)


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize(
    ("linear", "rest"), [("head", "head.s"), ("head.fc", "head.bn.weight"), ("fc", "fc.scale")]
)
def test_a_part_of_a_larger_head_is_no_classifier(
    linear: str, rest: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the batch norm before it, or the scale after it, its scores would be others."""
    head = {f"{linear}.{leaf}": HEAD[f"head.{leaf}"] for leaf in ("weight", "bias")}
    path = saved(tmp_path, under(prefix) | head | {rest: torch.ones(HEAD["head.weight"].shape[1])})
    assert vitlib.load(path, num_heads=HEADS).num_classes == 0
    line = caplog.messages[-1]
    assert "left out" in line or "not loaded: head (3 tensors)" in line or "fc (3 tensors)" in line
    assert linear.partition(".")[0] in line


def test_what_may_stand_before_a_head_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = {f"classifier.{leaf}": HEAD[f"head.{leaf}"] for leaf in ("weight", "bias")}
    neck = {"neck.0.weight": torch.ones(3), "neck.0.bias": torch.ones(3)}
    assert vitlib.load(
        saved(tmp_path, under("encoder.") | head | neck), num_heads=HEADS
    ).num_classes
    said = "not loaded: neck (2 tensors) (if one of these stands before the head, its scores are"
    assert said in caplog.messages[-1]
    caplog.clear()
    projector = {"projector.0.weight": torch.ones(3)}  # stands beside it
    vitlib.load(saved(tmp_path, under("encoder.") | head | projector, "y.pth"), num_heads=HEADS)
    assert "projector" in caplog.text
    assert "stands before" not in caplog.text


def test_positions_of_two_dimensions_are_named(tmp_path: Path) -> None:
    flat = {**VIT, "pos_embed": VIT["pos_embed"][0]}
    rows, width = flat["pos_embed"].shape
    with pytest.raises(CheckpointError, match=f"are {rows}x{width}: expected 1 x tokens x {width}"):
        vitlib.load(saved(tmp_path, flat), num_heads=HEADS)


def test_heads_alike_in_every_layout(tmp_path: Path) -> None:
    for name in ("torchvision/vit", "meta/dino", "jax/vit"):
        state = read_network(weights_path(name))
        state = {key: t for key, t in state.items() if not key.startswith("head")}
        width = next(
            t for key, t in state.items() if key.endswith(("class_token", "cls_token", "cls"))
        )
        state |= {"linear_head.weight": torch.randn(5, width.shape[-1])}
        found = read_checkpoint(Source(saved(tmp_path, state)))
        if name == "jax/vit":  # whose kernels are the other way round: left, not misread
            assert found.model.config.num_classes == 0
            assert "linear_head.weight" in found.ignored
        else:
            assert (found.model.config.num_classes, found.problems) == (5, ())
            assert not found.state["head.bias"].any()


SEVERAL: dict[str, tuple[State, dict[str, int]]] = {
    "MoCo v3": (
        {
            **under("module.base_encoder."),
            **under("module.momentum_encoder.", OTHER),
            "module.base_encoder.head.0.weight": torch.ones(8, 4),
            "module.predictor.0.weight": torch.ones(8, 8),
        },
        {"module.base_encoder.": len(TRUNK) + 1, "module.momentum_encoder.": len(OTHER)},
    ),
    "an EMA copy": (
        {**under("model."), **under("ema_model.", OTHER)},
        {"model.": len(TRUNK), "ema_model.": len(OTHER)},
    ),
    "two towers": (
        {**under("rgb."), **under("depth.", OTHER)},
        {"rgb.": len(TRUNK), "depth.": len(OTHER)},
    ),
    "a copy inside": ({**TRUNK, **under("ema.", OTHER)}, {"": len(TRUNK), "ema.": len(OTHER)}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_networks_are_named_and_chosen(name: str, tmp_path: Path) -> None:
    state, counts = SEVERAL[name]
    path = saved(tmp_path, {"state_dict": state, "epoch": 3})
    with pytest.raises(CheckpointError) as error:
        vitlib.load(path)
    for prefix, count in counts.items():
        assert f"{prefix!r} ({count} tensors)" in str(error.value)
    remedy = re.search(r"prefix='([^']*)' \(on the command line --prefix\)", str(error.value))
    assert remedy is not None
    assert remedy[1] in counts
    for prefix in counts:
        first = OTHER if "momentum" in prefix or "ema" in prefix or "depth" in prefix else TRUNK
        assert torch.equal(logits(path, prefix=prefix), expected(first, tmp_path))
        if prefix:
            short = prefix.removesuffix(".")
            assert torch.equal(logits(path, prefix=short), expected(first, tmp_path))
    with pytest.raises(CheckpointError, match=r"no tensor's name begins with prefix='no\.'"):
        vitlib.load(path, prefix="no.")


DECIDED: dict[str, tuple[Any, State, str, State]] = {
    "DINO": (
        {
            "student": under("module.backbone.", OTHER)
            | {"module.head.mlp.0.weight": torch.ones(2)},
            "teacher": under("backbone.") | {"head.mlp.0.weight": torch.ones(2)},
            "epoch": 3,
        },
        TRUNK,
        "student.",
        OTHER,
    ),
    "DINOv2": (
        {"model": under("student.backbone.", OTHER) | under("teacher.backbone.")},
        TRUNK,
        "student.backbone.",
        OTHER,
    ),
    "timm": ({"state_dict": VIT, "state_dict_ema": OTHER}, VIT, "state_dict_ema.", OTHER),
    "DeiT": ({"model": VIT, "model_ema": OTHER, "args": None}, VIT, "model_ema.", OTHER),
    "EMA of DDP": ({"model": VIT, "ema": under("module.", OTHER)}, VIT, "ema.", OTHER),
    "Lightning": (
        {
            "state_dict": under("model.", VIT),
            "callbacks": {"EMA": {"decay": 0.9, "ema_state_dict": under("model.", OTHER)}},
            "hyper_parameters": {"lr": 0.1},
        },
        VIT,
        "callbacks.EMA.ema_state_dict.",
        OTHER,
    ),
    "solo-learn": (
        {"state_dict": under("backbone.") | under("momentum_backbone.", OTHER)},
        TRUNK,
        "momentum_backbone.",
        OTHER,
    ),
}


@pytest.mark.parametrize("name", DECIDED)
def test_what_training_code_decides_is_told_and_can_be_chosen(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, first, prefix, other = DECIDED[name]
    path = saved(tmp_path, state)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(path), expected(first, tmp_path))
    told = next(r.getMessage() for r in caplog.records if "not loaded" in r.getMessage())
    if prefix in told:
        assert f"prefix='{prefix}'" in told
    else:
        assert prefix.rstrip(".") in told
    assert torch.equal(logits(path, prefix=prefix), expected(other, tmp_path))


def test_conch(tmp_path: Path) -> None:
    state = under("visual.trunk.") | {
        "visual.attn_pool_contrast.query": torch.ones(1, 8),
        "visual.ln_contrast.weight": torch.ones(8),
        "visual.proj_contrast": torch.ones(8, 8),
        "text.transformer.resblocks.0.ln_1.weight": torch.ones(8),
        "logit_scale": torch.ones(()),
    }
    path = saved(tmp_path, state)
    assert torch.equal(logits(path), expected(TRUNK, tmp_path))
    found = read_checkpoint(Source(path))
    assert (found.layout.name, found.prefix) == ("timm", "visual.trunk.")
    assert "visual.attn_pool_contrast (1 tensor)" in found.ignored


def test_a_hugging_face_model_in_lightning(tmp_path: Path) -> None:
    model = vitlib.load(weights_path("timm/vit"))
    vitlib.save(model, tmp_path / "hf", layout="hf")
    state = read_network(tmp_path / "hf")
    path = saved(tmp_path, {"state_dict": under("model.", state), "loops": {}}, "last.ckpt")
    found = read_checkpoint(Source(path), facts=Facts(num_heads=2))
    assert (found.layout.name, found.prefix, found.problems) == ("hf", "model.", ())
    assert found.model.config.num_classes == model.config.num_classes
    bin_file = saved(tmp_path / "hf", under("module.", state), "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert bin_file.exists()
    assert (
        read_checkpoint(Source(tmp_path / "hf")).model.config == vitlib.load(tmp_path / "hf").config
    )


def test_vitlibs_own_state_dict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = vitlib.load(weights_path("timm/vit"))
    own = dict(model.state_dict())
    images = make_pixels(*model.config.image_size)
    forms = {
        "torch.save": saved(tmp_path, own, "a.pth"),
        "safetensors": saved(tmp_path, own, "b.safetensors"),
        "Lightning": saved(
            tmp_path, {"state_dict": under("model.", own), "hyper_parameters": {"lr": 1}}, "c.pth"
        ),
        "FSDP": saved(tmp_path, {"model": under("_fsdp_wrapped_module.", own)}, "d.pth"),
        "compile": saved(tmp_path, under("_orig_mod.", own), "e.pth"),
    }
    for path in forms.values():
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(logging.getLogger("vitlib"), "propagate", True)
            with caplog.at_level(logging.WARNING):
                again = vitlib.load(path, num_heads=HEADS)
            assert references.distance(again(images), model(images)) < 1e-6
        said = caplog.messages[-1]
        assert (
            "assumed, for no file says it: activation='gelu', norm_eps=1e-06, pool='cls': where "
            "another is right, give activation=, pool= (--activation, --pool) or "
            "config=ViTConfig(...) for norm_eps; preprocessing assumed, for no file says it: "
        ) in said
        assert vitlib.load(path, config=model.config).config == model.config
    vitlib.save(model, tmp_path / "own", layout="vitlib")
    assert vitlib.load(tmp_path / "own").config == model.config
    assert read_checkpoint(Source(tmp_path / "own")).assumed == ()


def test_what_published_models_leave_open_is_written_beside(tmp_path: Path) -> None:
    """DeiT-III's names and shapes are also those of a model with rotary positions."""
    cfg = vitlib.ViTConfig(family="deit3", depth=1, layer_scale=1.0, pos_embed_cls=False)
    vitlib.save(vitlib.ViT(cfg), tmp_path / "meta", layout="meta")
    assert vitlib.load(tmp_path / "meta").config.num_heads == 12
    bare = saved(tmp_path, torch.load(tmp_path / "meta" / "model.pth"), "bare.pth")
    with pytest.raises(CheckpointError, match=r"architecture='(deit3_base_patch16_224)'"):
        vitlib.load(bare)
    assert vitlib.load(bare, architecture="deit3_base_patch16_224").config.family == "deit3"
    with pytest.raises(CheckpointError, match="has other tensors than this file"):
        vitlib.load(bare, architecture="vit_base_patch16_224")


def test_vitlibs_own_config_is_checked(tmp_path: Path) -> None:
    vitlib.save(vitlib.load(weights_path("timm/vit")), tmp_path, layout="vitlib")
    path = tmp_path / "vitlib.json"
    text = path.read_text()
    for old, new, told in (
        ('"depth": 2', '"depth": 3', r"contradicts the tensors: depth 3 \(the tensors have 2\)"),
        ('"depth"', '"deep"', "expected ViTConfig's fields"),
        ('"num_heads": 2', '"num_heads": 5', "not a multiple of num_heads=5"),
        ('"pool": "cls"', '"pool": "max"', "pool='max'"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises((CheckpointError, ConfigError), match=told):
            vitlib.load(tmp_path)


def test_many_names_take_little_time() -> None:
    one = torch.zeros(1)
    hostile = {
        "many networks": [
            f"n{i}.{leaf}"
            for i in range(5_000)
            for leaf in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
        ],
        "many parts": ["a." * 500 + f"{i}" for i in range(500)],
        "deep": [f"{'blocks.' * 40}{i}" for i in range(1_000)],
        "one network": [*under("x."), *(f"x.blocks.0.{i}.w" for i in range(5_000))],
    }
    for name, names in hostile.items():
        tensors = dict.fromkeys(names, one) | {n: t for n, t in under("x.").items() if n in names}
        start = time.process_time()
        if name == "many networks":
            with pytest.raises(CheckpointError) as error:
                select_network(tensors)
            assert len(str(error.value)) < 1500
        else:
            select_network(tensors)
        assert time.process_time() - start < 3, name
    assert len(find_networks(hostile["many networks"])) == 5_000
