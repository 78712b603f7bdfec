"""Coordinates and angles of rotary positions, by numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import vitlib
from vitlib import ViTConfig
from vitlib.config_parts import Rope
from vitlib.errors import ConfigError
from vitlib.positions import (
    LearnedRotaryEmbedding,
    RotaryEmbedding,
    apply_rope,
    rotary_angles,
    rotary_coordinates,
    rotary_table,
)

CPU = torch.device("cpu")
INDEX = {"coords": "index"}


def build_config(**rope: object) -> ViTConfig:
    return ViTConfig(
        image_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, rope=Rope(**rope)
    )


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        # Two rows of three patches: centres are at -1/2, 1/2 down and at -2/3, 0, 2/3 across.
        ({}, [(-1 / 2, -2 / 3), (-1 / 2, 0), (-1 / 2, 2 / 3), (1 / 2, -2 / 3), (1 / 2, 0)]),
        ({"axes": "xy"}, [(-2 / 3, -1 / 2), (0, -1 / 2), (2 / 3, -1 / 2), (-2 / 3, 1 / 2)]),
        (INDEX, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
        (INDEX | {"axes": "xy"}, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]),
        (INDEX | {"offset": 1.0}, [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]),
        # A number is divided by its side, 2 or 3, and multiplied with that of the reference.
        (
            INDEX | {"reference_grid": (4, 6)},
            [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)],
        ),
        # The offset is added before.
        (
            INDEX | {"reference_grid": (4, 6), "offset": 1.0, "axes": "xy"},
            [(2, 2), (4, 2), (6, 2), (2, 4), (4, 4), (6, 4)],
        ),
        (INDEX | {"reference_grid": 6}, [(0, 0), (0, 2), (0, 4), (3, 0), (3, 2), (3, 4)]),
    ],
)
def test_coordinates_of_patches(
    rope: dict[str, object], expected: list[tuple[float, float]]
) -> None:
    coordinates = rotary_coordinates((2, 3), Rope(**rope), CPU)
    assert (coordinates.shape, coordinates.dtype) == ((6, 2), torch.float32)
    torch.testing.assert_close(coordinates[: len(expected)], torch.tensor(expected) * 1.0)


def test_angles_of_numbers_are_coordinates_times_frequencies() -> None:
    """A head of 8 channels has 2 frequencies an axis, 1 and theta^(-1/2)."""
    rope = Rope(coords="index", theta=100.0, offset=2.0)
    angles = rotary_angles((2, 3), 8, rope, CPU)
    assert angles.shape == (6, 4)
    torch.testing.assert_close(angles[0], torch.tensor([2.0, 0.2, 2.0, 0.2]))
    torch.testing.assert_close(angles[5], torch.tensor([3.0, 0.3, 4.0, 0.4]))
    across_first = rotary_angles((2, 3), 8, Rope(coords="index", offset=2.0, axes="xy"), CPU)
    torch.testing.assert_close(across_first[5], torch.tensor([4.0, 0.4, 3.0, 0.3]))


def test_angles_of_centres_are_whole_turns() -> None:
    """The last of three columns is at 2/3: an angle of 2 pi * 2/3 at the period 1."""
    angles = rotary_angles((2, 3), 8, Rope(theta=100.0), CPU)
    turn = 2 * math.pi
    torch.testing.assert_close(
        angles[2], torch.tensor([-turn / 2, -turn / 20, turn * 2 / 3, turn * 2 / 30])
    )


def test_other_theta_gives_other_periods() -> None:
    angles = rotary_angles((1, 2), 16, Rope(coords="index", theta=10000.0), CPU)
    torch.testing.assert_close(angles[1, 4:], torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert not angles[1, :4].any()


def test_table_turns_first_half_with_second() -> None:
    angles = torch.tensor([[0.0, math.pi / 2]])
    cos, sin = rotary_table(angles)
    torch.testing.assert_close(cos, torch.tensor([[1.0, 0.0, 1.0, 0.0]]), atol=1e-7, rtol=0)
    torch.testing.assert_close(sin, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    x = torch.tensor([[5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0]]).view(1, 1, 2, 4)
    # The first token has no position. Of the second, channels 1 and 3 turn by a right angle.
    rotated = apply_rope(x, 1, rotary_table(angles))
    torch.testing.assert_close(rotated[0, 0, 0], x[0, 0, 0])
    torch.testing.assert_close(rotated[0, 0, 1], torch.tensor([1.0, -4.0, 3.0, 2.0]))


def test_learned_frequencies_are_of_each_block_and_head() -> None:
    module = LearnedRotaryEmbedding(build_config(**INDEX, learned=True))
    assert module.freqs.shape == (2, 3, 2, 4)
    with torch.no_grad():
        module.freqs.zero_()
        module.freqs[0, 1, 0] = torch.tensor([1.0, 2.0, 0.0, 0.0])  # block 1, head 0, first axis
        module.freqs[1, 1, 0] = torch.tensor([0.0, 3.0, 0.0, 4.0])  # and the second
    tables = list(module.per_block((2, 2), CPU, 3))
    assert [table.shape for table in tables] == [(2, 2, 4, 8)] * 3
    still = rotary_table(torch.zeros(2, 4, 4))
    assert torch.equal(tables[0], still)
    assert torch.equal(tables[2], still)
    # The last patch is at (1, 1), the second at (0, 1).
    angles = torch.tensor([[0.0, 3.0, 0.0, 4.0], [1.0, 5.0, 0.0, 4.0]])
    torch.testing.assert_close(tables[1][:, 0, [1, 3]], rotary_table(angles))
    assert torch.equal(tables[1][:, 1], still[:, 1])


def test_learned_frequencies_start_as_two_right_angles() -> None:
    torch.manual_seed(0)
    freqs = LearnedRotaryEmbedding(build_config(**INDEX, learned=True, theta=10.0)).freqs
    lengths = freqs.square().sum(0).sqrt().detach()
    expected = torch.tensor([1.0, 10**-0.5]).repeat(2).expand(3, 2, 4)
    torch.testing.assert_close(lengths, expected)
    first, second = freqs.detach()[..., :2], freqs.detach()[..., 2:]
    torch.testing.assert_close((first * second).sum(0), torch.zeros(3, 2, 2), atol=1e-6, rtol=0)


def test_learned_frequencies_of_other_depth_are_refused() -> None:
    module = LearnedRotaryEmbedding(build_config(**INDEX, learned=True))
    with pytest.raises(ConfigError, match=r"2 blocks and rotary frequencies of 3: give model"):
        module.per_block((2, 2), CPU, 2)


def test_angles_of_class_token_come_first() -> None:
    module = RotaryEmbedding(build_config(class_token=True))
    assert module.cls_angles is not None
    with torch.no_grad():
        module.cls_angles.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    [table] = module.per_block((2, 2), CPU, 1)
    assert table.shape == (2, 5, 8)
    torch.testing.assert_close(table[:, 0], rotary_table(torch.tensor([0.1, 0.2, 0.3, 0.4])))
    [patches] = RotaryEmbedding(build_config()).per_block((2, 2), CPU, 1)
    torch.testing.assert_close(table[:, 1:], patches)


def test_registers_stand_on_a_grid_of_their_own() -> None:
    rope = {**INDEX, "register_theta": 9.0, "offset": 1.0}
    cfg = build_config(**rope)
    module = RotaryEmbedding(replace(cfg, num_registers=4))
    [table] = module.per_block((2, 3), CPU, 1)
    assert table.shape == (2, 4 + 6, 8)
    # Frequencies 1 and 1/3 of each axis; the registers are at (0, 0), (0, 1), (1, 0) and (1, 1).
    third = 1 / 3
    angles = [[0, 0, 0, 0], [0, 0, 1, third], [1, third, 0, 0], [1, third, 1, third]]
    torch.testing.assert_close(table[:, :4], rotary_table(torch.tensor(angles)))
    [patches] = RotaryEmbedding(build_config(**rope | {"register_theta": None})).per_block(
        (2, 3), CPU, 1
    )
    assert torch.equal(table[:, 4:], patches)


def test_registers_with_angles_are_a_square_number() -> None:
    cfg = build_config(**INDEX, register_theta=9.0)
    with pytest.raises(ConfigError, match=r"num_registers=3 .*: expected a square number, as 4"):
        replace(cfg, num_registers=3)
    assert replace(cfg, num_registers=0).num_prefix_tokens == 1


def test_every_block_of_fixed_angles_has_one_table() -> None:
    model = vitlib.ViT(build_config(**INDEX))
    positions = list(model.attn_positions(torch.zeros(1, 3, 8, 8)))
    assert all(table is positions[0] for table in positions)
