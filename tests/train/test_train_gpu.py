"""Training on a fake GPU: waits for it, and kernels of attention."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixtures.fake_gpu import FAMILIES, GPU, Waits, fake_training, move_to_fake_gpu, small
from vitlib import ViT
from vitlib.data import LabelledPhotos
from vitlib.data.photos import Photo
from vitlib.encoder import Attention
from vitlib.errors import ConfigError
from vitlib.train import distributed
from vitlib.train.config import TrainConfig
from vitlib.train.distributed import World
from vitlib.train.fused_step import cuda_attention
from vitlib.train.loader.loader import Batch
from vitlib.train.loop import Trainer
from vitlib.train.sampler import BatchPlan

KERNELS = {
    f"_scaled_dot_product_{name}_attention": name for name in ("flash", "efficient", "cudnn")
}
KERNELS |= {f"{name}_backward": f"{short} backward" for name, short in KERNELS.items()}
PRECISIONS = ("fp32", "bf16", "fp16")
LABELS = ("a", "b", "c", "d", "e")
SETTINGS = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
DROPS = {"depth": 4, "drop_path": 0.3, "dropout": 0.1, "num_classes": 5}


def count_attention(count: Waits) -> Counter[str]:
    """Count the kernels of attention that were launched."""
    return Counter({KERNELS[n]: number for n, number in count.counts.items() if n in KERNELS})


def create_trainer(model: ViT, out: Path, **settings: Any) -> Trainer:
    """Create a trainer whose weights are on the GPU, inside the mode."""
    photos = tuple(Photo(Path(f"{i}.png"), (LABELS[i % 5],)) for i in range(12))
    data = LabelledPhotos(photos, LABELS, False, "photos")
    model = move_to_fake_gpu(model).requires_grad_(True)
    config = TrainConfig.from_dict({**SETTINGS, **settings})
    rule: Any = model.image_processor
    return Trainer(model, data, data, rule, config, out, World(device=GPU))


def yield_batches(plans: list[BatchPlan]) -> Any:
    """Yield batches of pinned pixels, like the loader for a GPU."""
    for plan in plans:
        yield Batch(torch.empty(len(plan.samples), 3, 32, 32).pin_memory(), plan)


@pytest.mark.parametrize(
    ("family", "precision"),
    [*((family, "bf16") for family in FAMILIES), ("vit", "fp32"), ("relative", "fp16")],
)
def test_a_step_waits_for_the_gpu_once(
    family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, model = fake_training(monkeypatch), small(**FAMILIES[family] | DROPS)
    settings = {"class_weights": [1.0, 2.0, 1.0, 1.0, 1.0], "mixup_alpha": 0.5}
    with mode:
        trainer = create_trainer(model, tmp_path, precision=precision, **settings)
        plan = trainer.sampler.plan_step(0)
        batches = yield_batches(trainer.sampler.split_step(plan, 0))
        with Waits() as count:
            trainer._train_step(plan, batches)
    assert count.waits == ["_to_copy to the CPU"], count.waits
    assert trainer.train_loader._pin  # see train/test_loader.py
    assert count.counts["_fused_adamw_"]
    assert (trainer.log.events[0]["loss"], trainer.log.events[0]["grad_norm"]) == (
        2,
        1,
    )  # of 2 passes
    kernel = "efficient" if precision == "fp32" or "relative" in family else "flash"
    passes, blocks = 2, 5 if family == "map" else 4
    assert count_attention(count) == {
        kernel: passes * blocks,
        f"{kernel} backward": passes * blocks,
    }


def test_sgd_waits_once_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, model = fake_training(monkeypatch), small(**DROPS)
    with mode:
        trainer = create_trainer(model, tmp_path, precision="bf16", optim="sgd", ema_decay=0.9)
        plan = trainer.sampler.plan_step(0)
        batches = yield_batches(trainer.sampler.split_step(plan, 0))
        with Waits() as count:
            trainer._train_step(plan, batches)
    assert count.waits == ["_to_copy to the CPU"], count.waits


def test_waits_counts_every_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_training(monkeypatch), Waits() as count:
        on_gpu, on_cpu = torch.empty(3, device=GPU), torch.empty(3)
        on_gpu[0].item()
        on_gpu.cpu()
        on_cpu.to(GPU)
        on_cpu.to(GPU, non_blocking=True)  # of pages, which the driver copies first
        on_cpu.pin_memory().to(GPU)
        on_gpu.copy_(on_cpu)
        assert len(count.waits) == 6
        on_cpu.pin_memory().to(GPU, non_blocking=True)
        on_cpu[0].item()
    assert len(count.waits) == 6


class GatheredError(Exception):
    """Carries the value that a process would send to the others."""


class Gathering(World):
    """A world that ends an evaluation once all logits are computed."""

    def all_gather(self, value: Any) -> list[Any]:
        raise GatheredError(value)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluation_uses_precision_and_reads_once(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, model = fake_training(monkeypatch), small(**DROPS)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with mode:
        trainer = create_trainer(model, tmp_path, precision=precision)
        trainer.world = Gathering(device=GPU)
        assert trainer.eval_loader is not None
        assert trainer.validation is not None
        batches = [BatchPlan(0, step, (3 * step, 3 * step + 1, 3 * step + 2)) for step in range(3)]
        trainer.eval_loader.evaluation_batches = lambda *_: yield_batches(batches)  # type: ignore[method-assign]
        with Waits() as count, pytest.raises(GatheredError) as gathered:
            trainer._predict(trainer.eval_loader, trainer.validation)
    scores, numbers, _ = gathered.value.args[0]
    assert scores.shape == (9, 5)
    assert scores.dtype == torch.float32
    assert numbers == [*range(9)]
    assert count.waits == ["_to_copy to the CPU"], count.waits
    products = [args[1].dtype for name, args in count.calls if name in ("addmm", "linear")]
    assert set(products) == {dtype}
    assert count_attention(count) == {"efficient" if precision == "fp32" else "flash": 3 * 4}


# --- attention -----------------------------------------------------------------------------------


class OwnAttention(Attention):
    """Attention of a user, which calls torch by keywords."""

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        q, k, bias = self.project_qk(x, num_queries, attn_pos)
        v = self.split_heads(self.v(x))
        x = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))


class OwnViT(ViT):
    """Model of a user."""


def add_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def replace_attention(model: ViT) -> None:
    for block in model.blocks:
        block.attn.__class__ = OwnAttention


CHANGES: dict[str, Any] = {
    "none": lambda _: None,
    "attention": replace_attention,
    "a hook on each block": lambda model: [add_hook(block) for block in model.blocks],
    "a hook on the model": add_hook,
    "a class of its own": lambda model: setattr(model, "__class__", OwnViT),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_attention_of_any_model_is_pinned(
    change: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpointing, blocks are computed again by the same kernel."""
    for family, kernel in (("vit", "flash"), ("relative", "efficient")):
        mode, model = fake_training(monkeypatch), small(**FAMILIES[family], depth=2, drop_path=0.3)
        CHANGES[change](model)
        settings = {"gradient_accumulation_steps": 1, "precision": "bf16"}
        with mode:
            trainer = create_trainer(model, tmp_path, **settings)
            model.set_grad_checkpointing(checkpointing)
            plan = trainer.sampler.plan_step(0)
            batches = yield_batches(trainer.sampler.split_step(plan, 0))
            with Waits() as count:
                trainer._train_step(plan, batches)
        assert count_attention(count) == {kernel: 2 * (1 + checkpointing), f"{kernel} backward": 2}
        assert not {"_safe_softmax", "_softmax"} & count.counts.keys()
        assert len(count.waits) == 1


@pytest.mark.parametrize(
    ("takes", "width", "has_bias", "kernel"),
    [
        ("flash efficient", 64, False, "flash"),  # where torch may take cuDNN
        ("flash efficient", 64, True, "efficient"),
        ("efficient", 64, False, "efficient"),
        ("", 64, False, "any"),
        ("flash efficient", 50, False, "any"),  # the operations themselves do not pad
        ("flash efficient, but flash", 64, False, "efficient"),  # which fails on this GPU
        ("flash efficient, but efficient", 64, True, "math"),
        ("flash efficient, but efficient", 50, False, "math"),
    ],
)
def test_choose_for_training(
    takes: str, width: int, has_bias: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes, _, wrong = takes.partition(", but ")
    monkeypatch.setattr(cuda_attention, "has_kernel", lambda _, name: name not in wrong.split())
    for name in ("flash", "efficient"):
        can: Any = lambda _, name=name: name in takes.split()  # noqa: E731
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", can)
    x = torch.empty(2, 3, 197, width, dtype=torch.bfloat16)
    bias = torch.empty(1, 3, 197, 197, dtype=torch.bfloat16) if has_bias else None
    assert cuda_attention.choose_for_training(x, x, x, bias) == kernel
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda_attention.choose_for_training(x, x, x, bias) == "any"


@pytest.mark.parametrize("shape", [None, (1, 3, 17, 17), (17, 17), (2, 1, 1, 17), (2, 3, 17, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attend_matches_torch(
    shape: tuple[int, ...] | None, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused operations need a GPU, so torch's reference replaces them."""
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda _: True)
    monkeypatch.setattr(cuda_attention, "has_kernel", lambda *_: True)

    def run_kernel(kernel: str, *qkv: Any, scale: Any, trains: bool) -> Tensor:
        assert (kernel, trains) == ("efficient", True)  # float32
        assert qkv[3] is None or (qkv[3].shape == (2, 3, 17, 17) and qkv[3].stride(2) % 16 == 0)
        return F.scaled_dot_product_attention(*qkv, scale=scale)

    monkeypatch.setattr(cuda_attention, "run_kernel", run_kernel)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 17, 16, requires_grad=True) for _ in range(3)]
    inputs += [] if shape is None else [torch.randn(shape, requires_grad=True)]
    weight = torch.randn(2, 3, 17, 16)

    def numbers(attend: Any, **options: Any) -> list[Tensor]:
        output = attend(*inputs, **options)
        return [output, *torch.autograd.grad((output * weight).sum(), inputs)]

    exact = numbers(F.scaled_dot_product_attention, scale=scale)
    actual = numbers(cuda_attention.attend, scale=scale)
    for result, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)


def test_other_attention_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_training(monkeypatch):
        q = torch.empty(2, 4, 17, 64, dtype=torch.bfloat16, device=GPU)
        mask = torch.empty(17, 17, dtype=torch.bool, device=GPU)
        two = q[:, :2]
        calls: list[Any] = [
            lambda: F.scaled_dot_product_attention(q, q, q, mask),
            lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.1),
            lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
            lambda: F.scaled_dot_product_attention(q, two, two, enable_gqa=True),
            lambda: F.scaled_dot_product_attention(q[0], q[0], q[0]),
        ]
        for call in calls:
            with cuda_attention.pin_attention(GPU), Waits() as count:
                call()
            assert not count_attention(count)
        with cuda_attention.pin_attention(GPU), Waits() as count:
            F.scaled_dot_product_attention(q, q, q)
        assert count_attention(count) == {"flash": 1}
        with cuda_attention.pin_attention(torch.device("cpu")), Waits() as count:
            F.scaled_dot_product_attention(q, q, q)
        assert not count_attention(count)  # as everywhere else


# --- the processes and the precision of a run ----------------------------------------------------


def test_bf16_is_refused_without_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, model = fake_training(monkeypatch, (7, 5)), small()
    with mode:
        with pytest.raises(ConfigError, match="Some GPU has no bfloat16: use fp16 or fp32 here"):
            create_trainer(model, tmp_path, precision="bf16")
        for precision in ("fp16", "fp32"):  # the remedy
            create_trainer(model, tmp_path, precision=precision)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_processes_join_by_their_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[tuple[Any, ...]] = []
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    stand_in = distributed.dist
    monkeypatch.setattr(stand_in, "init_process_group", lambda *x, **y: joined.append((*x, y)))
    monkeypatch.setattr(stand_in, "barrier", lambda: None)
    monkeypatch.setattr(stand_in, "destroy_process_group", lambda: None)
    with distributed.join_processes(kind) as processes:
        assert (processes.rank, processes.size) == (1, 2)
    device = torch.device("cuda", 1) if kind == "cuda" else None  # LOCAL_RANK's
    assert joined == [("nccl" if kind == "cuda" else "gloo", {"device_id": device})]
