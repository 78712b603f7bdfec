"""Reading and editing tensors of a forward by name.

Bounds: logits of a trace are the forward's bits, unless probabilities are wanted, which are
computed by other kernels than fused attention: 2e-6 of the largest logit, as between two kernels.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import vitlib
from fixtures import families, user_modules
from fixtures.families import FAMILIES, RARE, pixels
from vitlib.errors import ConfigError
from vitlib.points.names import BLOCK_POINTS, list_points, matches
from vitlib.variants import PostNormBlock

everyone = pytest.mark.parametrize("family", FAMILIES | RARE)


def largest(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def tiny(name: str, **changes: Any) -> vitlib.ViT:
    return families.tiny(name, **{"depth": 3, **changes})


@everyone
def test_logits_are_those_of_forward(family: str) -> None:
    model, images = tiny(family), pixels(2)
    with torch.no_grad():
        exact = model(images)
        logits, nothing = model.trace(images)
        assert torch.equal(logits, exact)
        assert nothing == {}
        logits, at = model.trace(images, ["*"])
    assert largest(logits, exact) <= 2e-6
    assert torch.equal(at["logits"], logits)
    assert list(at) == list_points(model)


@everyone
def test_points_have_the_shapes_of_the_list(family: str) -> None:
    model, images = tiny(family), pixels(2)
    cfg = model.config
    tokens = model.forward_features(images).shape[1]
    names = {
        **{"B": 2, "T": tokens, "D": cfg.embed_dim, "H": cfg.num_heads},
        **{"K": cfg.head_dim, "M": cfg.mlp_dim},
    }
    _, at = model.trace(images, ["blocks.*"])
    for name, shape in BLOCK_POINTS.items():
        sizes = tuple(names[letter] for letter in re.findall("[A-Z]", shape))
        for index in range(cfg.depth):  # the last block too, all tokens
            assert at[f"blocks.{index}.{name}"].shape == sizes, name


@everyone
def test_points_equal_what_modules_see(family: str) -> None:
    """Compare with hooks on the modules, which the package itself never uses."""
    model, images, saw = tiny(family), pixels(2), dict[str, Tensor]()
    model.compute_all_tokens = True
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, output, name=name: saw.update({name: output, f"{name} in": args[0]})
        )
    model(images)
    _, at = tiny(family).trace(images, ["*"])
    for index, block in enumerate(model.blocks):
        prefix = f"blocks.{index}"
        v = block.attn.split_heads(saw[f"{prefix}.attn.v"])
        post = isinstance(block, PostNormBlock)
        for point, exact in {
            "resid_pre": saw[f"{prefix} in"],
            "attn.v": v,
            "attn.out": saw[f"{prefix}.attn"],
            "resid_mid": saw[f"{prefix}.mlp in" if post else f"{prefix}.norm2 in"],
            "mlp.out": saw[f"{prefix}.mlp"],
            "resid": saw[prefix],
        }.items():
            assert largest(at[f"{prefix}.{point}"], exact) <= 2e-5, (index, point)
        probs = at[f"{prefix}.attn.scores"].softmax(dim=-1)
        assert torch.equal(probs, at[f"{prefix}.attn.probs"])
        heads = at[f"{prefix}.attn.probs"] @ at[f"{prefix}.attn.v"]
        assert largest(at[f"{prefix}.attn.heads"], heads) <= 2e-6
        q, k = at[f"{prefix}.attn.q"], at[f"{prefix}.attn.k"]
        if model.config.positions.relative is None or not model.config.positions.relative:
            scores = q @ k.transpose(-1, -2) * block.attn.head_dim**-0.5
            assert largest(at[f"{prefix}.attn.scores"], scores) <= 2e-6
    assert largest(at["norm"], tiny(family).forward_features(images)) <= 2e-5


@everyone
def test_every_edit_reaches_the_logits(family: str) -> None:
    model, images = tiny(family), pixels(2)
    exact = model(images)
    torch.manual_seed(1)
    for name in list_points(model):
        # Noise, as a constant would vanish in a norm or a softmax.
        logits, at = model.trace(images, [name], edit={name: lambda x: x + torch.randn_like(x)})
        assert largest(logits, exact) > 1e-4, name
        assert largest(at[name], model.trace(images, [name])[1][name]) > 1e-3, name


def test_edit_in_place_leaves_other_points() -> None:
    model, images = tiny("vit"), pixels(2)

    def zero(x: Tensor) -> Tensor:
        return x.zero_()

    _, at = model.trace(images, ["blocks.0.resid", "norm"])
    with torch.no_grad():
        edit = {"blocks.1.resid_pre": zero, "pooled": zero}
        _, other = model.trace(images, ["blocks.0.resid"], edit=edit)
        _, last = model.trace(images, ["norm"], edit={"pooled": zero})
    assert torch.equal(other["blocks.0.resid"], at["blocks.0.resid"])
    assert largest(last["norm"], at["norm"]) <= 2e-6


def test_edit_of_all_blocks_names_those_without_the_point() -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    model = tiny("vit").with_attention(attend, [1])
    with pytest.raises(ConfigError, match=r"edit: blocks 1 have no point 'attn\.scores'"):
        model.trace(pixels(1), edit={"blocks.*.attn.scores": lambda x: x})


@everyone
def test_identity_edits_change_nothing(family: str) -> None:
    model, images = tiny(family), pixels(2)
    logits, _ = model.trace(images, edit={"*": lambda x: x})
    assert largest(logits, model(images)) <= 2e-6


def test_state_of_model_and_process_is_untouched() -> None:
    model, images = tiny("vit").train(), pixels(2)
    before, attributes = copy.deepcopy(model.state_dict()), set(dir(model))
    generator = torch.get_rng_state()
    model.trace(images, ["*"], edit={"blocks.1.attn.heads": lambda x: x * 0})
    assert model.training
    assert set(dir(model)) == attributes
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_pass_through_points_and_edits() -> None:
    model, images = tiny("vit"), pixels(2)
    logits, at = model.trace(images, ["blocks.1.attn.probs", "blocks.0.attn.q"])
    slopes = torch.autograd.grad(logits[:, 0].sum(), list(at.values()))
    assert all(slope.abs().max() > 0 for slope in slopes)
    scale = torch.ones((), requires_grad=True)
    logits, _ = model.trace(images, edit={"blocks.2.resid": lambda x: x * scale})
    assert torch.autograd.grad(logits.square().sum(), scale)[0].abs() > 0


def test_dropout_in_training_is_that_of_forward() -> None:
    rates = {"attention_dropout": 0.3, "dropout": 0.2, "drop_path": 0.2}
    model, images = tiny("vit", **rates).train(), pixels(2)
    torch.manual_seed(3)
    exact = model(images)
    torch.manual_seed(3)
    # In the last block, all tokens instead of one would draw other numbers.
    logits, _ = model.trace(images, ["blocks.0.*", "blocks.1.attn.probs"])
    assert largest(logits, exact) <= 2e-6
    torch.manual_seed(4)
    assert largest(model.trace(images)[0], exact) > 1e-3


@pytest.mark.parametrize("family", ["vit", "dinov3", "siglip_map"])
def test_compiled_trace_is_one_graph(family: str) -> None:
    torch._dynamo.reset()
    model, images = tiny(family), pixels(2)
    points, edit = ["blocks.*.attn.q", "*.probs"], {"blocks.0.attn.heads": torch.zeros_like}

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model.trace(images, points, edit)

    logits, at = compiled(images)
    exact, others = model.trace(images, points, edit)
    assert largest(logits, exact) <= 2e-6
    assert at.keys() == others.keys()


def test_trace_works_in_half_precision_and_autocast() -> None:
    model, images = tiny("dinov3"), pixels(2)
    with torch.autocast("cpu", torch.bfloat16):
        logits, at = model.trace(images, ["*"])
        assert largest(logits, model(images)) <= 0.05  # a bfloat16 has 8 bits
    assert at["blocks.0.attn.probs"].dtype == torch.float32
    model = tiny("vit").to(torch.bfloat16)
    logits, at = model.trace(images, ["blocks.0.attn.scores"])
    assert logits.dtype == torch.bfloat16
    assert at["blocks.0.attn.scores"].dtype == torch.float32


# --- what researchers do with it ----------------------------------------------------------------


def test_ablated_head_equals_zeroed_columns() -> None:
    model, images = tiny("vit"), pixels(2)
    keep = torch.tensor([0.0, 1.0])
    edit = {"blocks.1.attn.heads": lambda z: z * keep[None, :, None, None]}
    logits, _ = model.trace(images, edit=edit)
    pruned, width = copy.deepcopy(model), model.config.head_dim
    with torch.no_grad():
        pruned.blocks[1].attn.proj.weight[:, :width] = 0
    assert largest(logits, pruned(images)) <= 2e-6
    assert largest(logits, model(images)) > 1e-4


def test_patched_activation_gives_the_other_image() -> None:
    model, (a, b) = tiny("vit"), pixels(2).split(1)
    clean = model.trace(a, ["blocks.1.resid"])[1]["blocks.1.resid"]
    logits, _ = model.trace(b, edit={"blocks.1.resid": lambda _: clean})
    assert largest(logits, model(a)) <= 2e-6
    assert largest(model(b), model(a)) > 1e-3


def test_knocked_out_keys_equal_an_image_without_them() -> None:
    """A patch whose keys have a score of minus infinity cannot reach the class token."""
    model, images = tiny("vit"), pixels(1)

    def knock_out(scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[..., 3:6] = float("-inf")
        return scores

    changed = images.clone()
    changed[:, :, :8, 16:] += 1  # patches 2 and 3 of the first row, tokens 3 and 4
    edit = {"blocks.*.attn.scores": knock_out}
    assert largest(model.trace(changed, edit=edit)[0], model.trace(images, edit=edit)[0]) <= 2e-6
    assert largest(model(changed), model(images)) > 1e-4


def test_lens_of_last_residual_is_the_logits() -> None:
    model, images = tiny("vit"), pixels(2)
    logits, at = model.trace(images, ["blocks.*.resid"])
    lens = [model.forward_head(model.norm(x)) for x in at.values()]
    assert largest(lens[-1], logits) <= 2e-6
    assert largest(lens[0], logits) > 1e-3


@everyone
def test_facets_are_outputs_of_projections(family: str) -> None:
    model, images = tiny(family), pixels(2)
    saw: list[Tensor] = []
    model.blocks[1].attn.k.register_forward_hook(lambda _, __, output: saw.append(output))
    keys = model.facets(images, 1)
    model(images)
    assert torch.equal(keys, saw[-1])
    grid = model.facets(images, -1, "token", grid=True)
    tokens = model.forward_intermediates(images, 1)[0]
    assert torch.equal(grid.flatten(1, 2), tokens)
    h, w = model.patch_grid(images)
    assert grid.shape == (2, h, w, model.embed_dim)


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    {
        "blocks.1.attn.w": "blocks.1.attn.v",
        "heads": "blocks.*.attn.heads",
        "block.1.attn_out": "blocks.1.attn.out",
        "blocks.*.attention.probs": "blocks.*.attn.probs",
        "logit": "logits",
        "blocks.1.attn.Q": "blocks.1.attn.q",
        "blocks.2.mlp.hiden": "blocks.2.mlp.hidden",
        "posed": "pooled",
    }.items(),
)
def test_unknown_point_offers_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"nearest is {nearest!r}")):
        tiny("vit").trace(pixels(1), [name])
    with pytest.raises(ConfigError, match="edit: no point"):
        tiny("vit").trace(pixels(1), edit={name: torch.relu})


def test_block_beyond_the_depth_is_named() -> None:
    with pytest.raises(ConfigError, match=r"blocks 0 to \d"):
        tiny("vit").trace(pixels(1), ["blocks.99.resid"])
    with pytest.raises(ConfigError, match=r"counted from 0, and the last is 'blocks\.\d'"):
        tiny("vit").trace(pixels(1), ["blocks.-1.resid"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x: x[:, 1:], r"returned \(1, 16, 48\) torch.float32 on cpu: expected a tensor"),
        (lambda x: x.double(), "torch.float64 on cpu: expected"),
        (lambda _: None, "returned NoneType"),
    ],
)
def test_edit_of_wrong_shape_or_dtype(edit: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny("vit", embed_dim=48, num_heads=2).trace(pixels(1), edit={"blocks.1.resid": edit})


def test_wrong_arguments() -> None:
    model, images = tiny("vit"), pixels(1)
    with pytest.raises(ConfigError, match="expected a list of names"):
        model.trace(images, "norm")
    for points in (None, 5):
        with pytest.raises(ConfigError, match="expected a list of names"):
            model.trace(images, points)
    with pytest.raises(ConfigError, match="expected functions by name"):
        model.trace(images, edit="norm")
    with pytest.raises(ConfigError, match="expected names of points"):
        model.trace(images, [3])
    with pytest.raises(ConfigError, match="expected a function"):
        model.trace(images, edit={"norm": 3})
    with pytest.raises(ConfigError, match="two patterns name 'norm'"):
        model.trace(images, edit={"norm": torch.relu, "nor*": torch.relu})
    with pytest.raises(ConfigError, match="what='keys': expected one of query, key"):
        model.facets(images, 0, "keys")
    with pytest.raises(ConfigError, match=r"layer=.*expected numbers of blocks"):
        model.facets(images, 99)


class OwnForward(vitlib.ViT):
    """A subclass whose forward is not the stock one."""

    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


def test_model_with_a_forward_of_its_own_is_refused() -> None:
    model = tiny("vit")
    model.__class__ = OwnForward
    with pytest.raises(ConfigError, match="a OwnForward has a forward of its own"):
        model.trace(pixels(1), ["norm"])


def test_parts_of_ones_own_are_points_at_their_ends() -> None:
    model, images = tiny("vit", embed_dim=48), pixels(2)
    user_modules.replace_attention(model)
    user_modules.replace_mlp(model)
    logits, at = model.trace(images, ["*"])
    assert largest(logits, model(images)) <= 2e-6
    names = {name for name in list_points(tiny("vit")) if name not in at}
    assert names
    for name in names:
        with pytest.raises(ConfigError, match="not vitlib's own"):
            model.trace(images, [name])


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("abc", "a*c", True),
        ("abc", "*", True),
        ("abab", "ab*ab", True),
        ("aba", "ab*ba", False),
        ("a.b.c", "a.*.b", False),
        ("abcbd", "a*b*d", True),
        ("abc", "b*", False),
    ],
)
def test_matches(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) is expected
