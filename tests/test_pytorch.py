"""What PyTorch does to a module works on a ViT. test_pickling.py and test_traced.py have more."""

from __future__ import annotations

import copy
import gc
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader

import vitlib
from fixtures.families import FAMILIES, pixels, tiny
from vitlib import ImageProcessor

everyone = pytest.mark.parametrize("family", FAMILIES)
# Each has a part that the others lack.
KINDS = ("vit", "deit_distilled", "dinov2_swiglu", "dinov3", "siglip_map", "beit")
kinds = pytest.mark.parametrize("family", KINDS)
LABELS = torch.tensor([0, 1, 2])


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, LABELS[: len(logits)])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference over the largest value of all."""
    assert result.keys() == expected.keys()
    with torch.no_grad():
        largest = max(float(value.abs().max()) for value in expected.values())
        errors = [float((result[name] - value).abs().max()) for name, value in expected.items()]
    return max(errors) / largest


# --- functional calls -----------------------------------------------------------------------------


@kinds
def test_functional_call_takes_other_weights(family: str) -> None:
    model, images = tiny(family), pixels(2)
    state = {name: tensor * 1.1 for name, tensor in model.state_dict().items()}
    before = model(images)
    result = functional_call(model, state, (images,))
    assert torch.equal(model(images), before)
    model.load_state_dict(state)
    assert torch.allclose(result, model(images), atol=1e-6)
    assert not torch.allclose(result, before, atol=1e-3)


@everyone
def test_gradients_of_each_sample_by_vmap(family: str) -> None:
    model, images = tiny(family), pixels(3)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    with sdpa_kernel(SDPBackend.MATH):  # torch warns that it loops over others
        result = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, LABELS)
    for index in range(3):
        model.zero_grad()
        F.cross_entropy(model(images[index : index + 1]), LABELS[index : index + 1]).backward()
        sample = {name: value[index] for name, value in result.items()}
        assert distance(sample, gradients(model)) < 1e-5


def test_samples_draw_their_own_dropout_under_vmap() -> None:
    model = tiny("vit", depth=2, dropout=0.5, attention_dropout=0.5, drop_path=0.5).train()
    same = pixels(1).expand(8, -1, -1, -1)
    logits = vmap(lambda image: model(image[None])[0], randomness="different")(same)
    assert len({tuple(row.tolist()) for row in logits}) > 4


def test_ensemble_by_vmap() -> None:
    models, images = [tiny("vit"), tiny("vit")], pixels(2)
    with torch.no_grad():
        models[1].head.weight.mul_(2)
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta")
    with sdpa_kernel(SDPBackend.MATH):
        result = vmap(lambda p, b: functional_call(base, (p, b), (images,)))(parameters, buffers)
    for logits, model in zip(result, models, strict=True):
        assert torch.allclose(logits, model(images), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_forward_derivatives_need_the_math_backend() -> None:
    model, images, step = tiny("vit").double(), pixels(2).double(), torch.ones(2, 3, 32, 32)
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = jvp(model, (images,), (step.double(),))
    difference = (model(images + 1e-6 * step) - model(images - 1e-6 * step)) / 2e-6
    assert torch.allclose(slope, difference, atol=1e-6)
    with pytest.raises(NotImplementedError, match="forward AD with _scaled_dot_product"):
        jvp(model, (images,), (step.double(),))


# --- averages, casts, places ----------------------------------------------------------------------


def test_averaged_model_is_the_mean_of_weights() -> None:
    model, images = tiny("dinov3"), pixels(2)
    averaged, ema = AveragedModel(model), AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.75)
    )  # fmt: skip
    first = copy.deepcopy(model.state_dict())
    for average in (averaged, ema):
        average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    for average, share in ((averaged, 0.5), (ema, 0.25)):
        average.update_parameters(model)
        expected = {n: first[n] + share * (p - first[n]) for n, p in model.named_parameters()}
        assert distance(dict(average.module.named_parameters()), expected) < 1e-6  # type: ignore[arg-type]
    before = averaged(images)
    update_bn([images], averaged)  # there are no batch norms
    assert torch.equal(averaged(images), before)
    assert isinstance(averaged.module, vitlib.ViT)


@everyone
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_model_takes_float32_pixels(family: str, dtype: torch.dtype) -> None:
    model, images = tiny(family), pixels(2)
    expected = model(images)
    result = model.to(dtype)(images)
    assert result.dtype == model.dtype == dtype
    bound = {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float64: 1e-5}[dtype]
    assert (result - expected).abs().max() < bound * expected.abs().max()
    assert {p.dtype for p in model.parameters()} == {dtype}


@everyone
def test_meta_model_gives_shapes_and_assigned_weights_its_logits(family: str) -> None:
    model, images = tiny(family), pixels(2)
    expected = model(images)
    moved = copy.deepcopy(model).to("meta")
    assert moved(images.to("meta")).shape == expected.shape
    with torch.device("meta"):
        empty = vitlib.ViT(model.config).eval()
    state = model.state_dict()
    for other in (moved, empty):
        other.load_state_dict(state, assign=True)
        assert torch.equal(other(images), expected)
        assert other.head.weight.data_ptr() == model.head.weight.data_ptr()  # nothing is copied
        assert other.device == torch.device("cpu")


@kinds
def test_autocast_trains_every_parameter(family: str) -> None:
    model, images = tiny(family, depth=2).train(), pixels(3)
    loss_of(model(images)).backward()
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    loss_of(logits.float()).backward()
    assert {value.dtype for value in gradients(model).values()} == {torch.float32}
    assert distance(gradients(model), exact) < 0.05


# --- hooks, subclasses, compilation ---------------------------------------------------------------


@kinds
def test_hooks_see_every_block_once(family: str) -> None:
    model, images = tiny(family, depth=3), pixels(2).requires_grad_()
    expected = model(images)
    calls: list[tuple[str, int]] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=index: calls.append(("before", i)))
        block.register_forward_hook(lambda *_, i=index: calls.append(("after", i)))
        block.register_full_backward_hook(lambda *_, i=index: calls.append(("backward", i)))
    logits = model(images)
    assert torch.equal(logits, expected)
    logits.sum().backward()
    forward = [(kind, index) for index in range(3) for kind in ("before", "after")]
    assert calls == forward + [("backward", index) for index in (2, 1, 0)]


def test_hook_changes_the_forward() -> None:
    model, images = tiny("vit", depth=2), pixels(2)
    model.blocks[0].attn.register_forward_hook(lambda _, __, output: output * 0)
    changed, _ = tiny("vit", depth=2).trace(
        images, edit={"blocks.0.attn.out": torch.zeros_like}
    )  # fmt: skip
    assert torch.equal(model(images), changed)


class TwoTasks(vitlib.ViT):
    """A ViT with a second head."""

    def __init__(self, config: vitlib.ViTConfig, num_other: int) -> None:
        super().__init__(config)
        self.other = nn.Linear(config.num_features, num_other)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.forward_features(images)
        vector = self.forward_head(tokens, pre_logits=True)
        return torch.cat([self.head(vector), self.other(vector)], dim=1)


def test_subclass_trains_copies_and_loads() -> None:
    base, images = tiny("vit", depth=2), pixels(3)
    model = TwoTasks(base.config, 4).eval()
    missing = model.load_state_dict(base.state_dict(), strict=False).missing_keys
    assert missing == ["other.weight", "other.bias"]
    logits = model(images)
    assert torch.allclose(logits[:, :5], base(images), atol=1e-5)
    assert torch.equal(copy.deepcopy(model)(images), logits)
    again = TwoTasks(base.config, 4).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), logits)
    assert "other.weight" in {n for g in vitlib.parameter_groups(model) for n in g["names"]}
    fast = vitlib.optimize(model)
    assert torch.allclose(fast(images), logits, atol=1e-5)
    loss_of(model(images)).backward()
    assert len(gradients(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("family", ["dinov3", "beit", "siglip_map"])
def test_compiled_model_trains_without_a_graph_break(family: str) -> None:
    torch._dynamo.reset()
    model, images = tiny(family, depth=2).train(), pixels(3)
    loss_of(model(images)).backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(compiled(images)).backward()
    assert distance(gradients(model), expected) < 1e-5


# --- several processes ----------------------------------------------------------------------------


def join(folder: Path, rank: int = 0, count: int = 1) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{count}", rank=rank, world_size=count
    )


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    join(tmp_path)
    yield
    distributed.destroy_process_group()


def shard(model: vitlib.ViT, count: int) -> vitlib.ViT:
    """Shard each block, and the rest, over all processes (FSDP2)."""
    mesh = init_device_mesh("cpu", (count,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


# torch gathers a gradient whose strides are not those of its bucket, and says so.
quiet = pytest.mark.filterwarnings("ignore:Grad strides do not match")


@quiet
@everyone
@pytest.mark.usefixtures("group")
def test_data_parallel_reduces_every_gradient(family: str) -> None:
    """The second step fails if a parameter that trains has no part in the loss."""
    model, images = tiny(family, depth=2), pixels(3)
    parallel = DistributedDataParallel(copy.deepcopy(model))
    for _ in range(2):
        loss_of(model(images)).backward()
        loss_of(parallel(images)).backward()
    assert distance(gradients(parallel.module), gradients(model)) < 1e-6


@kinds
@pytest.mark.usefixtures("group")
def test_fully_sharded_model_trains(family: str) -> None:
    model, images = tiny(family, depth=2), pixels(3)
    sharded = shard(copy.deepcopy(model), 1)
    optimizers = []
    for trained in (model, sharded):
        groups = vitlib.parameter_groups(trained, lr=1e-2, layer_decay=0.5)
        optimizers.append(torch.optim.AdamW(groups))
        loss_of(trained(images)).backward()
        optimizers[-1].step()
    result = {n: p.full_tensor() for n, p in sharded.named_parameters()}  # type: ignore[attr-defined]
    assert distance(result, dict(model.named_parameters())) < 1e-6
    register_fsdp_forward_method(sharded, "forward_features")  # torch's, for methods but forward
    features = sharded.forward_features(images)
    assert torch.allclose(features, model.forward_features(images), atol=1e-5)


def train_half(rank: int, folder: Path, family: str) -> None:
    """Train on this process's half of four images, and write the gradients of all."""
    torch.set_num_threads(1)
    join(folder, rank, 2)
    images = pixels(4)[2 * rank : 2 * rank + 2]
    labels = torch.arange(4)[2 * rank : 2 * rank + 2]
    parallel = DistributedDataParallel(tiny(family, depth=2))
    F.cross_entropy(parallel(images), labels).backward()
    sharded = shard(tiny(family, depth=2), 2)
    F.cross_entropy(sharded(images), labels).backward()
    whole = {n: grad.full_tensor() for n, grad in gradients(sharded).items()}  # type: ignore[attr-defined]
    torch.save((gradients(parallel.module), whole), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.processes
@kinds
def test_two_processes_give_the_gradients_of_one(family: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_half, (tmp_path, family), nprocs=2)  # type: ignore[no-untyped-call]
    model = tiny(family, depth=2)
    F.cross_entropy(model(pixels(4)), torch.arange(4)).backward()
    for rank in range(2):
        for result in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            assert distance(result, gradients(model)) < 1e-5


# --- data -----------------------------------------------------------------------------------------


def first_of_pairs(pairs: list[Any], rule: ImageProcessor) -> tuple[Tensor, Tensor]:
    return rule([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


class Collate:
    """Collate pairs of photos and labels in a worker."""

    def __init__(self, rule: ImageProcessor) -> None:
        self.rule = rule

    def __call__(self, pairs: list[Any]) -> tuple[Tensor, Tensor]:
        return first_of_pairs(pairs, self.rule)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_image_processor_runs_in_workers(start: str, tmp_path: Path) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {start}")
    rng = np.random.default_rng(0)
    photos = []
    for index in range(6):
        path = tmp_path / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (40 + index, 50, 3), np.uint8)).save(path)
        photos.append((str(path), index))
    rule = ImageProcessor(size=(32, 32), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    loader = DataLoader(
        photos, batch_size=2, num_workers=2, collate_fn=Collate(rule),  # type: ignore[arg-type]
        multiprocessing_context=start,
    )  # fmt: skip
    gc.collect()  # what earlier tests left must not be collected in a forked process
    batches = list(loader)
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(6))
    expected = rule([path for path, _ in photos])
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)
