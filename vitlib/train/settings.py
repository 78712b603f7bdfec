"""The parts of a TrainConfig: frozen dataclasses whose fields are flags of `vitlib finetune`.

Names are those of transformers' TrainingArguments wherever it has the setting. Each field carries
its help text, which the command line prints. Nothing here imports torch, so that `--help` is fast.

Sources: Loshchilov and Hutter 1711.05101 (AdamW), 1608.03983 (cosine); Clark et al. 2003.10555
(learning rates that fall with depth); Hu et al. 2106.09685 (LoRA); Szegedy et al. 1512.00567 (label
smoothing); Tarvainen and Valpola 1703.01780 (exponential moving average, EMA).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

OptimizerName = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "linear", "polynomial", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
Split = Literal["stratified", "fifth"]
BadImage = Literal["fail", "skip"]
Cache = Literal["auto", "memory", "none"]
FitMode = Literal["checkpoint", "squash"]
Init = Literal["mimetic", "normal"]
LoraTarget = Literal["q", "k", "v", "out", "fc1", "fc2"]

# Nothing of these changes what a model learns from its photos, so they go with chosen settings.
NEUTRAL = frozenset(
    (
        *("auto", "seed", "precision", "dataloader_num_workers", "cache", "on_bad_image"),
        *("per_device_eval_batch_size", "save_steps", "save_total_limit", "tensorboard"),
        *("gradient_checkpointing", "image_size"),
    )
)


def option(default: Any, help_text: str) -> Any:
    """Return a dataclass field that carries its help text.

    Args:
        default: The value of the field unless one is set.
        help_text: One line for `--help`, kept in `metadata["help"]`.

    Returns:
        What `dataclasses.field` returns.
    """
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer and its learning rate.

    Attributes:
        optim: AdamW or SGD.
        learning_rate, weight_decay, layer_decay: The rate of the head, its decay, and its factor
            from one block to the block below it.
        adam_beta1, adam_beta2, adam_epsilon: AdamW alone.
        momentum, nesterov: SGD alone.
        max_grad_norm: Largest L2 norm of all gradients together; 0 for no limit.
        lr_scheduler_type, lr_end, lr_power: The schedule after the warm-up.
        warmup_ratio, warmup_steps: Length of the warm-up, as a share of all steps or in steps.
    """

    optim: OptimizerName = option("adamw", "AdamW, or SGD with momentum.")
    learning_rate: float = option(1e-4, "Learning rate of the head; see layer_decay for the rest.")
    weight_decay: float = option(
        0.05, "Weight decay; biases, norms, tokens, positions and LayerScale have none."
    )
    layer_decay: float = option(
        0.75, "Learning rate of a block divided by that of the next block; 1: equal rates."
    )
    adam_beta1: float = option(0.9, "AdamW: decay of the mean of gradients.")
    adam_beta2: float = option(0.999, "AdamW: decay of the mean of squared gradients.")
    adam_epsilon: float = option(1e-8, "AdamW: added to the denominator of a step.")
    momentum: float = option(0.9, "SGD: momentum.")
    nesterov: bool = option(True, "SGD: Nesterov momentum.")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0: never.")
    lr_scheduler_type: Schedule = option("cosine", "Schedule of the rate after the warm-up.")
    warmup_ratio: float = option(0.1, "Share of the steps in which the rate rises from 0.")
    warmup_steps: int = option(0, "Steps in which the rate rises; overrides warmup_ratio.")
    lr_end: float = option(0.0, "Rate at the last step, as a share of learning_rate.")
    lr_power: float = option(2.0, "Exponent of the polynomial schedule.")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The weights that train, and the model's behaviour in training.

    Attributes:
        head_only, layers_to_freeze: Frozen weights.
        linear_probe: The first weights of the head: see linear_probe.py.
        start_share: Share of the start in the last weights, which then are its average with those
            that training gives (Wortsman et al. 2109.01903, section 4).
        lora_r, lora_alpha, lora_targets: Low-rank updates; a rank of 0 for none.
        drop_path, dropout, attention_dropout: Probabilities; None for the checkpoint's own.
        gradient_checkpointing: Compute blocks again in the backward pass.
        ema_decay: Decay of the moving average of weights; 0 for none.
        image_size: Pixels of a side; 0 for the checkpoint's size.
        init: First weights of a new model.
        fit: Photos are resized as the checkpoint does, or squashed to the size.
    """

    head_only: bool = option(False, "Train the head alone; without augmentation in seconds.")
    linear_probe: bool = option(
        False, "Fit a new head to frozen features by logistic regression before the first step."
    )
    start_share: float = option(
        0.0, "Share of the linear probe's weights in the last ones, 0 to 1; without validation."
    )
    layers_to_freeze: int = option(
        0, "Freeze this many layers from the input: the embedding, then the blocks."
    )
    lora_r: int = option(0, "Rank of low-rank updates; 0: train full weights.")
    lora_alpha: float = option(16.0, "Updates are scaled by lora_alpha / lora_r.")
    lora_targets: tuple[LoraTarget, ...] = option(
        ("q", "v"), "Layers with updates, of q k v out fc1 fc2."
    )
    drop_path: float | None = option(
        None, "Stochastic depth of the last block; rises from 0. Default: the checkpoint's."
    )
    dropout: float | None = option(
        None, "Dropout of the embedding and each branch. Default: the checkpoint's."
    )
    attention_dropout: float | None = option(
        None, "Dropout of the attention probabilities. Default: the checkpoint's."
    )
    gradient_checkpointing: bool = option(False, "Less memory, a third more arithmetic.")
    ema_decay: float = option(
        0.0, "Decay of the moving average of weights, which becomes the model; 0: none."
    )
    image_size: int = option(0, "Pixels of a side; 0: the checkpoint's.")
    init: Init = option(
        "mimetic", "First weights of a new model: like trained ones, or DeiT's normal of 0.02."
    )
    fit: FitMode = option(
        "checkpoint", "Resize photos as the checkpoint does, or squash them whole, uncropped."
    )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss function.

    Attributes:
        label_smoothing_factor: Probability spread over all classes, 0 to 0.99.
        weighted_loss: Rule that computes weights from counts; 0 for none.
        class_weights: One weight a class, for one label a photo; empty for none.
        positive_weights: One weight a class, for many labels a photo; empty for none.
    """

    label_smoothing_factor: float = option(0.0, "Share of a label that is spread over all classes.")
    weighted_loss: int = option(
        0, "Weigh rare classes: 1 by the root of their rarity, 2 by their rarity, 0 not."
    )
    class_weights: tuple[float, ...] = option((), "A weight a class, in the labels' order.")
    positive_weights: tuple[float, ...] = option(
        (), "Multi-label: a weight for each class's positives."
    )


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Length of a run, its batches, its data and its checkpoints.

    Attributes:
        num_train_epochs, max_steps: Length of a run; steps override epochs unless -1.
        per_device_train_batch_size, per_device_eval_batch_size, gradient_accumulation_steps:
            Photos of a micro-batch, and micro-batches of a step.
        fsdp, precision: Parallelism and arithmetic.
        seed: Seed of every random draw, 0 to 2**32 - 1.
        dataloader_num_workers, cache, on_bad_image: Reading of photos.
        validation_split, split: Photos held out where no validation set is given.
        eval_epochs, metric_for_best_model, greater_is_better: Evaluation; None for the metric's own
            direction.
        early_stopping_patience, early_stopping_threshold: Early stopping; 0 for none.
        save_steps, save_total_limit: Checkpoints.
        auto: Settings are chosen by the photos: see choice.py.
        tensorboard: Write events for TensorBoard.
    """

    num_train_epochs: int = option(15, "Passes over the training set.")
    max_steps: int = option(-1, "Number of steps, instead of epochs; -1: by epochs.")
    per_device_train_batch_size: int = option(32, "Photos of a process in a micro-batch.")
    per_device_eval_batch_size: int = option(32, "Photos of a process in a batch of evaluation.")
    gradient_accumulation_steps: int = option(1, "Micro-batches of a step.")
    fsdp: bool = option(False, "Shard weights, gradients and averages among the processes (FSDP2).")
    precision: Precision = option(
        "fp32", "Precision of the arithmetic; weights stay fp32. fp16 is for CUDA."
    )
    seed: int = option(42, "Seed of every random draw.")
    dataloader_num_workers: int = option(0, "Processes that read photos; 0: threads of this one.")
    cache: Cache = option("auto", "Cache photos in memory: if they fit, always, never.")
    on_bad_image: BadImage = option("fail", "Stop at a photo that cannot be read, or leave it out.")
    validation_split: float = option(
        0.2, "Share of photos held out where no validation set is given."
    )
    split: Split = option("stratified", "Hold out by class and seed, or every fifth row.")
    eval_epochs: int = option(1, "Epochs between two evaluations.")
    metric_for_best_model: str = option(
        "", "Default: accuracy; multi-label: iou; regression: root_mean_squared_error. Or loss."
    )
    greater_is_better: bool | None = option(None, "Default: true unless a loss or an error.")
    early_stopping_patience: int = option(
        0, "Stop after this many evaluations without a better one; 0: never."
    )
    early_stopping_threshold: float = option(0.0, "Least gain that counts as better.")
    save_steps: int = option(0, "Also save a checkpoint every so many steps; 0: do not.")
    save_total_limit: int = option(2, "Number of latest checkpoints that stay.")
    auto: bool = option(
        False,
        "Choose layers, rate, epochs, augmentation and validation by the photos. Default: if no "
        "setting is given.",
    )
    tensorboard: bool = option(False, "Also write events for TensorBoard.")
