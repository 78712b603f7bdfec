"""Test which vectors select_features() names, and what PooledLayers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vitlib
from fixtures.fast_models import pixels, tiny
from fixtures.references import distance
from vitlib.errors import ConfigError
from vitlib.features.selection import Feature, PooledLayers, feature_width, select_features

FAMILIES = ("class token", "beit", "dinov3", "siglip")


def test_all_layers_have_the_pools_that_belong_to_each() -> None:
    config = tiny().config  # three blocks
    features = select_features(config, "all", ("cls", "embed"))
    expected = [(1, "cls"), (2, "cls"), (3, "cls"), (3, "embed")]
    assert list(features) == expected
    assert select_features(config) == ((3, "embed"),)
    assert select_features(config, (2, 1, 2), ("mean",)) == ((1, "mean"), (2, "mean"))
    assert str(features[0]) == "layer 1, cls"


@pytest.mark.parametrize(
    ("family", "layers", "pools", "message"),
    [
        (
            "class token",
            (0,),
            ("cls",),
            "layer 0: expected numbers in 1..3, of which 3 is",
        ),
        ("class token", (4,), ("cls",), "layer 4: expected"),
        ("class token", (True,), ("cls",), "layer True: expected"),
        ("class token", (), ("cls",), "no layer: expected"),
        ("class token", "first", ("cls",), "layers='first': expected 'all', 'last' or numbers"),
        ("class token", "last", ("max",), "pool 'max': expected one of cls, mean"),
        ("class token", "last", (), "no pool: expected one or more"),
        ("class token", "last", ("map",), "this model has no attention pool"),
        ("class token", (1,), ("embed",), "reads the last layer: choose layer 3 too"),
        ("siglip", "last", ("cls+mean",), "this model has no class token"),
    ],
)
def test_select_refuses_what_the_model_has_not(
    family: str, layers: Any, pools: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        select_features(tiny(family).config, layers, pools)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_layers_equal_their_definition(family: str, optimized: bool) -> None:
    """The norm and the mean of each layer, computed from timm's method."""
    model = tiny(family)
    images, config = pixels(model), model.config
    pools = ("mean", "embed", *("cls", "cls+mean") * config.tokens.cls)
    pools += ("map",) * (config.attention_pool is not None)
    features = select_features(config, "all", pools)
    function = PooledLayers(features)
    with torch.no_grad():
        if optimized:
            vectors = vitlib.optimize(model).compute(function, images)
        else:
            vectors = function(model, images)
        norm = config.final_norm == "tokens"
        layers = model.forward_intermediates(images, norm=norm, return_prefix_tokens=True)
        widths = function.widths(config)
        for feature, actual in zip(features, vectors.split(widths, dim=1), strict=True):
            patches, prefix = layers[feature.layer - 1]
            mean = patches.mean(dim=1)
            if feature.pool == "embed":
                expected = model.embed(images)
            elif feature.pool == "map":
                assert model.attn_pool is not None
                expected = model.attn_pool(torch.cat([prefix, patches], dim=1))
            else:
                parts = {"mean": [mean], "cls": [prefix[:, :1].flatten(1)]}
                parts["cls+mean"] = parts["cls"] + parts["mean"]
                after = model.norm if config.final_norm == "pooled" else torch.nn.Identity()
                expected = torch.cat([after(part) for part in parts[feature.pool]], dim=1)
            assert actual.shape == expected.shape == (len(images), feature_width(config, feature))
            assert distance(actual, expected) < 5e-6, feature  # the bound of optimize()


def test_layers_differ() -> None:
    """The test above compares what differs: by layer, by pool and by image."""
    model = tiny()
    features = select_features(model.config, "all", ("cls", "mean"))
    with torch.no_grad():
        vectors = PooledLayers(features)(model, pixels(model))
    parts = vectors.split(PooledLayers(features).widths(model.config), dim=1)
    for i, part in enumerate(parts):
        assert distance(part[0], part[1]) > 1e-2
        assert all(distance(part, other) > 1e-2 for other in parts[:i])


def test_equal_functions_share_what_is_captured_for_them() -> None:
    features = (Feature(1, "cls"), Feature(2, "mean"))
    first, second = PooledLayers(features), PooledLayers((Feature(1, "cls"), Feature(2, "mean")))
    assert first == second
    assert hash(first) == hash(second)
    assert first != PooledLayers(features[:1])
