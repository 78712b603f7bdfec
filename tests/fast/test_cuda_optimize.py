"""Test optimize_cuda on the CPU, as far as that goes; tests/test_on_gpu.py needs a GPU."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.fake_gpu import BEIT, FAMILIES, Count, normalise, optimize_on_cpu, small
from fixtures.references import distance
from vitlib import ViT, VitlibError
from vitlib.errors import ConfigError, ImageError
from vitlib.fast import cuda, cuda_modules, micro_batch


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ViT:
    return small(**FAMILIES[request.param])


def test_fp32_equals_the_model_in_every_family(family: ViT) -> None:
    quick = optimize_on_cpu(family)
    for size in ((32, 32), (48, 32), (32, 32)):
        images = torch.randn(3, 3, *size)
        with torch.no_grad():
            for name in ("forward", "forward_features", "embed", "forward_pooler"):
                actual, expected = getattr(quick, name)(images), getattr(family, name)(images)
                assert distance(actual, expected) <= 5e-6, (name, size)
            tokens = quick.forward_features(images)
            assert distance(quick.forward_head(tokens), family(images)) <= 5e-6


def test_uint8_pixels_are_normalised_in_the_patch_projection(family: ViT) -> None:
    levels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        exact, embedded = family(normalise(levels)), family.embed(normalise(levels))
    assert distance(optimize_on_cpu(family).forward_uint8(levels), exact) <= 5e-6
    assert distance(optimize_on_cpu(family).embed_uint8(levels), embedded) <= 5e-6
    assert distance(optimize_on_cpu(family, "bf16").forward_uint8(levels), exact) <= 0.05


def test_16_and_8_bits_are_near_the_model(family: ViT) -> None:
    images = torch.randn(3, 3, 32, 32)
    for precision, bound in (("bf16", 0.05), ("fp16", 0.01), ("fp8", 0.25)):
        quick = optimize_on_cpu(family, precision)
        with torch.no_grad():
            for name in ("forward", "forward_features"):
                actual, expected = getattr(quick, name)(images), getattr(family, name)(images)
                assert actual.dtype == expected.dtype
                assert 1e-5 < distance(actual, expected) <= bound, (precision, name)


def linears(block: nn.Module) -> list[Any]:
    return [block.qkv, block.out, block.up, block.down]


def test_dtypes_of_weights_and_stream() -> None:
    model = small()
    images = torch.randn(1, 3, 32, 32)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        trunk = optimize_on_cpu(model, precision).trunk
        block = trunk.blocks[0]
        assert {linear.packed.dtype for linear in linears(block)} == {dtype}
        assert block(torch.randn(1, 17, 64)).dtype == dtype
        assert trunk.head.packed.dtype == trunk.norm.weight.dtype == torch.float32
    block = optimize_on_cpu(model, "fp16").trunk.blocks[0]
    assert {linear.packed.dtype for linear in linears(block)} == {torch.float16}
    # Its residual stream may pass 65,504, the largest number of float16.
    assert block(torch.full((1, 17, 64), 1e6)).dtype == torch.float32
    assert block(torch.full((1, 17, 64), 1e6)).isfinite().all()
    block = optimize_on_cpu(model, "fp8").trunk.blocks[0]
    assert {linear.packed.dtype for linear in linears(block)} == {torch.float8_e4m3fn}
    odd = optimize_on_cpu(small(mlp_dim=40), "fp8").trunk.blocks[0]
    assert odd.qkv.packed.dtype == torch.float8_e4m3fn
    assert odd.up.packed.dtype == odd.down.packed.dtype == torch.bfloat16
    half = optimize_on_cpu(copy.deepcopy(model).bfloat16(), "fp32")
    assert half(images).dtype == torch.bfloat16


def test_last_block_computes_only_the_tokens_that_are_read() -> None:
    quick = optimize_on_cpu(small())
    images = torch.randn(1, 3, 32, 32)
    for method, tokens in (("forward", [17, 17, 1]), ("forward_features", [17, 17, 17])):
        with Count() as count:
            getattr(quick, method)(images)
        sums = [args[0] for name, args in count.calls if name == "addmm_"]
        assert [len(rows) for rows in sums] == tokens


def test_split_batch() -> None:
    assert micro_batch.split_batch(1, 256) == (1,)
    assert micro_batch.split_batch(3, 256) == (4,)
    assert micro_batch.split_batch(33, 256) == (32, 1)
    assert micro_batch.split_batch(60, 256) == (64,)
    assert micro_batch.split_batch(128, 256) == (128,)
    assert micro_batch.split_batch(512, 256) == (256, 256)
    assert micro_batch.split_batch(257, 256) == (256, 1)
    assert micro_batch.split_batch(0, 256) == (1,)
    assert micro_batch.split_batch(12, 5) == (5, 5, 2)
    assert micro_batch.split_batch(2, 1) == (1, 1)
    for largest in (1, 5, 100, 128, 256, 1280):
        allowed = {*micro_batch.GRAPH_SIZES, micro_batch.TILE, largest}
        for count in range(1, 400):
            sizes = micro_batch.split_batch(count, largest)
            assert set(sizes) <= allowed
            assert max(sizes) <= largest
            assert sum(sizes) - count < sizes[-1]
            assert len(sizes) <= count // largest + 8


def test_micro_batch_fits_the_cache() -> None:
    """Multiples of 128 images fill the tiles of a product; images of many tokens are fewer."""
    assert micro_batch.micro_batch_size(197) == 128
    assert micro_batch.micro_batch_size(50) == 640
    assert micro_batch.micro_batch_size(1370) == 16
    assert micro_batch.micro_batch_size(100_000) == 1
    for tokens in (1, 17, 50, 197, 257, 577, 1370, 5000, 100_000):
        size = micro_batch.micro_batch_size(tokens)
        assert size == 1 or size * tokens <= micro_batch.MAX_TOKENS
        assert size % micro_batch.TILE == 0 or size in micro_batch.GRAPH_SIZES


def test_outputs_of_split_batches_are_complete_and_in_order() -> None:
    model = small()
    images = torch.randn(21, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
    for batch_size in (None, 1, 3, 5, 16):
        quick = optimize_on_cpu(model, batch_size=batch_size)
        for count in (21, 0, 1, 2, 7):
            outputs = quick(images[:count])
            assert outputs.shape == (count, 5)
            assert not count or distance(outputs, exact[:count]) <= 5e-6
    channels_last = images.to(memory_format=torch.channels_last)
    assert distance(optimize_on_cpu(model)(channels_last), exact) <= 5e-6
    assert distance(optimize_on_cpu(model)(images.double()), exact) <= 5e-6


def test_optimize_cuda_only_reads_the_model() -> None:
    model = small().train().requires_grad_()
    before = copy.deepcopy(model.state_dict())
    quick = optimize_on_cpu(model)
    images = torch.randn(2, 3, 32, 32)
    first = quick(images)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in quick.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(quick(images), first)


class Doubled(nn.Module):
    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of, self.batches = of, []

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        self.batches.append(len(x))
        return self.of(x, num_queries, attn_pos) * 2


def test_users_modules_are_not_optimized() -> None:
    images = torch.randn(70, 3, 32, 32)
    for precision, bound in (("fp32", 5e-6), ("bf16", 0.05), ("fp8", 0.25)):
        model = small()
        model.blocks[1].attn = Doubled(model.blocks[1].attn)
        quick = optimize_on_cpu(model, precision, batch_size=4)
        quick.runner.captures = quick.runner.compiles = True
        assert quick.unoptimized_modules == ("blocks.1.attn",)
        assert quick.trunk.blocks[1].attn is model.blocks[1].attn
        assert isinstance(quick.trunk.blocks[0], cuda_modules.CudaBlock)
        with torch.no_grad():
            exact = model(images)
            model.blocks[1].attn.batches.clear()
            assert distance(quick(images), exact) <= bound
        assert model.blocks[1].attn.batches == [70]  # one call for the batch, as it came
        levels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        assert distance(quick.forward_uint8(levels), model(normalise(levels))) <= bound
        assert not quick.runner.functions_by_size  # it is neither captured nor compiled


def test_hook_still_runs() -> None:
    model = small(**BEIT)
    model.blocks[0].mlp.register_forward_hook(lambda _, __, outputs: outputs * 3)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert distance(optimize_on_cpu(model)(images), model(images)) <= 5e-6
        # Biases of its scores are in the dtype of a block that is not replaced.
        for precision, bound in (("bf16", 0.05), ("fp16", 0.01)):
            assert distance(optimize_on_cpu(model, precision)(images), model(images)) <= bound
        half = copy.deepcopy(model).bfloat16()
        assert torch.equal(optimize_on_cpu(half, "bf16")(images), half(images))


def test_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    quick = optimize_on_cpu(model)
    images = torch.randn(2, 3, 32, 32)

    def error(call: Callable[[], object], kind: type[VitlibError], *text: str) -> None:
        with pytest.raises(kind) as caught:
            call()
        assert all(re.search(words, str(caught.value)) for words in text), caught.value

    error(lambda: optimize_on_cpu(model, "int8"), ConfigError, "int8", "bf16", "fp8")
    error(lambda: quick(images.requires_grad_()), ConfigError, "no gradients")
    images = images.detach()
    error(lambda: quick(images[0]), ImageError, "expected")
    error(lambda: quick(images[:, :, :7]), ImageError, "patch")
    error(lambda: quick(images.to(torch.uint8)), ImageError, "normalise")
    error(lambda: quick.forward_uint8(images), ImageError, "uint8")
    error(lambda: quick.forward_uint8(images[:, :2].to(torch.uint8)), ImageError, "3, height")
    error(lambda: quick.train(), ConfigError, "inference only")
    error(lambda: quick.save("out"), ConfigError, "vitlib.save")

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(quick.runner, "_run", full)
    error(lambda: quick(images), ImageError, "2 images of 3x32x32", "batch_size=")
    quick.uint8_trunk = None
    error(lambda: quick.forward_uint8(images.to(torch.uint8)), ConfigError, "image_processor")
    if not torch.cuda.is_available():
        gpu = torch.device("cuda")
        error(lambda: cuda.optimize_cuda(model, "bf16", None, gpu), ConfigError, "no GPU")


def fake_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")


def test_precision_that_a_gpu_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_capability(monkeypatch, (8, 0))
    gpu = torch.device("cuda", 0)
    assert cuda.cuda_plan("bf16", gpu).attention_dtype == torch.bfloat16
    assert cuda.cuda_plan("fp32", gpu).attention_dtype == torch.float32
    with pytest.raises(ConfigError, match=r"8\.9 or more, and Some GPU has 8\.0: use bf16"):
        cuda.cuda_plan("fp8", gpu)
    fake_capability(monkeypatch, (7, 5))
    assert cuda.cuda_plan("bf16", gpu).attention_dtype == torch.float16
    assert "bf16 is not used: float16 serves it" in caplog.text
    fake_capability(monkeypatch, (9, 0))
    monkeypatch.setattr(cuda, "has_fp8", lambda _: False)
    with pytest.raises(ConfigError, match=r"no fp8 product .*: use bf16"):
        cuda.cuda_plan("fp8", gpu)
    monkeypatch.setattr(cuda, "has_fp8", lambda _: True)
    assert cuda.cuda_plan("fp8", gpu).attention_dtype == torch.bfloat16
