"""Groups of fields of ViTConfig: the forms that a caller gives them in, and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from vitlib import ViTConfig
from vitlib.checkpoint.layouts.own import upgrade_fields
from vitlib.config import config_to_json
from vitlib.config_parts import Norms, Pooling, Rope, to_part
from vitlib.errors import ConfigError


@pytest.mark.parametrize("value", [None, False])
@pytest.mark.parametrize("kind", [Rope, Norms, Pooling])
def test_to_part_of_nothing_is_none(kind: type, value: object) -> None:
    assert to_part("part", kind, value) is None


def test_to_part_takes_a_group_its_fields_or_true() -> None:
    rope = Rope(theta=10.0, coords="index")
    assert to_part("rope", Rope, rope) is rope
    assert to_part("rope", Rope, {"theta": 10.0, "coords": "index"}) == rope
    assert to_part("rope", Rope, True) == Rope()
    assert to_part("attention_pool", Pooling, {}) == Pooling()


@pytest.mark.parametrize("value", [1, 100.0, "axial", [1], {"theta": 1.0, "base": 2.0}, Norms()])
def test_to_part_rejects_anything_else(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^rope=.*: expected Rope\(axes, .*theta\), or None$"):
        to_part("rope", Rope, value)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Rope, {"theta": 0}, "expected a positive number"),
        (Rope, {"theta": -1.0}, "expected a positive number"),
        (Rope, {"theta": float("inf")}, "expected a positive number"),
        (Rope, {"theta": True}, "expected a positive number"),
        (Rope, {"theta": None}, "expected a positive number"),
        (Rope, {"coords": "index", "offset": "1"}, "and a number"),
        (Rope, {"coords": "pixels"}, "coords='pixels'.: expected one of centers, index"),
        (Rope, {"axes": "yx"}, "axes='yx'.: expected one of ij, xy"),
        (Rope, {"learned": "yes"}, "learned='yes'.: expected one of True, False"),
        (Rope, {"coords": "index", "reference_grid": (0, 4)}, "at least 1"),
        (Rope, {"coords": "index", "reference_grid": (4, 4, 4)}, "one whole number or"),
        (Rope, {"offset": 1.0}, "expected coords='index'"),
        (Rope, {"reference_grid": 4}, "expected coords='index'"),
        (Rope, {"learned": True}, "expected coords='index'"),
        (Rope, {"register_theta": 100.0}, "expected a positive number, with coords='index'"),
        (Rope, {"coords": "index", "register_theta": 0}, "expected a positive number, with"),
        (Rope, {"coords": "index", "learned": True, "register_theta": 1.0}, "learned=False"),
        (Norms, {"kind": "batch"}, "kind='batch'.: expected one of layer, rms"),
        (Norms, {"qk": "both"}, "qk='both'.: expected one of head, width, None"),
        (Norms, {"post": None}, "post=None.: expected one of True, False"),
        (Pooling, {"num_heads": -1}, "Pooling.num_heads=-1: expected a whole number"),
        (Pooling, {"mlp_dim": 1.5}, "Pooling.mlp_dim=1.5: expected a whole number"),
        (Pooling, {"prefix_tokens": "no"}, "prefix_tokens='no'.: expected one of True, False"),
    ],
)
def test_values_are_checked(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        kind(**values)
    assert "\n" not in str(error.value)


def test_reference_grid_is_a_pair() -> None:
    assert Rope(coords="index", reference_grid=16).reference_grid == (16, 16)
    assert Rope(coords="index", reference_grid=[8, 4]).reference_grid == (8, 4)


def test_config_takes_groups_in_every_form() -> None:
    cfg = ViTConfig(rope={"theta": 10.0}, norms={"kind": "rms"}, attention_pool=True, pool="map")
    assert (cfg.rope, cfg.norms) == (Rope(theta=10.0), Norms(kind="rms"))
    assert cfg.attention_pool == Pooling()
    assert ViTConfig(rope=True).rope == Rope()
    assert ViTConfig(rope=False, norms=None).norms == Norms()
    with pytest.raises(ConfigError, match="rope='axial'"):
        ViTConfig(rope="axial")
    with pytest.raises(ConfigError, match="a head width of 6: expected heads of a multiple of 4"):
        ViTConfig(rope=True, embed_dim=12, num_heads=2)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope": Rope(coords="index", offset=1.0, axes="xy", reference_grid=(4, 6))},
        {"norms": Norms(kind="rms", patch=True, qk="head", mlp=True)},
        {"attention_pool": Pooling(num_heads=8, prefix_tokens=False), "pool": "map"},
    ],
)
def test_config_of_its_json_is_equal(fields: dict[str, Any]) -> None:
    cfg = ViTConfig(**fields)
    assert ViTConfig(**upgrade_fields(config_to_json(cfg))) == cfg


def test_upgrade_fields_reads_theta_of_older_files() -> None:
    assert upgrade_fields({"rope_theta": None, "depth": 3}) == {"rope": None, "depth": 3}
    upgraded = upgrade_fields({"rope_theta": 100.0, "image_size": [16, 32]})
    assert upgraded == {"rope": {"theta": 100.0}, "image_size": (16, 32)}
    assert ViTConfig(**upgrade_fields({"rope_theta": 50.0})).rope == Rope(theta=50.0)
