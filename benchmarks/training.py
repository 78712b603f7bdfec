"""A step of fine-tuning beside transformers' Trainer: speed, memory, and the losses of both.

    python benchmarks/training.py --python PEER [--models B/16 deit-tiny] [--precisions fp32 bf16]
        [--batch 16] [--rounds 9] [--threads 2] [--out FILE]

One model, the same batches in the same order, AdamW with the same settings (fused on both sides, a
rate of 5e-5, weight decay 0.01 on matrices alone, gradients cut to a length of 1), no augmentation.
Each side is a process of its own and takes its turn when asked, a step at a time, round after
round, so that what slows the machine slows both; the first three steps of each do not count.
Trainer has its best documented options: fused AdamW, ready tensors in its own process, nothing
logged, saved or reported. Its turn is from its on_step_begin to its on_step_end.

Memory is measured in further processes: the most anonymous memory that is resident during four
steps, less what was there before the model (all imported, a small model trained), less weights,
gradients and AdamW's two averages. vitlib keeps the heap between steps (hold_heap), which counts.

ViT-B/16 has random weights, as transformers draws them; DeiT-tiny the real ones, with a new head of
4 classes. Photos are those of fridge_multiclass; where they are not there, random numbers.
`--python` names the interpreter of an environment that has the peer: pip install torch transformers
accelerate, and this package.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from setting import SHARED, heading, photos_of, table, write_whole
from turns import MIB, PAUSE, Worker

HERE = Path(__file__).resolve()
CLASSES, COMPARED, WARMUP, SEED = 4, 20, 3, 7
RATE, DECAY, LONGEST = 5e-5, 0.01, 1.0
SIDES = ("vitlib", "Trainer")


# --- the processes that train ---------------------------------------------------------------------


class Orders:
    """The answering end: `turn` counts steps, `next` waits until more of them are asked for."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints is no answer
        self.left, self.losses, self.started = 0, [], 0.0

    def say(self, result: Any) -> None:
        print(json.dumps({"result": result}), file=self.out, flush=True)

    def order(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        return json.loads(line)  # type: ignore[no-any-return]

    def begin(self) -> None:
        """Before a step."""
        if not self.left:
            self.left, self.losses = self.order()["count"], []
            self.started = time.perf_counter()

    def end(self, loss: Any) -> None:
        """After a step, with its loss."""
        self.losses.append(loss)
        self.left -= 1
        if not self.left:
            seconds = time.perf_counter() - self.started
            self.say({"seconds": seconds, "losses": [float(one) for one in self.losses]})


def batches(data: dict[str, Any], size: int) -> Iterator[list[int]]:
    """Endless: numbers of photos, the same on both sides."""
    import torch

    drawn = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(data["labels"]), generator=drawn).tolist()
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def train_vitlib(model: Any, data: dict[str, Any], task: dict[str, Any], orders: Any) -> None:
    import torch

    from vitlib.train.fused_step import hold_heap, train_forward

    model.train()
    decay = [[p for p in model.parameters() if (p.ndim > 1) is large] for large in (True, False)]
    groups = [{"params": decay[0], "weight_decay": DECAY}, {"params": decay[1], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    parameters = list(model.parameters())
    with hold_heap():
        for numbers in batches(data, task["batch"]):
            orders.begin()
            pixels = torch.stack([data["pixels"][i] for i in numbers])
            labels = data["labels"][numbers]
            logits = train_forward(model, pixels, precision=task["precision"])
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, LONGEST)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            orders.end(loss.detach())


def train_peer(model: Any, data: dict[str, Any], task: dict[str, Any], orders: Any) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Photos(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for numbers in batches(data, task["batch"]):
                for i in numbers:
                    yield {"pixel_values": data["pixels"][i], "labels": data["labels"][i]}

    class Told(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            orders.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            orders.end(trainer.said)

    class Saying(Trainer):
        def compute_loss(self, *given: Any, **named: Any) -> Any:
            loss = super().compute_loss(*given, **named)
            self.said = (loss[0] if isinstance(loss, tuple) else loss).detach()
            return loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=task["batch"],
            max_steps=task.get("steps", 10**6),
            learning_rate=RATE,
            weight_decay=DECAY,
            max_grad_norm=LONGEST,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=task["precision"] == "bf16",
            use_cpu=task.get("use_cpu", True),
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Saying(model=model, args=arguments, train_dataset=Photos(), callbacks=[Told()])
        trainer.train()


class Alone(Orders):
    """Gives itself a step: to have all imported that is imported on first use."""

    def __init__(self) -> None:
        self.left = 0

    def begin(self) -> None:
        """Before a step."""

    def end(self, _: Any) -> None:
        """After one step it is done."""
        raise StopIteration


def work(task: dict[str, Any]) -> None:
    """A side's process: a small model first, then the real one, then steps as ordered."""
    import torch

    torch.set_num_threads(task["threads"])
    orders = Orders()
    data = torch.load(task["data"])
    if task["side"] == "vitlib":
        import vitlib

        train: Any = train_vitlib
        small: Any = vitlib.ViT(vitlib.ViTConfig.named("Ti/16", num_classes=CLASSES))
    else:
        import transformers as hf

        train = train_peer
        size = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        small = hf.ViTForImageClassification(hf.ViTConfig(**size, num_labels=CLASSES))
    with suppress(StopIteration):
        train(small, data, {**task, "batch": 2}, Alone())
    del small
    orders.say("ready")
    orders.order()
    if task["side"] == "vitlib":
        model: Any = vitlib.load(task["folder"])
    else:
        model = hf.AutoModelForImageClassification.from_pretrained(task["folder"])
    orders.say(sum(p.numel() * p.element_size() for p in model.parameters()))
    train(model, data, task, orders)


def prepare(task: dict[str, Any]) -> None:
    """Writes a model's checkpoint, with the head that both sides start from."""
    import torch
    import transformers as hf

    torch.manual_seed(SEED)
    if task["prepare"] == "B/16":
        model = hf.ViTForImageClassification(hf.ViTConfig(num_labels=CLASSES))
    else:
        model = hf.AutoModelForImageClassification.from_pretrained(
            task["from"], num_labels=CLASSES, ignore_mismatched_sizes=True
        )
    model.save_pretrained(task["folder"])
    Orders().say("done")


# --- the process that asks ------------------------------------------------------------------------


class Found(NamedTuple):
    """What one model and precision gave."""

    model: str
    precision: str
    seconds: dict[str, list[float]]  # a step, by side
    losses: dict[str, list[float]]
    memory: dict[str, float]  # MiB


def started(task: dict[str, Any], options: argparse.Namespace) -> tuple[Worker, float, float]:
    """A side that has its model -> it, memory before the model, and of the model, MiB."""
    python = sys.executable if task["side"] == "vitlib" else options.python
    worker = Worker(python, HERE, task, options.threads)
    before = worker.anonymous()
    return worker, before, worker.ask("load") / MIB


def beyond(task: dict[str, Any], options: argparse.Namespace) -> float:
    """The most memory beyond weights, gradients and AdamW's averages, MiB."""
    worker, before, weights = started(task, options)
    try:
        _, most = worker.watched("steps", count=4)
    finally:
        worker.end()
    return most - before - 4 * weights


def measured(name: str, precision: str, task: dict[str, Any], options: argparse.Namespace) -> Found:
    """Both sides of one model and precision, step after step in turns."""
    tasks = {side: {**task, "side": side, "precision": precision} for side in SIDES}
    memory = {side: beyond(tasks[side], options) for side in SIDES}
    workers = {side: started(tasks[side], options)[0] for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    try:
        for count in range(max(options.rounds + WARMUP, options.compared)):
            for side in SIDES[:: 1 if count % 2 else -1]:
                time.sleep(PAUSE)
                said = workers[side].ask("steps", count=1)
                losses[side] += said["losses"]
                if count >= WARMUP:
                    seconds[side].append(said["seconds"])
    finally:
        for worker in workers.values():
            worker.end()
    return Found(name, precision, seconds, losses, memory)


def report(found: list[Found], batch: int, compared: int) -> str:
    """The table."""
    rows = []
    for one in found:
        ours, theirs = (one.seconds[side] for side in SIDES)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        apart = [abs(a - b) for a, b in zip(*(one.losses[s] for s in SIDES), strict=True)]
        low, high = statistics.quantiles(ratios, n=4)[::2]
        memory = [one.memory[side] for side in SIDES]
        rows.append(
            [
                one.model,
                one.precision,
                str(batch),
                *(f"{batch / statistics.median(some):.2f}" for some in (ours, theirs)),
                f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})",
                f"{max(apart[:compared]):.1e}",
                *(f"{m:.0f}" for m in memory),
                f"{memory[0] / memory[1]:.0%}",
            ]
        )
    apart = f"losses of {compared} steps apart, at most"
    head = ["model", "dtype", "batch", "vitlib, img/s", "Trainer, img/s", "ratio (quartiles)",
            apart, "vitlib, MiB", "Trainer, MiB", "memory"]  # fmt: skip
    return table(head, rows, words=2)


def save_data(path: Path, folder: Path) -> str:
    """Pixels and labels as both sides read them -> what they are, in words."""
    import torch

    import vitlib

    photos = photos_of("fridge_multiclass")
    if photos and folder.is_dir():
        names = sorted({photo.parent.name for photo in photos})
        pixels = vitlib.ImageProcessor.load(folder)([str(photo) for photo in photos])
        labels = torch.tensor([names.index(photo.parent.name) for photo in photos])
        said = f"{len(photos)} photos of fridge_multiclass"
    else:
        torch.manual_seed(SEED)
        pixels, labels = torch.randn(128, 3, 224, 224), torch.arange(128) % CLASSES
        said = "random pixels"
    torch.save({"pixels": pixels, "labels": labels}, path)
    return said


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=["B/16", "deit-tiny"], default=["B/16", "deit-tiny"])
    add("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    add("--batch", type=int, default=16)
    add("--rounds", type=int, default=17, help="steps of each side that count (default: 17)")
    add("--compared", type=int, default=COMPARED, help="losses that are compared (default: 20)")
    add("--threads", type=int, default=2)
    add("--python", default=sys.executable, help="an interpreter that has the peer")
    add("--out", type=Path, help="write the report here too")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    real = SHARED / "models" / "deit-tiny-patch16-224"
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        pixels = save_data(room / "data.pt", real)
        for name in options.models:
            if name == "deit-tiny" and not real.is_dir():
                print("deit-tiny: its checkpoint is not there", file=sys.stderr)
                continue
            folder = str(room / name.replace("/", "-"))
            given = {"prepare": name, "folder": folder, "from": str(real)}
            Worker(options.python, HERE, given, options.threads).end()
            task = {
                "folder": folder,
                "data": str(room / "data.pt"),
                "batch": options.batch,
                "threads": options.threads,
            }
            for precision in options.precisions:
                print(f"{name}, {precision} ...", file=sys.stderr)
                found.append(measured(name, precision, task, options))
                print(report(found[-1:], options.batch, options.compared), file=sys.stderr)
    head = heading({name: version(name) for name in ("torch", "safetensors")})
    text = (
        f"{head} {options.threads} threads, {pixels}.\n\n"
        f"{report(found, options.batch, options.compared)}\n"
    )
    print(text)
    if options.out:
        write_whole(options.out, text)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        given = json.loads(sys.argv[1])
        prepare(given) if "prepare" in given else work(given)
    else:
        main()
