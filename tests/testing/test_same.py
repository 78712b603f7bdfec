"""assert_same: two modules of any kind, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import vitlib
from fixtures import references
from fixtures.families import FAMILIES, RARE, pixels, tiny
from fixtures.own_vits import OWN_POINTS, build_own, build_timm
from vitlib.errors import ConfigError
from vitlib.testing import ParityError, assert_same

# Two towers need a text, MAE draws a mask, and this head gives pixels.
UNCOMPARED = ("clip both towers", "siglip both towers", "mae", "mae pre-training", "vit masked")


@pytest.mark.parametrize("name", [n for n in references.MODELS if n not in UNCOMPARED])
def test_models_of_transformers_are_the_same(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images, model = references.make_pixels(reference), vitlib.load(tmp_path)
    assert_same(model, reference, images)
    assert_same(reference, model, images)


@pytest.mark.parametrize("family", FAMILIES | RARE)
def test_a_copy_is_the_same(family: str) -> None:
    model = tiny(family)
    assert_same(copy.deepcopy(model), model, pixels(2), atol=0)


def test_logits_may_be_named_as_a_point() -> None:
    model = tiny("vit")
    assert_same(build_own(model), model, pixels(2), {**OWN_POINTS, "logits": "read"})


@pytest.mark.parametrize("name", ["clip both towers", "siglip both towers"])
def test_two_towers_are_compared_by_the_image_tower(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images, model = references.make_pixels(reference), vitlib.load(tmp_path)
    with pytest.raises(ConfigError, match="of two towers give the image tower"):
        assert_same(model, reference, images)
    assert_same(model, reference.vision_model, images)


def test_trained_model_is_the_same_in_every_form(deit_tiny: Path, two_cats: Path) -> None:
    predictor = vitlib.Predictor.load(deit_tiny)
    model, pixels = predictor.model, predictor.image_processor([two_cats])
    # Its patch tokens are 1e-4 from those in float64, by rounding alone.
    assert_same(build_own(model), model, pixels, OWN_POINTS, atol=1e-7, rtol=1e-6)
    for my_vit in (build_own(model), build_timm(model)):
        vitlib.testing.assert_same(my_vit, model, pixels, atol=1e-5)
        for dtype in (torch.bfloat16, torch.float16):
            assert_same(copy.deepcopy(my_vit).to(dtype), model, pixels)
    with pytest.raises(ParityError) as caught:
        assert_same(build_own(model, "gelu"), model, pixels, OWN_POINTS, atol=1e-5)
    assert caught.value.point == "blocks.0.mlp.hidden"
    for name, broken in vitlib.testing.damage(model):
        with pytest.raises(ParityError):
            assert_same(broken, model, pixels)
        assert name


def test_models_off_their_grid_are_the_same(tmp_path: Path) -> None:
    for name in ("vit", "dinov2", "registers", "siglip base", "clip"):
        reference = references.save_model(name, tmp_path / name)
        images = references.make_pixels(reference, size=(40, 24))
        assert_same(vitlib.load(tmp_path / name), reference, images)


@pytest.fixture
def model() -> vitlib.ViT:
    return tiny("vit", depth=2, num_heads=4)


@pytest.fixture
def images() -> Tensor:
    return pixels(2)


class Wrapped(nn.Module):
    """A model whose output is put into another kind of object."""

    def __init__(self, model: nn.Module, wrap: Any) -> None:
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.model, x)


class Outputs(NamedTuple):
    logits: Tensor
    pooler_output: Tensor | None = None


WRAPS: dict[str, Any] = {
    "tuple": lambda m, x: (m(x), m.forward_features(x)),
    "list": lambda m, x: [m(x)],
    "dict": lambda m, x: {"logits": m(x), "loss": None},
    "dict of tokens": lambda m, x: OrderedDict(last_hidden_state=m.forward_features(x)),
    "named tuple": lambda m, x: Outputs(m(x)),
    "object": lambda m, x: SimpleNamespace(logits=m(x), hidden_states=None),
    "tokens": lambda m, x: m.forward_features(x),
    "odd names": lambda m, x: {"mask": torch.ones(2, dtype=torch.bool), "y": m(x)},
}


@pytest.mark.parametrize("kind", WRAPS)
def test_outputs_of_any_kind_are_compared(kind: str, model: vitlib.ViT, images: Tensor) -> None:
    wrapped = Wrapped(model, WRAPS[kind])
    assert_same(wrapped, model, images)
    assert_same(model, wrapped, images)
    broken = copy.deepcopy(model)
    broken.blocks[1].mlp.fc1.bias.data.add_(1)
    with pytest.raises(ParityError):
        assert_same(Wrapped(broken, WRAPS[kind]), model, images)


def test_output_without_tensors_is_refused(model: vitlib.ViT, images: Tensor) -> None:
    with pytest.raises(ConfigError, match="Wrapped returned str without a tensor of floats"):
        assert_same(Wrapped(model, lambda *_: "cat"), model, images)


def test_snippet_of_a_test_of_ones_own(model: vitlib.ViT, images: Tensor) -> None:
    my_vit, pixels = build_own(model), images
    vitlib.testing.assert_same(my_vit, model, pixels, atol=1e-5)


def test_inputs_may_be_several_batches(model: vitlib.ViT, images: Tensor) -> None:
    own, labels = build_timm(model), torch.zeros(2)

    def stream() -> Iterator[Any]:
        yield images
        yield images[0]
        yield images, labels

    assert_same(own, model, [images, images + 1])
    assert_same(own, model, stream())
    with pytest.raises(ParityError, match="batch 1 of inputs, differ in logits"):
        assert_same(Wrapped(model, lambda m, x: m(x) * (1 if len(x) == 2 else 2)), model,
                    [images, images[:1]])  # fmt: skip
    with pytest.raises(ConfigError, match="expected at least one batch of pixels, got none"):
        assert_same(own, model, [])
    with pytest.raises(ConfigError, match="expected tensors of pixels, got a str"):
        assert_same(own, model, ["cat.jpg"])


def test_modules_are_left_as_they_were(model: vitlib.ViT, images: Tensor) -> None:
    own = build_own(model, "gelu").train()
    own.stages[0].eval()
    modes = [part.training for part in own.modules()]
    state = {name: x.clone() for name, x in own.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(ParityError):
        assert_same(own, model, images, OWN_POINTS)
    assert [part.training for part in own.modules()] == modes
    assert all(torch.equal(state[name], x) for name, x in own.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    for part in own.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert all(parameter.grad is None for parameter in own.parameters())


def test_hooks_are_removed_where_a_call_fails(model: vitlib.ViT, images: Tensor) -> None:
    own = build_own(model)

    class Failing(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            raise RuntimeError("no such thing")

    own.last = Failing()
    with pytest.raises(ConfigError, match=r"OwnViT cannot be called with pixels .* no such thing"):
        assert_same(own, model, images, OWN_POINTS)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in own.modules())
    assert not own.training


def test_caller_with_autocast_gradients_or_inference(model: vitlib.ViT, images: Tensor) -> None:
    own = build_own(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(own, model, images)
    with torch.inference_mode():
        assert_same(own, model, images)
        with pytest.raises(ParityError):
            assert_same(build_own(model, "gelu"), model, images, OWN_POINTS)
    assert_same(own, model, images.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_may_differ(dtype: torch.dtype, model: vitlib.ViT, images: Tensor) -> None:
    own = build_own(model).to(dtype)
    assert_same(own, model, images)
    assert_same(model, own, images)
    if dtype != torch.float64:
        with pytest.raises(ParityError, match="rounding: in float64 they differ by"):
            assert_same(own, model, images, rtol=1e-6)
        broken = build_own(model, "no residual").to(dtype)
        with pytest.raises(ParityError) as caught:
            assert_same(broken, model, images, OWN_POINTS)
        assert caught.value.point == "blocks.0.resid_mid"


def test_message_says_what_by_how_much_and_why(model: vitlib.ViT, images: Tensor) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_same(build_own(model, "gelu"), model, images, OWN_POINTS, rtol=1e-6)
    number = r"[\d.e+-]+"
    distance = rf"max {number}, mean {number}, relative {number}"
    lines = str(caught.value).splitlines()
    assert lines[0] == "model (OwnViT) and reference (ViT) differ in logits"
    assert re.fullmatch(rf"  logits: {distance} \(allowed: max {number}\)", lines[1])
    place = r"blocks\.0\.mlp\.hidden \(model: stages\.0\.narrow:in\)"
    assert re.fullmatch(rf"  first difference: {place}: {distance}", lines[2])
    assert lines[3] == "  equal before it: blocks.0.mlp.fc1"
    assert lines[4].startswith("  cause: activation: the model computes GELU, tanh form")
    assert re.fullmatch(r"  \d+ points compared in float64", lines[5])
    again = pickle.loads(pickle.dumps(caught.value))  # as pytest-xdist sends it
    assert str(again) == str(caught.value)
    assert again.point == "blocks.0.mlp.hidden"


def test_pytest_shows_the_caller(model: vitlib.ViT, images: Tensor) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_same(build_own(model, "gelu"), model, images)
    frames = [entry for entry in caught.traceback if not entry.ishidden(caught)]
    assert [frame.path.name for frame in frames] == [Path(__file__).name]


def test_points_that_are_named_are_compared(model: vitlib.ViT, images: Tensor) -> None:
    """Patch tokens of the last block reach no logits, and are compared where they are named."""
    own = build_own(model)
    own.stages[1].register_forward_hook(
        lambda _, __, x: torch.cat([x[:, :1], x[:, 1:].flip(2)], dim=1)
    )
    assert_same(own, model, images)
    with pytest.raises(ParityError, match=r"differ in blocks\.1\.resid, norm") as caught:
        assert_same(own, model, images, {"blocks.*.resid": "stages.*", "norm": "last"})
    assert caught.value.point == "blocks.1.resid"


def test_pairs_of_paths_serve_two_modules_of_ones_own(model: vitlib.ViT, images: Tensor) -> None:
    own, other = build_own(model), build_timm(model)
    points = {"blocks.*.mlp.hidden": ("stages.*.narrow:in", "blocks.*.mlp.fc2:in")}
    assert_same(own, other, images, points)
    broken = build_own(model, "gelu")
    with pytest.raises(ParityError) as caught:
        assert_same(broken, other, images, OWN_POINTS)  # timm's names are guessed
    assert caught.value.point == "blocks.0.mlp.hidden"
    with pytest.raises(ParityError) as caught:
        assert_same(broken, other, images, points)
    assert caught.value.point == "blocks.0.mlp.hidden"


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"blocks.*.atn.q": "stages.*"}, "no point 'blocks.*.atn.q'; the nearest is"),
        ({"blocks.*.resid": "stage.*"}, r"OwnViT has no module 'stage.\*'; the nearest path is"),
        ({"norm": "lst"}, "OwnViT has no module 'lst'; the nearest path is 'last'"),
        ({"norm": ("last", "a", "b")}, "expected a path, or a pair of paths"),
        ({"norm": "cut"}, "'norm' is .* and .*: expected tensors of the same shape"),
        ({"norm": "spare"}, "the model has no tensor 'norm': its module was not called"),
    ],
)
def test_wrong_map_is_refused(points: Any, message: str, model: vitlib.ViT, images: Tensor) -> None:
    own = build_own(model)
    own.spare = nn.Identity()
    with pytest.raises(ConfigError, match=message):
        assert_same(own, model, images, points)


def test_wrong_arguments_are_refused(model: vitlib.ViT, images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"reference: expected an nn.Module, got a OrderedDict"):
        assert_same(model, model.state_dict(), images)
    with pytest.raises(ConfigError, match="both are ViTs of vitlib, whose points are known"):
        assert_same(model, model, images, {"norm": "norm"})
    assert_same(model, model, images)
    for name in ("atol", "rtol"):
        for value in (-1e-5, float("nan"), "1e-5"):
            with pytest.raises(ConfigError, match=f"{name}=.*expected a number of at least 0"):
                assert_same(model, model, images, **{name: value})


def test_tolerances_are_bounds(model: vitlib.ViT, images: Tensor) -> None:
    logits = model(images).detach()
    shifted = Wrapped(model, lambda m, x: m(x) + 1e-3)
    assert_same(shifted, model, images, atol=1.001e-3)
    assert_same(shifted, model, images, rtol=1.01e-3 / float(logits.abs().max()))
    for tolerance in ({}, {"atol": 0.99e-3}, {"rtol": 0.99e-3 / float(logits.abs().max())}):
        with pytest.raises(ParityError):
            assert_same(shifted, model, images, **tolerance)


def test_other_shapes_are_no_parity(model: vitlib.ViT, images: Tensor) -> None:
    other = copy.deepcopy(model)
    other.reset_classifier(7)
    with pytest.raises(ParityError, match=r"head: outputs of other shapes, \(1, 7\) in the model"):
        assert_same(other, model, images)


def test_optimized_and_compiled_models_are_compared(model: vitlib.ViT, images: Tensor) -> None:
    assert_same(vitlib.optimize(model), model, images)
    fast = vitlib.optimize(model, precision="bf16")
    with pytest.raises(ParityError, match="or rounding to fewer bits inside, as a module does not"):
        assert_same(fast, model, images)
    assert_same(fast, model, images, rtol=6e-2)
    assert_same(torch.compile(copy.deepcopy(model), backend="eager"), model, images)
    built = build_timm(model)
    compiled = torch.compile(built, backend="eager")
    assert_same(compiled, model, images)
    built.blocks[1].norm2.eps = 1e-2
    with pytest.raises(ParityError, match=r"model: blocks\.1\.norm2") as caught:
        assert_same(torch.compile(built, backend="eager"), model, images)
    assert "eps of norm2: 0.01 in the model" in caught.value.cause


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_traced_models_are_compared(model: vitlib.ViT, images: Tensor) -> None:
    traced = torch.jit.trace(build_timm(model), images, check_trace=False)
    assert_same(traced, model, images)
    broken = copy.deepcopy(model)
    broken.blocks[1].mlp.fc1.bias.data.add_(1)
    with pytest.raises(ParityError):
        assert_same(traced, broken, images)
    with pytest.raises(ConfigError, match="TorchScript shows none"):
        assert_same(traced, broken, images, {"norm": "norm"})


def test_module_that_float64_breaks_is_compared(model: vitlib.ViT, images: Tensor) -> None:
    class Float32Alone(type(build_own(model))):  # type: ignore[misc]
        def tokens(self, x: Tensor) -> Tensor:
            return super().tokens(x.float())

    for mistake, point in (("no residual", "resid_mid"), ("eps", "norm1"), ("gelu", "mlp.hidden")):
        own = build_own(model, mistake)
        own.__class__ = Float32Alone
        with pytest.raises(ParityError, match="points compared in float32") as caught:
            assert_same(own, model, images, OWN_POINTS)
        assert caught.value.point == f"blocks.0.{point}"
        assert caught.value.is_certain


@pytest.mark.cuda
def test_devices_may_differ(model: vitlib.ViT, images: Tensor) -> None:
    own = build_own(model).to("cuda")
    assert_same(own, model, images)
    assert_same(model, own, images.to("cuda"))
    with pytest.raises(ParityError) as caught:
        assert_same(build_own(model, "gelu").to("cuda"), model, images, OWN_POINTS)
    assert caught.value.point == "blocks.0.mlp.hidden"
