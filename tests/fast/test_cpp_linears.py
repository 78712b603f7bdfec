"""Test that the C++ linear layers of compiled programs give what float64 gives.

They are compiled here, which takes seconds the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.fast.block import linear_weights
from vitlib.fast.cpp_kernels import operation
from vitlib.fast.cpp_linears import (
    AmxInt8Linear,
    AmxLinear,
    AmxPatches,
    has_amx_linear,
)
from vitlib.fast.cpu import this_machine
from vitlib.fast.int8_linears import Int8Linear
from vitlib.fast.int8_quantization import quantize_weights
from vitlib.fast.linears import LinearWeights, PackedLinear
from vitlib.fast.tiles import pack_tiles, pad_outputs, split_numbers

pytestmark = pytest.mark.skipif(not this_machine().amx, reason="this CPU has no AMX")

# Root mean square difference from float64 over its root mean square: bfloat16 rounds the result,
# and sums of float32 differ in their order.
MAX_ERROR = {torch.bfloat16: 2.5e-3, torch.float32: 1e-6}
# The largest of SHAPES gives 2.5e-7 on AMX's tiles, and 3.4e-7 by oneDNN's float32.
MAX_SPLIT_ERROR = 5e-7
# Rows, inputs, outputs: around the sizes of a tile and a block, and parts of the cache.
SHAPES = [
    (1, 1, 1),
    (5, 8, 7),
    (16, 32, 16),
    (17, 33, 33),
    (31, 64, 32),
    (33, 65, 40),
    (64, 96, 200),
    (197, 48, 144),
    (260, 3072, 100),
    (50, 2048, 600),
    (1300, 512, 64),
    (70, 1077, 70),
]
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    assert has_amx_linear(torch.bfloat16)
    assert has_amx_linear(torch.float32)


def draw(shape: tuple[int, int, int]) -> tuple[nn.Linear, Tensor, Tensor]:
    """Draw a layer of bfloat16 numbers, its input, and another tensor of its result's shape."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows + inputs + outputs)
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
    layer.bias.copy_(torch.randn(outputs, generator=generator))
    x = torch.randn(rows, inputs, generator=generator)
    return layer.bfloat16().float(), x.bfloat16(), torch.randn(rows, outputs, generator=generator)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact))


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == exact.shape
    assert relative_error(actual, exact) <= MAX_ERROR[dtype]
    assert relative_error(actual, exact * 1.02) > MAX_ERROR[dtype]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_gives_what_float64_gives(shape: tuple[int, int, int]) -> None:
    layer, x, other = draw(shape)
    amx = AmxLinear(linear_weights(layer), torch.bfloat16)
    exact = layer.double()(x.double())
    assert_near(amx(x), exact, torch.bfloat16)
    assert_near(amx.add(x, other), exact + other, torch.float32)
    assert torch.equal(amx.add_(x, other), amx.add(x, other))
    narrow = other.bfloat16()
    assert_near(amx.multiply(x, narrow), exact * narrow.double(), torch.bfloat16)
    for activation in ("gelu", "gelu_tanh", "silu"):
        y = amx.activate(x, activation, None)
        assert y.dtype == torch.bfloat16
        # bfloat16 rounds by 1 in 256, and GELU errs by 2e-4.
        assert torch.allclose(y.double(), EXACT[activation](exact), rtol=5e-3, atol=2.5e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_are_exact_to_bfloat16_everywhere(activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -1e4, 1e4, 3e38])])
    x = x.bfloat16()[:, None]
    one = AmxLinear(LinearWeights(torch.ones(1, 1)), torch.bfloat16)
    y, exact = one.activate(x, activation, None).double(), EXACT[activation](x.double())
    assert torch.allclose(y, exact, rtol=4e-3, atol=2.5e-4)
    assert not torch.allclose(y, exact, rtol=1e-3, atol=2.5e-4)
    broken = torch.tensor([[float("nan")], [1.0]], dtype=torch.bfloat16)
    assert one.activate(broken, activation, None).isnan().flatten().tolist() == [True, False]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threads", [1, 3, 4, 7])
@pytest.mark.parametrize("shape", [(33, 64, 200), (300, 64, 64), (40, 3072, 100)], ids=str)
def test_threads_change_no_bit(shape: tuple[int, int, int], threads: int) -> None:
    layer, x, other = draw(shape)
    amx = AmxLinear(linear_weights(layer), torch.bfloat16)
    by_two = amx(x), amx.add(x, other)
    torch.set_num_threads(threads)
    assert torch.equal(amx(x), by_two[0])
    assert torch.equal(amx.add(x, other), by_two[1])


def test_layout_in_memory_changes_no_bit() -> None:
    layer, x, other = draw((33, 65, 40))
    amx = AmxLinear(linear_weights(layer), torch.bfloat16)
    expected = amx.add(x, other)
    columns = x.t().contiguous().t()
    wide = torch.cat([other, other], 1)[:, :40]
    assert torch.equal(amx.add(columns, wide), expected)
    assert torch.equal(amx.add(x[None], other[None]), expected[None])
    assert amx(x[:0]).shape == (0, 40)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_layer_is_as_exact_as_float32(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    layer, _, other = draw(shape)
    # Numbers with all bits of float32, and of sizes that differ by a factor of a million.
    layer.weight.mul_(1 + torch.rand(outputs, inputs) / 3)
    x = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    amx = AmxLinear(linear_weights(layer), torch.float32)
    results = amx(x), amx.add(x, other), amx.multiply(x, other)
    exact = layer.double()(x.double())
    for y, expected in zip(results, (exact, exact + other, exact * other), strict=True):
        assert y.dtype == torch.float32
        assert relative_error(y, expected) <= MAX_SPLIT_ERROR
        by_row = torch.linalg.vector_norm(y - expected, dim=1)
        assert (by_row <= 3 * MAX_SPLIT_ERROR * torch.linalg.vector_norm(expected, dim=1)).all()
    first, second = split_numbers(x, 2)
    two_parts = layer(first.double() + second.double())
    assert rows == 1 or relative_error(two_parts, exact) > MAX_SPLIT_ERROR
    for activation in ("gelu", "gelu_tanh", "silu"):
        y = amx.activate(x, activation, None).double()
        assert torch.allclose(y, EXACT[activation](results[0].double()), rtol=3e-6, atol=2e-7)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_are_exact_to_float32_everywhere(activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.tensor([0.0, -1e4, 1e4, 3e38])])[:, None]
    one = AmxLinear(LinearWeights(torch.ones(1, 1)), torch.float32)
    y, exact = one.activate(x, activation, None).double(), EXACT[activation](x.double())
    assert torch.allclose(y, exact, rtol=3e-7, atol=1.5e-7)
    assert not torch.allclose(y, exact, rtol=1e-8, atol=1e-8)


def test_float32_numbers_are_sums_of_three() -> None:
    values = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    parts = split_numbers(values, 3)
    assert torch.equal(torch.stack(parts).double().sum(0), values.double())
    assert all(part.dtype == torch.bfloat16 for part in parts)


def test_threads_and_layout_change_no_bit_of_float32() -> None:
    for shape in ((33, 64, 200), (300, 1000, 64), (40, 3072, 100)):
        layer, x, other = draw(shape)
        amx, wide = AmxLinear(linear_weights(layer), torch.float32), x.float()
        expected = amx.add(wide, other)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(amx.add(wide, other), expected)
        torch.set_num_threads(1)
        assert torch.equal(amx.add(wide.t().contiguous().t(), other), expected)
        assert amx(wide[:0]).shape == (0, shape[2])


def quantized(shape: tuple[int, int, int]) -> tuple[LinearWeights, Tensor, Tensor, Tensor]:
    """Return a layer in 8 bits, an input, its exact result, and another tensor of its shape."""
    layer, _, other = draw(shape)
    weights = quantize_weights(linear_weights(layer))
    weights.x_scale, weights.x_zero_point = 0.02, 117
    x = torch.randint(0, 256, (shape[0], shape[1]), dtype=torch.uint8)
    exact = (x.double() - 117) * 0.02 @ weights.dequantize().double().t()
    assert weights.bias is not None
    return weights, x, exact + weights.bias, other


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_8_bit_layer_gives_what_float64_gives(shape: tuple[int, int, int]) -> None:
    weights, x, exact, other = quantized(shape)
    amx = AmxInt8Linear(weights)
    assert_near(amx(x), exact, torch.bfloat16)
    assert_near(amx.add(x, other), exact + other, torch.float32)
    next_weights = LinearWeights(
        torch.zeros(1, shape[2], dtype=torch.int8), scale=torch.ones(1), x_scale=0.03,
        x_zero_point=41,
    )  # fmt: skip
    levels = amx.activate(x, "gelu", AmxInt8Linear(next_weights))
    expected = (F.gelu(exact) / 0.03).round().add(41).clamp(0, 255)
    assert levels.dtype == torch.uint8
    difference = (levels.double() - expected).abs()
    assert difference.max() <= 1  # a number between two levels
    assert difference.mean() <= 0.02
    assert (expected + 1 - levels).abs().mean() > 0.02


@pytest.mark.parametrize("shape", [(17, 33, 33), (64, 96, 200)], ids=str)
def test_8_bit_layer_takes_what_int8_linear_takes(shape: tuple[int, int, int]) -> None:
    weights, x, _, other = quantized(shape)
    amx, onednn = AmxInt8Linear(weights), Int8Linear(weights, torch.bfloat16)
    assert relative_error(amx(x), onednn(x).double()) <= MAX_ERROR[torch.bfloat16]
    levels = x.float() - 20.3  # the 0.5 of a rounding is in it; some are below 0
    expected = onednn(levels.clone()).double()
    assert relative_error(amx(levels), expected) <= MAX_ERROR[torch.bfloat16]
    own_units = torch.linspace(-2, 2, x.numel()).view(x.shape)
    expected = onednn.add(own_units.clone(), other).double()
    assert relative_error(amx.add(own_units, other), expected) <= MAX_ERROR[torch.float32]


def test_layer_gives_what_the_packed_layer_gives() -> None:
    layer, x, other = draw((64, 96, 200))
    weights = linear_weights(layer)
    amx, onednn = AmxLinear(weights, torch.bfloat16), PackedLinear(weights, torch.bfloat16)
    assert relative_error(amx(x), onednn(x).double()) <= MAX_ERROR[torch.bfloat16]
    expected = onednn.add(x, other).double()
    assert relative_error(amx.add(x, other), expected) <= MAX_ERROR[torch.bfloat16]
    no_bias = AmxLinear(LinearWeights(weights.weight), torch.bfloat16)
    assert_near(no_bias(x), x.double() @ weights.weight.double().t(), torch.bfloat16)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "shape",
    # Images, channels, height, width, outputs, height and width of a patch.
    [
        (1, 3, 16, 16, 8, 16, 16),
        (2, 3, 35, 50, 40, 16, 16),
        (3, 1, 28, 70, 100, 14, 14),
        (2, 4, 32, 64, 33, 8, 32),
        (1, 3, 9, 5, 3, 3, 2),
        (5, 3, 224, 224, 64, 32, 32),
    ],
    ids=str,
)
def test_patches_are_nearly_those_of_float32(shape: tuple[int, ...]) -> None:
    images, channels, height, width, outputs, p, q = shape
    generator = torch.Generator().manual_seed(sum(shape))
    conv = nn.Conv2d(channels, outputs, (p, q), (p, q)).requires_grad_(False)
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
    pixels = torch.randn(images, channels, height, width, generator=generator)
    weights = linear_weights(conv)
    flat = LinearWeights(weights.weight.flatten(1), weights.bias)
    y, exact = AmxPatches(flat, conv.weight.shape)(pixels), conv.double()(pixels.double())
    assert y.dtype == torch.float32
    assert y.shape == exact.shape
    assert y.flatten(2).transpose(1, 2).is_contiguous()
    # The product of both second numbers is left out, and each is rounded: 2^-18 of a number.
    assert relative_error(y, exact) <= 1e-5
    assert conv.bias is not None
    narrow = F.conv2d(pixels.bfloat16(), conv.weight.bfloat16(), conv.bias.bfloat16(), (p, q))
    assert relative_error(narrow, exact) > 1e-5
    turned = pixels.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(AmxPatches(flat, conv.weight.shape)(turned), y)


def test_patches_are_refused_that_do_not_fit() -> None:
    patches = AmxPatches(LinearWeights(torch.ones(8, 48)), torch.Size((8, 3, 4, 4)))
    project = operation("patches_amx")
    for images in (torch.ones(1, 3, 8, 8).double(), torch.ones(1, 1, 8, 8), torch.ones(3, 8, 8)):
        with pytest.raises(RuntimeError, match=r"fit|patches are taken"):
            project(images, patches.packed, patches.bias, 8, 4, 4)
    values = torch.ones(2, 3, 9, 12), patches.packed, patches.bias, 8, 4, 4
    checker: Any = torch.library.opcheck
    checker(project.default, values, test_utils=("test_schema", "test_faketensor"))


def arguments(**changes: Any) -> list[Any]:
    """Return what the operation takes for 3 rows of 40 inputs and 34 outputs."""
    layer, x, other = draw((3, 40, 34))
    values = {
        "x": x,
        "weight": pack_tiles(layer.weight.bfloat16()),
        "bias": pad_outputs(layer.bias, 34),
        "other": other,
        "outputs": 34,
        "then": "add",
        **changes,
    }
    return list(values.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.ones(3, 70).bfloat16()},
        {"x": torch.ones(3, 40)},
        {"x": torch.ones(3, 0).bfloat16()},
        {"outputs": 70},
        {"outputs": 0},
        {"bias": torch.ones(34)},
        {"bias": torch.ones(64).bfloat16()},
        {"other": None},
        {"other": torch.ones(3, 33)},
        {"other": torch.ones(3, 34).bfloat16()},
        {"then": "mul"},
        {"then": "gelu"},
        {"then": "relu", "other": None},
    ],
    ids=str,
)
def test_operation_refuses_what_does_not_fit(changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"fit|takes no|is not followed"):
        operation("linear_amx")(*arguments(**changes))


def test_operations_are_what_the_compiler_is_told() -> None:
    checks = ("test_schema", "test_faketensor")
    checker: Any = torch.library.opcheck
    checker(operation("linear_amx").default, tuple(arguments()), test_utils=checks)
    plain = tuple(arguments(other=None, then="gelu"))
    layer, wide, other = draw((3, 40, 34))
    amx = AmxLinear(linear_weights(layer), torch.float32)
    for second, then in ((other, "add"), (other, "mul"), (None, "silu")):
        split_values = (wide.float(), amx.packed, amx.bias, second, 34, then)
        checker(operation("linear_split_amx").default, split_values, test_utils=checks)
    for broken in ((wide, "none"), (wide.float()[:, :20], "none"), (wide.float(), "add")):
        with pytest.raises(RuntimeError, match=r"fit|takes no"):
            operation("linear_split_amx")(broken[0], amx.packed, amx.bias, None, 34, broken[1])
    checker(operation("linear_amx").default, plain, test_utils=checks)
    weights, x, _, other = quantized((3, 40, 34))
    int8 = AmxInt8Linear(weights)
    for second, then, factor in ((other, "add", None), (None, "silu", 20.0), (None, "none", None)):
        values = (x, int8.packed, int8.scale, int8.bias, second, 34, then, factor, 3.0)
        checker(operation("linear_int8_amx").default, values, test_utils=checks)
