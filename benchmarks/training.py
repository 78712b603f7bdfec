"""A fine-tuning step relative to transformers' Trainer: speed, memory and losses.

    python benchmarks/training.py --python PEER [--models B/16 deit-tiny] [--precisions fp32 bf16]
        [--tune all head lora] [--batch 16] [--rounds 9] [--threads 2] [--out FILE]

Both sides train one model on the same batches in the same order, without augmentation. Both use
fused AdamW with a learning rate of 5e-5, weight decay of 0.01 on matrices only, and gradients
clipped to a norm of 1. Each side is a worker process. The sides are interleaved step by step, so
that other load on the machine affects both. The first three steps of each are a warm-up.

Trainer has its best documented options: fused AdamW, tensors in its own process, no logging, saving
or reporting. Its time is that from on_step_begin to on_step_end.

`--tune head` trains the head alone, `lora` the head and updates of rank 8 of queries and values:
on the other side by PEFT. Each step computes the model. `vitlib finetune` keeps the features of a
head that is trained without augmentation, and computes the model once a photo.

Memory is measured in further processes. It is the peak of resident anonymous memory during four
steps, minus that before the model, minus weights, gradients and AdamW's two averages. Before the
model, all libraries are imported and a small model has been trained. vitlib keeps its heap between
steps (hold_heap), which is included.

ViT-B/16 has random weights in transformers' initialization. DeiT-tiny has its real weights and a
new head of 4 classes. The photos are those of fridge_multiclass, or random pixels if these are
absent. `--python` names the interpreter of an environment with the peer: pip install torch
transformers accelerate, and this package.
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
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from setting import SHARED, describe_run, list_photos, markdown_table, write_atomically
from turns import MIB, PAUSE, Worker

HERE = Path(__file__).resolve()
NUM_CLASSES, NUM_COMPARED, WARMUP, SEED = 4, 20, 3, 7
# LoRA of both sides: queries and values, as by default in vitlib.
RANK, LORA_TARGETS = 8, ["q_proj", "v_proj"]
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 5e-5, 0.01, 1.0
SIDES = ("vitlib", "Trainer")


# --- worker processes -----------------------------------------------------------------------------


class StepServer:
    """Worker's end of the pipe, which lets a training loop run some steps per request.

    begin() waits for a request if no steps remain; end() replies after the last of them.
    """

    def __init__(self) -> None:
        self.replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # output of libraries goes to stderr
        self.remaining, self.losses, self.start_time = 0, [], 0.0

    def reply(self, result: Any) -> None:
        print(json.dumps({"result": result}), file=self.replies, flush=True)

    def read_request(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        return json.loads(line)  # type: ignore[no-any-return]

    def begin(self) -> None:
        """Wait for a request if no steps remain."""
        if not self.remaining:
            self.remaining, self.losses = self.read_request()["count"], []
            self.start_time = time.perf_counter()

    def end(self, loss: Any) -> None:
        """Record the loss of a step; reply after the last requested step."""
        self.losses.append(loss)
        self.remaining -= 1
        if not self.remaining:
            seconds = time.perf_counter() - self.start_time
            self.reply({"seconds": seconds, "losses": [float(value) for value in self.losses]})


def batches(data: dict[str, Any], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of the photos of each batch, endlessly; equal on both sides."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(data["labels"]), generator=generator).tolist()
        yield from (
            order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)
        )


def train_vitlib(model: Any, data: dict[str, Any], task: dict[str, Any], steps: Any) -> None:
    """Train with vitlib's step until steps.end() raises StopIteration or the process ends.

    Args:
        model: A ViT.
        data: "pixels" (N, C, H, W) and "labels" (N,).
        task: Values for "batch" and "precision".
        steps: Object whose begin() and end(loss) enclose each step.
    """
    import torch

    from vitlib.system.heap import hold_heap
    from vitlib.train.fused_step import train_forward
    from vitlib.train.lora import add_updates
    from vitlib.train.settings import Tuning

    if task.get("tune", "all") == "head":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    elif task.get("tune", "all") == "lora":
        add_updates(model, Tuning(lora_r=RANK, lora_alpha=float(RANK)), SEED)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    by_decay = [[p for p in parameters if (p.ndim > 1) is large] for large in (True, False)]
    groups = [
        {"params": by_decay[0], "weight_decay": WEIGHT_DECAY},
        {"params": by_decay[1], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    with hold_heap():
        for indices in batches(data, task["batch"]):
            steps.begin()
            pixels = torch.stack([data["pixels"][i] for i in indices])
            labels = data["labels"][indices]
            logits = train_forward(model, pixels, precision=task["precision"])
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps.end(loss.detach())


def train_peer(model: Any, data: dict[str, Any], task: dict[str, Any], steps: Any) -> None:
    """Train with transformers' Trainer; the arguments are those of train_vitlib()."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    if task.get("tune", "all") == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    elif task.get("tune", "all") == "lora":
        import peft

        lora = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=LORA_TARGETS, modules_to_save=["classifier"]
        )
        model = peft.get_peft_model(model, lora)

    class Photos(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for indices in batches(data, task["batch"]):
                for i in indices:
                    yield {"pixel_values": data["pixels"][i], "labels": data["labels"][i]}

    class StepCallback(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.end(trainer.last_loss)

    class LossTrainer(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.last_loss = (loss[0] if isinstance(loss, tuple) else loss).detach()
            return loss

    with tempfile.TemporaryDirectory() as folder:
        training_arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=task["batch"],
            max_steps=task.get("steps", 10**6),
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
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
        trainer = LossTrainer(
            model=model, args=training_arguments, train_dataset=Photos(), callbacks=[StepCallback()]
        )
        trainer.train()


class WarmupStep(StepServer):
    """Ends a training loop after one step.

    That step performs the imports that libraries do on first use.
    """

    def __init__(self) -> None:
        self.remaining = 0

    def begin(self) -> None:
        """Do nothing."""

    def end(self, _: Any) -> None:
        """End the loop."""
        raise StopIteration


def run_worker(task: dict[str, Any]) -> None:
    """Run a side's process: a small model first, then the real one, step by step."""
    import torch

    torch.set_num_threads(task["threads"])
    steps = StepServer()
    data = torch.load(task["data"])
    if task["side"] == "vitlib":
        import vitlib

        train: Any = train_vitlib
        small_model: Any = vitlib.ViT(vitlib.ViTConfig.named("Ti/16", num_classes=NUM_CLASSES))
    else:
        import transformers as hf

        train = train_peer
        config = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        small_model = hf.ViTForImageClassification(hf.ViTConfig(**config, num_labels=NUM_CLASSES))
    with suppress(StopIteration):
        train(small_model, data, {**task, "batch": 2}, WarmupStep())
    del small_model
    steps.reply("ready")
    steps.read_request()
    if task["side"] == "vitlib":
        model: Any = vitlib.load(task["folder"])
    else:
        model = hf.AutoModelForImageClassification.from_pretrained(task["folder"])
    steps.reply(sum(p.numel() * p.element_size() for p in model.parameters()))
    train(model, data, task, steps)


def save_checkpoint(task: dict[str, Any]) -> None:
    """Save the checkpoint that both sides train, with its new head."""
    import torch
    import transformers as hf

    torch.manual_seed(SEED)
    if task["prepare"] == "B/16":
        model = hf.ViTForImageClassification(hf.ViTConfig(num_labels=NUM_CLASSES))
    else:
        model = hf.AutoModelForImageClassification.from_pretrained(
            task["from"], num_labels=NUM_CLASSES, ignore_mismatched_sizes=True
        )
    model.save_pretrained(task["folder"])
    StepServer().reply("done")


# --- command line ---------------------------------------------------------------------------------


class Result(NamedTuple):
    """Measurements of one model and precision.

    Attributes:
        model: Name of the model.
        precision: "fp32" or "bf16".
        seconds: Seconds of each step, by side.
        losses: Loss of each step, by side.
        memory: MiB beyond weights, gradients and AdamW's averages, by side.
    """

    model: str
    precision: str
    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]
    memory: dict[str, float]


def start_worker(task: dict[str, Any], options: argparse.Namespace) -> tuple[Worker, float, float]:
    """Start a side and load its model.

    Returns:
        The worker, its anonymous MiB before the model, and the MiB of the weights.
    """
    python = sys.executable if task["side"] == "vitlib" else options.python
    worker = Worker(python, HERE, task, options.threads)
    before_mib = worker.anonymous_mib()
    return worker, before_mib, worker.call("load") / MIB


def measure_extra_memory(task: dict[str, Any], options: argparse.Namespace) -> float:
    """Return the peak MiB beyond weights, gradients and AdamW's averages."""
    worker, before_mib, weights_mib = start_worker(task, options)
    try:
        _, peak_mib = worker.call_with_peak("steps", count=4)
    finally:
        worker.close()
    return peak_mib - before_mib - 4 * weights_mib


def measure_sides(
    name: str, precision: str, task: dict[str, Any], options: argparse.Namespace
) -> Result:
    """Measure both sides of one model and precision, interleaved step by step."""
    tasks = {side: {**task, "side": side, "precision": precision} for side in SIDES}
    memory = {side: measure_extra_memory(tasks[side], options) for side in SIDES}
    workers = {side: start_worker(tasks[side], options)[0] for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    try:
        for step in range(max(options.rounds + WARMUP, options.compared)):
            for side in SIDES[:: 1 if step % 2 else -1]:
                time.sleep(PAUSE)
                reply = workers[side].call("steps", count=1)
                losses[side] += reply["losses"]
                if step >= WARMUP:
                    seconds[side].append(reply["seconds"])
    finally:
        for worker in workers.values():
            worker.close()
    return Result(name, precision, seconds, losses, memory)


def result_table(results: list[Result], batch: int, num_compared: int) -> str:
    """Build the table of the results."""
    rows = []
    for result in results:
        vitlib_seconds, peer_seconds = (result.seconds[side] for side in SIDES)
        ratios = [b / a for a, b in zip(vitlib_seconds, peer_seconds, strict=True)]
        differences = [abs(a - b) for a, b in zip(*(result.losses[s] for s in SIDES), strict=True)]
        lower_quartile, upper_quartile = statistics.quantiles(ratios, n=4)[::2]
        memory = [result.memory[side] for side in SIDES]
        rows.append(
            [
                result.model,
                result.precision,
                str(batch),
                *(
                    f"{batch / statistics.median(seconds):.2f}"
                    for seconds in (vitlib_seconds, peer_seconds)
                ),
                f"{statistics.median(ratios):.2f} ({lower_quartile:.2f} to {upper_quartile:.2f})",
                f"{max(differences[:num_compared]):.1e}",
                *(f"{m:.0f}" for m in memory),
                f"{memory[0] / memory[1]:.0%}",
            ]
        )
    differences = f"largest difference of {num_compared} losses"
    header = ["model", "dtype", "batch", "vitlib, img/s", "Trainer, img/s", "speedup (quartiles)",
            differences, "vitlib, MiB", "Trainer, MiB", "memory ratio"]  # fmt: skip
    return markdown_table(header, rows, num_text_columns=2)


def save_data(path: Path, folder: Path) -> str:
    """Save the pixels and labels that both sides read; return a description of them."""
    import torch

    import vitlib

    photos = list_photos("fridge_multiclass")
    if photos and folder.is_dir():
        class_names = sorted({photo.parent.name for photo in photos})
        pixels = vitlib.ImageProcessor.load(folder)([str(photo) for photo in photos])
        labels = torch.tensor([class_names.index(photo.parent.name) for photo in photos])
        description = f"{len(photos)} photos of fridge_multiclass"
    else:
        torch.manual_seed(SEED)
        pixels, labels = torch.randn(128, 3, 224, 224), torch.arange(128) % NUM_CLASSES
        description = "random pixels"
    torch.save({"pixels": pixels, "labels": labels}, path)
    return description


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=["B/16", "deit-tiny"], default=["B/16", "deit-tiny"])
    add("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    add("--tune", nargs="+", choices=["all", "head", "lora"], default=["all"])
    add("--batch", type=int, default=16)
    add("--rounds", type=int, default=17, help="timed steps of each side (default: 17)")
    add(
        "--compared", type=int, default=NUM_COMPARED, help="number of compared losses (default: 20)"
    )
    add("--threads", type=int, default=2)
    add("--python", default=sys.executable, help="interpreter with the peer")
    add("--out", type=Path, help="also write the report to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    deit_tiny = SHARED / "models" / "deit-tiny-patch16-224"
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        pixels = save_data(work / "data.pt", deit_tiny)
        for name in options.models:
            if name == "deit-tiny" and not deit_tiny.is_dir():
                print("deit-tiny is skipped: its checkpoint is absent", file=sys.stderr)
                continue
            folder = str(work / name.replace("/", "-"))
            save_task = {"prepare": name, "folder": folder, "from": str(deit_tiny)}
            Worker(options.python, HERE, save_task, options.threads).close()
            task = {
                "folder": folder,
                "data": str(work / "data.pt"),
                "batch": options.batch,
                "threads": options.threads,
            }
            for precision, tune in product(options.precisions, options.tune):
                label = name if tune == "all" else f"{name}, {tune}"
                print(f"{label}, {precision} ...", file=sys.stderr)
                results.append(measure_sides(label, precision, {**task, "tune": tune}, options))
                print(result_table(results[-1:], options.batch, options.compared), file=sys.stderr)
    header = describe_run({name: version(name) for name in ("torch", "safetensors")})
    text = (
        f"{header} {options.threads} threads, {pixels}.\n\n"
        f"{result_table(results, options.batch, options.compared)}\n"
    )
    print(text)
    if options.out:
        write_atomically(options.out, text)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        task = json.loads(sys.argv[1])
        save_checkpoint(task) if "prepare" in task else run_worker(task)
    else:
        main()
