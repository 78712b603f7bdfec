"""What a GPU runs, on the CPU as far as it goes; the rest is marked cuda."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import distance, randomise
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

import vitlib
from vitlib import ImageProcessor, ViT, ViTConfig, VitlibError
from vitlib.errors import ConfigError, ImageError
from vitlib.fast import cuda, cuda_parts, fp8, passes

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = ViTConfig(
    image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=5, pooler_dim=20
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BEIT: dict[str, Any] = {
    "absolute_position": False,
    "relative_position": "block",
    "layer_scale": 0.1,
    "key_bias": False,
    "pool": "mean",
    "final_norm": "pooled",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {},
    "pooler": {"pool": "pooler"},
    "quick gelu, pre norm": {
        "activation": "quick_gelu",
        "pre_norm": True,
        "patch_bias": False,
        "final_norm": "pooled",
        "projection_dim": 20,
    },
    "registers": {"num_registers": 3, "pool": "cls+mean", "activation": "swiglu"},
    "distilled": {"dist_token": True, "dist_head": True, "qkv_bias": False},
    "rotary": {"absolute_position": False, "rope_theta": 100.0, "num_registers": 3},
    "relative": BEIT,
    "relative shared": {**BEIT, "relative_position": "shared", "relative_resize": "geometric"},
    "map": {"class_token": False, "pool": "map", "attention_pool": True},
    "no class rows": {"class_position": False, "num_classes": 0},
}


def built(changes: dict[str, Any], config: ViTConfig = SMALL) -> ViT:
    model = ViT(replace(config, **changes))
    model.image_processor = ImageProcessor(size=(32, 32), image_mean=MEAN, image_std=STD)
    return randomise(model).requires_grad_(False)


def fast(model: ViT, precision: Any = "fp32", batch_size: int | None = None) -> cuda.CudaViT:
    found = cuda.optimize_cuda(model, precision, batch_size, CPU)
    assert isinstance(found, cuda.CudaViT)
    return found


def pixels_of(levels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (levels / 255 - mean) / std


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ViT:
    return built(FAMILIES[request.param])


def test_fp32_gives_the_numbers_of_every_family(family: ViT) -> None:
    quick = fast(family)
    for size in ((32, 32), (48, 32), (32, 32)):
        images = torch.randn(3, 3, *size)
        with torch.no_grad():
            for name in ("forward", "forward_features", "embed", "forward_pooler"):
                ours, theirs = getattr(quick, name)(images), getattr(family, name)(images)
                assert distance(ours, theirs) <= 5e-6, (name, size)
            tokens = quick.forward_features(images)
            assert distance(quick.forward_head(tokens), family(images)) <= 5e-6


def test_levels_are_normalised_in_the_patch_projection(family: ViT) -> None:
    levels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        exact, embedded = family(pixels_of(levels)), family.embed(pixels_of(levels))
    assert distance(fast(family).forward_levels(levels), exact) <= 5e-6
    assert distance(fast(family).embed_levels(levels), embedded) <= 5e-6
    assert distance(fast(family, "bf16").forward_levels(levels), exact) <= 0.05


def test_bf16_and_fp8_are_near_the_model(family: ViT) -> None:
    images = torch.randn(3, 3, 32, 32)
    for precision, bound in (("bf16", 0.05), ("fp8", 0.25)):
        quick = fast(family, precision)
        with torch.no_grad():
            for name in ("forward", "forward_features"):
                ours, theirs = getattr(quick, name)(images), getattr(family, name)(images)
                assert ours.dtype == theirs.dtype
                assert 1e-5 < distance(ours, theirs) <= bound, (precision, name)


def linears(block: nn.Module) -> list[Any]:
    return [block.qkv, block.out, block.up, block.down]


def test_what_is_held_in_which_dtype() -> None:
    model = built({})
    images = torch.randn(1, 3, 32, 32)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        trunk = fast(model, precision).trunk
        block = trunk.blocks[0]
        assert {linear.held.dtype for linear in linears(block)} == {dtype}
        assert block(torch.randn(1, 17, 48)).dtype == dtype
        assert trunk.head.held.dtype == trunk.norm.weight.dtype == torch.float32
    block = fast(model, "fp8").trunk.blocks[0]
    assert {linear.held.dtype for linear in linears(block)} == {torch.float8_e4m3fn}
    odd = fast(built({"mlp_dim": 40}), "fp8").trunk.blocks[0]
    assert odd.qkv.held.dtype == torch.float8_e4m3fn
    assert odd.up.held.dtype == odd.down.held.dtype == torch.bfloat16
    half = fast(copy.deepcopy(model).bfloat16(), "fp32")
    assert half(images).dtype == torch.bfloat16


def test_the_last_block_computes_what_is_read() -> None:
    quick = fast(built({}))
    seen = []
    block = quick.trunk.blocks[-1]
    block.down.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    quick(torch.randn(1, 3, 32, 32))
    quick.forward_features(torch.randn(1, 3, 32, 32))
    assert seen == [1, 17]


def test_plan() -> None:
    assert passes.plan(1, 256) == (1,)
    assert passes.plan(3, 256) == (4,)
    assert passes.plan(33, 256) == (32, 1)
    assert passes.plan(60, 256) == (64,)
    assert passes.plan(128, 256) == (128,)
    assert passes.plan(512, 256) == (256, 256)
    assert passes.plan(257, 256) == (256, 1)
    assert passes.plan(0, 256) == (1,)
    assert passes.plan(12, 5) == (5, 5, 2)
    assert passes.plan(2, 1) == (1, 1)
    for largest in (1, 5, 100, 128, 256, 1280):
        known = {*passes.BUCKETS, passes.TILE, largest}
        for count in range(1, 400):
            sizes = passes.plan(count, largest)
            assert set(sizes) <= known
            assert max(sizes) <= largest
            assert sum(sizes) - count < sizes[-1]
            assert len(sizes) <= count // largest + 8


def test_passes_are_multiples_of_128_images() -> None:
    assert passes.pass_size(197) == 256
    assert passes.pass_size(50) == 1280
    assert passes.pass_size(100_000) == 128


def test_every_batch_comes_whole_and_in_order() -> None:
    model = built({})
    images = torch.randn(21, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
    for batch_size in (None, 1, 3, 5, 16):
        quick = fast(model, batch_size=batch_size)
        for count in (21, 0, 1, 2, 7):
            given = quick(images[:count])
            assert given.shape == (count, 5)
            assert not count or distance(given, exact[:count]) <= 5e-6
    channels_last = images.to(memory_format=torch.channels_last)
    assert distance(fast(model)(channels_last), exact) <= 5e-6
    assert distance(fast(model)(images.double()), exact) <= 5e-6


def test_backends() -> None:
    first = {
        (torch.float32, 197, 197, False): SDPBackend.EFFICIENT_ATTENTION,
        (torch.bfloat16, 196, 196, True): SDPBackend.EFFICIENT_ATTENTION,
        (torch.bfloat16, 197, 197, False): SDPBackend.FLASH_ATTENTION,
        (torch.bfloat16, 261, 261, False): SDPBackend.FLASH_ATTENTION,
        (torch.bfloat16, 1370, 1370, False): SDPBackend.CUDNN_ATTENTION,
        (torch.bfloat16, 1369, 1369, False): SDPBackend.FLASH_ATTENTION,
        (torch.bfloat16, 1, 1370, False): SDPBackend.FLASH_ATTENTION,
    }
    for shape, backend in first.items():
        order = cuda_parts.backends(*shape)
        assert order[0] == backend, shape
        assert order[-1] == SDPBackend.MATH


def test_a_bias_is_aligned() -> None:
    bias = torch.randn(1, 4, 17, 17)
    found = cuda_parts.aligned(bias)
    assert torch.equal(found, bias)
    assert all(stride % 8 == 0 for stride in found.stride()[:-1])
    assert found.stride(-1) == 1


def test_one_function_without_a_graph_break(family: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_parts, "ON", ("cuda", "cpu"))  # with attention pinned as on a GPU
    quick = fast(family, "bf16")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    on_levels, on_pixels = (
        cuda.called(cuda.at_grid(trunk, (4, 4), CPU), method, torch.bfloat16)
        for trunk, method in ((quick.on_levels, "forward"), (quick.trunk, "forward_features"))
    )
    with torch.no_grad():
        explained = torch._dynamo.explain(on_levels)(images)
        assert explained.graph_break_count == 0, explained.break_reasons
        assert explained.graph_count == 1
        whole = torch.compile(on_pixels, fullgraph=True, dynamic=False, backend="eager")
        assert torch.equal(whole(pixels_of(images)), on_pixels(pixels_of(images)))
    torch._dynamo.reset()


def test_fp8_has_no_graph_break() -> None:
    trunk = cuda.at_grid(fast(built({}), "fp8").trunk, (4, 4), CPU)
    function = cuda.called(trunk, "forward", torch.bfloat16)
    with torch.no_grad():
        explained = torch._dynamo.explain(function)(torch.randn(2, 3, 32, 32))
    assert explained.graph_break_count == 0, explained.break_reasons
    torch._dynamo.reset()


class Graph:
    """A graph as CUDA's: it computes where it was captured, into memory that it overwrites."""

    def __init__(self, function: Callable[[Tensor], Tensor], pixels: Tensor) -> None:
        self.function, self.pixels, self.replays = function, pixels, 0
        self.given = function(pixels)

    def replay(self) -> None:
        self.replays += 1
        self.given.copy_(self.function(self.pixels))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    found: list[Graph] = []

    def capture(function: Callable[[Tensor], Tensor], pixels: Tensor, _: Any) -> Any:
        found.append(Graph(function, pixels))
        return found[-1].replay, found[-1].given

    monkeypatch.setattr(passes, "capture", capture)
    return found


def test_small_batches_are_captured_once_a_size(graphs: list[Graph]) -> None:
    model = built({})
    quick = fast(model)
    quick.runner.captures = True
    images = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
    given = [quick(images[:count]) for count in (3, 4, 3, 4, 3)]  # all four wide
    assert [graph.replays for graph in graphs] == [4]
    for answer in given:  # none was overwritten by those after it
        assert distance(answer, exact[: len(answer)]) <= 5e-6
        assert answer.untyped_storage().data_ptr() != graphs[0].given.untyped_storage().data_ptr()
    quick(images[:1])
    quick.embed(images[:4])
    quick(torch.randn(4, 3, 48, 32))
    quick.forward_levels(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    assert len(graphs) == 1  # each is a graph of its own, and came once
    quick.embed(images[:4])
    assert len(graphs) == 2
    assert distance(quick(images), exact) <= 5e-6


def test_too_many_tokens_are_not_captured(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "GRAPH_TOKENS", 4 * 17)
    quick = fast(built({}))
    quick.runner.captures = True
    for count in (4, 4, 8, 8):
        quick(torch.randn(count, 3, 32, 32))
    assert [len(graph.pixels) for graph in graphs] == [4]


def test_what_is_held_is_bounded(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "REMEMBERED", 2)
    quick = fast(built({}))
    quick.runner.captures = True
    for side in (32, 40, 48, 32, 32):
        quick(torch.randn(1, 3, side, 32))
    assert len(quick.runner.ways) == len(quick.runner.functions) == 2
    assert len(graphs) == 1


def test_without_graphs_it_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(passes, "capture", fails)
    model, images = built({}), torch.randn(2, 3, 32, 32)
    quick = fast(model)
    quick.runner.captures = True
    with torch.no_grad():
        exact = model(images)
    for _ in range(3):
        assert distance(quick(images), exact) <= 5e-6
    told = [record.getMessage() for record in caplog.records]
    assert told == ["CUDA graphs are not used: operation not permitted when stream is capturing"]


def test_large_passes_are_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = built({"depth": 1})
    images = torch.randn(129, 3, 32, 32)
    asked: list[tuple[bool, bool]] = []

    def compiler(function: Any, *, fullgraph: bool, dynamic: bool) -> Any:
        asked.append((fullgraph, dynamic))
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    quick = fast(model, batch_size=128)
    quick(images)
    assert asked == []  # float32 is not, and a CPU has a way of its own
    quick.runner = passes.Runner(CPU, torch.float32, compiles=True)
    for _ in range(2):
        assert distance(quick(images), model(images)) <= 5e-6
    assert asked == [(True, False)]

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch, "compile", broken)
    quick.runner = passes.Runner(CPU, torch.float32, compiles=True)
    with caplog.at_level(logging.WARNING, logger="vitlib"):
        for name in ("forward", "embed"):
            assert distance(getattr(quick, name)(images), getattr(model, name)(images)) <= 5e-6
    assert len(caplog.records) == 1
    assert "Failed to find C compiler." in caplog.text
    assert "CC" not in caplog.text


def test_the_model_is_only_read() -> None:
    model = built({}).train().requires_grad_()
    before = copy.deepcopy(model.state_dict())
    quick = fast(model)
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

    def forward(self, x: Tensor, keep: int | None = None, where: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        return self.of(x, keep, where) * 2


def test_parts_of_the_users_own_run_as_they_are(graphs: list[Graph]) -> None:
    images = torch.randn(70, 3, 32, 32)
    for precision, bound in (("fp32", 5e-6), ("bf16", 0.05), ("fp8", 0.25)):
        model = built({})
        model.blocks[1].attn = Doubled(model.blocks[1].attn)
        quick = fast(model, precision, batch_size=4)
        quick.runner.captures = quick.runner.compiles = True
        assert quick.as_they_are == ("blocks.1.attn",)
        assert quick.trunk.blocks[1].attn is model.blocks[1].attn
        assert isinstance(quick.trunk.blocks[0], cuda_parts.CudaBlock)
        with torch.no_grad():
            exact = model(images)
            model.blocks[1].attn.batches.clear()
            assert distance(quick(images), exact) <= bound
        assert model.blocks[1].attn.batches == [70]  # one call for the batch, as it came
        levels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        assert distance(quick.forward_levels(levels), model(pixels_of(levels))) <= bound
    assert graphs == []


def test_a_hook_is_kept() -> None:
    model = built(BEIT)
    model.blocks[0].mlp.register_forward_hook(lambda _, __, given: given * 3)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert distance(fast(model)(images), model(images)) <= 5e-6
        half = copy.deepcopy(model).bfloat16()
        assert torch.equal(fast(half, "bf16")(images), half(images))


@pytest.mark.usefixtures("graphs")
def test_inference_mode_may_come_and_go() -> None:
    model, images = built({}), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        quick = fast(model)
        quick.runner.captures = True
        inside = [quick(images.clone()) for _ in range(2)]
    outside = quick(images)
    assert all(torch.equal(given, outside) for given in inside)
    probe = torch.ones(5, requires_grad=True)
    (inside[0] * probe).sum().backward()  # what it gives may be learned from
    assert probe.grad is not None


@pytest.mark.usefixtures("graphs")
def test_deepcopy() -> None:
    quick, images = fast(built({})), torch.randn(2, 3, 32, 32)
    quick.runner.captures = True
    first = [quick(images) for _ in range(2)]
    twin = copy.deepcopy(quick)
    assert torch.equal(twin(images), first[0])
    assert twin.runner is not quick.runner
    assert len(twin.runner.ways) == 1


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built({})
    quick = fast(model)
    images = torch.randn(2, 3, 32, 32)

    def error(call: Callable[[], object], kind: type[VitlibError], *said: str) -> None:
        with pytest.raises(kind) as caught:
            call()
        assert all(re.search(words, str(caught.value)) for words in said), caught.value

    error(lambda: fast(model, "int8"), ConfigError, "int8", "bf16", "fp8")
    error(lambda: quick(images.requires_grad_()), ConfigError, "no gradients")
    images = images.detach()
    error(lambda: quick(images[0]), ImageError, "expected")
    error(lambda: quick(images[:, :, :7]), ImageError, "patch")
    error(lambda: quick(images.to(torch.uint8)), ImageError, "normalise")
    error(lambda: quick.forward_levels(images), ImageError, "uint8")
    error(lambda: quick.forward_levels(images[:, :2].to(torch.uint8)), ImageError, "3, height")
    error(lambda: quick.train(), ConfigError, "inference only")
    error(lambda: quick.save("out"), ConfigError, "vitlib.save")

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(quick.runner, "_run", full)
    error(lambda: quick(images), ImageError, "2 images of 3x32x32", "batch_size=")
    quick.on_levels = None
    error(lambda: quick.forward_levels(images.to(torch.uint8)), ConfigError, "image_processor")
    if not torch.cuda.is_available():
        error(lambda: cuda.optimize_cuda(model, "bf16", None, GPU), ConfigError, "no GPU")


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")


def test_what_a_gpu_cannot_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card(monkeypatch, (8, 0))
    gpu = torch.device("cuda", 0)
    assert cuda.route("bf16", gpu).attention_dtype == torch.bfloat16
    assert cuda.route("fp32", gpu).attention_dtype == torch.float32
    with pytest.raises(ConfigError, match=r"8\.9 or more, and Some GPU has 8\.0: use bf16"):
        cuda.route("fp8", gpu)
    card(monkeypatch, (7, 5))
    assert cuda.route("bf16", gpu).attention_dtype == torch.float32
    assert "bf16 is not used" in caplog.text
    card(monkeypatch, (9, 0))
    monkeypatch.setattr(cuda, "has_fp8", lambda _: False)
    with pytest.raises(ConfigError, match=r"no fp8 product .*: use bf16"):
        cuda.route("fp8", gpu)
    monkeypatch.setattr(cuda, "has_fp8", lambda _: True)
    assert cuda.route("fp8", gpu).attention_dtype == torch.bfloat16


def test_fp8_arithmetic() -> None:
    x = torch.randn(7, 32) * torch.logspace(-6, 6, 7)[:, None]
    x[3] = 0
    levels, scale = fp8.quantised(x)
    assert levels.dtype == torch.float8_e4m3fn
    assert scale.shape == (7, 1)
    # Three bits after the point; what is 2^14 times below a row's largest is below the smallest.
    back = levels.float() * scale
    assert bool(((back - x).abs() <= x.abs() / 16 + scale * 2**-9).all())
    assert bool((levels.float().abs().amax(dim=1)[[0, 6]] == 448).all())
    weight, bias = torch.randn(16, 32), torch.randn(16).bfloat16()
    held, rows = fp8.quantised(weight)
    exact = back @ (held.float() * rows).T + bias.float()
    found = fp8.product(levels, scale, held, rows, bias)
    assert found.dtype == torch.bfloat16
    assert distance(found.float(), exact) <= 2**-7
    assert fp8.has_fp8(CPU)


# What needs a GPU: minutes at most.


@pytest.fixture(scope="module")
def base() -> ViT:
    torch.manual_seed(0)
    return randomise(ViT(ViTConfig.named("S/16", num_classes=1000))).requires_grad_(False).cuda()


def on_gpu(model: ViT, precision: Any = "fp32", batch_size: int | None = None) -> cuda.CudaViT:
    found = cuda.optimize_cuda(model, precision, batch_size, GPU)
    assert isinstance(found, cuda.CudaViT)
    return found


@pytest.mark.cuda
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu_fp32_gives_the_numbers(name: str) -> None:
    model = built(FAMILIES[name])
    quick = on_gpu(model)
    levels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    images = pixels_of(levels)
    with torch.no_grad():
        exact, tokens = model.double()(images.double()), model.forward_features(images.double())
    for _ in range(3):  # as it is, captured, replayed
        assert distance(quick(images).cpu().double(), exact) <= 1e-5
        assert distance(quick(images.cuda()).cpu().double(), exact) <= 1e-5
        assert distance(quick.forward_levels(levels).cpu().double(), exact) <= 1e-5
        assert distance(quick.forward_features(images).cpu().double(), tokens) <= 1e-5


@pytest.mark.cuda
def test_on_a_gpu_graphs_change_nothing(base: ViT) -> None:
    images = torch.randn(70, 3, 224, 224, device="cuda")
    for precision in ("fp32", "bf16"):
        with_graphs, without = on_gpu(base, precision), on_gpu(base, precision)
        without.runner.captures = False
        for count in (1, 3, 70):
            expected = without(images[:count])
            given = [with_graphs(images[:count]) for _ in range(3)]
            assert with_graphs.runner.captures, "a capture failed"
            assert all(torch.equal(answer, expected) for answer in given), (precision, count)
        streams = [torch.cuda.Stream() for _ in range(2)]
        for stream in streams:
            with torch.cuda.stream(stream):
                given.append(with_graphs(images))
        torch.cuda.synchronize()
        assert all(torch.equal(answer, expected) for answer in given)


@pytest.mark.cuda
def test_on_a_gpu_bf16_and_fp8_keep_the_answers(deit_tiny: Path, fridge_photos: list[Path]) -> None:
    model = vitlib.load(deit_tiny)
    assert isinstance(model.image_processor, ImageProcessor)
    images = model.image_processor(fridge_photos[:128])
    with torch.no_grad():
        exact = model(images)
    bounds = {"bf16": (0.05, 0.95)}
    if torch.cuda.get_device_capability() >= (8, 9):
        bounds["fp8"] = (0.15, 0.8)
    for precision, (bound, kept) in bounds.items():
        quick = on_gpu(model, precision, batch_size=128)
        given = quick(images).cpu(), torch.cat([quick(part) for part in images.split(16)]).cpu()
        assert quick.runner.compiles, "it was not compiled"
        for answer in given:
            assert distance(answer, exact) <= bound
            assert (answer.argmax(1) == exact.argmax(1)).float().mean() >= kept
