"""Test batches of optimize()'s models: splitting, sizes, memory formats, dtypes and threads."""

from __future__ import annotations

import copy
import sys
import threading
from types import FrameType

import pytest
import torch

import vitlib
from fixtures.fast_models import (
    TOLERANCE,
    all_outputs,
    max_distance,
    pixels,
    tiny,
)
from fixtures.references import distance, rms_error


@pytest.mark.parametrize("name", ["class token", "siglip", "dinov3", "beit"])
def test_batch_size_splits_a_batch(name: str) -> None:
    model = tiny(name)
    fast = vitlib.optimize(model, batch_size=2)
    sizes: list[int] = []
    fast.trunk.patch_embed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    images = pixels(model, 5)
    fast(images)
    assert sizes == [2, 2, 1]
    assert max_distance(fast, model, images) <= TOLERANCE


def test_batch_of_many_tokens_is_split() -> None:
    """Without batch_size, a batch is split so that each part stays in the caches."""
    model = tiny(image_size=128)  # 257 tokens an image
    fast = vitlib.optimize(model)
    sizes: list[int] = []
    fast.trunk.patch_embed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    images = pixels(model, 13)
    fast(images)
    assert sum(sizes) == 13
    assert 1 < len(sizes) < 13
    assert max_distance(fast, model, images) <= TOLERANCE


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_do_not_depend_on_batch_mates(precision: str) -> None:
    model = tiny()
    fast = vitlib.optimize(model, precision)
    images = pixels(model, 4)
    together = fast(images)
    assert torch.equal(together, fast(images))
    assert torch.equal(together, vitlib.optimize(model, precision)(images))
    alone = torch.cat([fast(image[None]) for image in images])
    # In bf16 one unit in the last place of a product is 4e-3.
    assert distance(alone, together) <= (TOLERANCE if precision == "fp32" else 2e-2)
    images[1] = torch.nan
    others = fast(images)
    assert bool(others[1].isnan().all())
    assert torch.equal(others[[0, 2, 3]], together[[0, 2, 3]])


@pytest.mark.parametrize("name", ["class token", "dinov3 swiglu", "siglip", "beit", "clip"])
def test_empty_batch_gives_the_models_shapes(name: str) -> None:
    model = tiny(name)
    images = pixels(model, 0)
    actual, expected = all_outputs(vitlib.optimize(model), images), all_outputs(model, images)
    assert {k: (v.shape, v.dtype) for k, v in actual.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }


def test_memory_format_and_float_dtype_change_nothing() -> None:
    model = tiny()
    fast = vitlib.optimize(model)
    images = pixels(model)
    expected = fast(images)
    assert torch.equal(fast(images.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(fast(images.flip(3).contiguous().flip(3)), expected)
    assert torch.equal(fast(images.double()), expected)
    same = images[:1].expand(3, -1, -1, -1)
    assert torch.equal(fast(same), fast(same.contiguous()))
    saved = images.clone()
    fast(images)
    assert torch.equal(images, saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["class token", "dinov3 swiglu", "beit", "siglip", "clip"])
def test_outputs_have_the_dtype_of_the_weights(name: str, dtype: torch.dtype) -> None:
    """Their error is at most the model's: the weights are the same, with fewer roundings."""
    model = tiny(name).to(dtype)
    images = pixels(model)
    exact_outputs = all_outputs(copy.deepcopy(model).double(), images.double())
    actual, expected = (
        all_outputs(vitlib.optimize(model), images),
        all_outputs(model, images.to(dtype)),
    )
    for key, exact in exact_outputs.items():
        assert actual[key].dtype == expected[key].dtype == dtype
        if dtype != torch.float64:
            assert rms_error(actual[key], exact) <= rms_error(expected[key], exact)


def test_four_threads_with_different_grids_get_the_same_bits() -> None:
    model = tiny("registers")
    sizes = [(32, 32), (16, 64), (64, 16), (40, 24)]
    images = [pixels(model, 2, size) for size in sizes]
    first = vitlib.optimize(model)
    expected = [first(each) for each in images]
    fast = vitlib.optimize(model)  # has seen no grid yet
    start, equal, failed = threading.Barrier(4), [], []

    def compare(first_grid: int) -> None:
        try:
            start.wait()
            for turn in range(8):
                index = (first_grid + turn) % 4
                equal.append(torch.equal(fast(images[index]), expected[index]))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=compare, args=(first_grid,)) for first_grid in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert equal == [True] * 32


@pytest.mark.parametrize(
    "name",
    [
        "class token",
        "dinov3",
        "beit",
    ],
)
def test_grid_caches_survive_calls_with_another_grid(name: str) -> None:
    """A call with another grid at each line of the cache stands for another thread."""
    model = tiny(name, pooler_dim=0)
    fast = vitlib.optimize(model)
    high, wide = pixels(model, 1, (64, 16)), pixels(model, 1, (16, 64))  # as many tokens
    expected = fast(high)
    interrupted_lines = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal interrupted_lines
        if frame.f_code.co_filename != vitlib.fast.embeddings.__file__:
            return None
        if event == "line":
            interrupted_lines += 1
            sys.settrace(None)
            fast(wide)
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        actual = fast(high)
    finally:
        sys.settrace(before)
    assert interrupted_lines > 3
    assert torch.equal(actual, expected)
