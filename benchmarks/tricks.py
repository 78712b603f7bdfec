"""Gain of each optimization in vitlib.optimize: the forward without it over the forward with all.

    python benchmarks/tricks.py [--size B/16] [--batches 1 8] [--rounds 11]

All forms run in one process with 2 threads and random weights. They are interleaved, in reverse
order every other round. Figures are medians of the rounds' time ratios: 1.10 says that the forward
takes 10 % longer without the optimization.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import vitlib
from vitlib.fast import FastViT, onednn_ops
from vitlib.fast.block import FastBlock, LastBlock, extract_weights
from vitlib.fast.int8_linears import Int8Linear
from vitlib.fast.int8_quantization import quantize_weights
from vitlib.fast.linears import FastLinear, PackedLinear, apply_activation
from vitlib.fast.optimization import assemble, cpu_plan
from vitlib.fast.stock_blocks import StockBlocks
from vitlib.vit import ViT

WARMUP = 2  # rounds before the timed ones
Form = Callable[[Tensor], Tensor]


def assemble_model(model: ViT, precision: str, **changes: object) -> FastViT:
    """Optimize a model by this CPU's plan, with some fields of the plan changed."""
    plan = cpu_plan(precision)._replace(**changes)
    blocks = {f"blocks.{i}": extract_weights(block) for i, block in enumerate(model.blocks)}
    return assemble(model, blocks, plan, precision, None)


class UnfusedLinear(PackedLinear):
    """A packed linear with a separate operation for its activation or residual."""

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:  # noqa: ARG002
        return apply_activation(self(x), activation)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class MixedDtypeLinear(PackedLinear):
    """A packed bfloat16 linear that torch adds to the float32 residual."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class OutOfPlaceInt8Linear(Int8Linear):
    """An int8 linear that never overwrites the residual."""

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.add(x, residual)


def with_torch_cast(form: Form) -> Form:
    """Run a form with torch's own conversion of float32 to uint8."""

    def forward(images: Tensor) -> Tensor:
        wraps, onednn_ops._int8_cast_wraps = onednn_ops._int8_cast_wraps, lambda: False
        try:
            return form(images)
        finally:
            onednn_ops._int8_cast_wraps = wraps

    return forward


def replace_linears(fast: FastViT, linear_class: type[FastLinear], *names: str) -> FastViT:
    """Change the class of the linears with these names, and return the model."""
    for block in fast_blocks(fast):
        for name in names:
            if type(getattr(block, name)) in linear_class.__mro__:
                getattr(block, name).__class__ = linear_class
    return fast


def unfuse(fast: FastViT, name: str) -> FastViT:
    """Unfuse the linears of a name: "up" (GELU), "out" or "down" (residual)."""
    return replace_linears(fast, UnfusedLinear, name)


def fast_blocks(fast: FastViT) -> list[FastBlock]:
    """List all blocks of a fast model, with both forms of the last block."""
    return [part for part in fast.trunk.modules() if isinstance(part, FastBlock)]


def unabsorb(fast: FastViT) -> FastViT:
    """Compute K and V of the last block for all tokens.

    The optimized block absorbs them into the few queries that the head needs.
    """
    last_block = fast.trunk.blocks[-1]
    if isinstance(last_block, LastBlock):
        fast.trunk.blocks._modules[str(len(fast.trunk.blocks) - 1)] = last_block.full_block
    for block in fast_blocks(fast):
        block.absorbed = None
    return fast


class AllTokensBlock(nn.Module):
    """A last block that computes all tokens, also for fewer queries."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        x: Tensor,
        num_queries: int | None = None,  # noqa: ARG002
        attn_pos: Tensor | None = None,
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.block(x, None, attn_pos)


def compute_all_tokens(fast: FastViT) -> FastViT:
    """Replace the last block by one that computes all tokens."""
    blocks = fast.trunk.blocks
    blocks._modules[str(len(blocks) - 1)] = AllTokensBlock(blocks[-1])
    return fast


def quantize_each_token(model: ViT) -> FastViT:
    """Make an int8 model that computes a scale for each token, as blocks with late norms do."""
    blocks = dict(StockBlocks(model))
    for block in list(blocks.values())[1:]:
        block.linears = {name: quantize_weights(w) for name, w in block.linears.items()}
    return assemble(model, blocks, cpu_plan("int8"), "int8", None)


def make_forms(model: ViT, precision: str) -> dict[str, Form]:
    """Map names to the forms of a precision: "all" first, then each without one optimization."""
    if precision == "int8":
        pixels = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
        calibrated = vitlib.optimize(model, "int8", calibrate=pixels)
        int8_model = vitlib.optimize(model, "int8", calibrate=pixels)
        return {
            "all": calibrated,
            "dynamic scales for each token": quantize_each_token(model),
            "torch's conversion to uint8": with_torch_cast(calibrated),
            "residual out of place": replace_linears(int8_model, OutOfPlaceInt8Linear, "down"),
        }
    forms: dict[str, Form] = {
        "all": assemble_model(model, precision),
        "torch's own linears": assemble_model(model, precision, packed=False),
        "torch's fused attention kernel": assemble_model(model, precision, attention="fused"),
        "attention as two products and softmax": assemble_model(model, precision, attention="bmm"),
        "GELU as a separate operation": unfuse(assemble_model(model, precision), "up"),
        "last block: K and V of all tokens": unabsorb(assemble_model(model, precision)),
        "last block: all tokens": compute_all_tokens(assemble_model(model, precision)),
        "unoptimized": model if precision == "fp32" else bfloat16_model(model),
    }
    if precision == "bf16":
        unfused_model = replace_linears(
            assemble_model(model, precision), MixedDtypeLinear, "out", "down"
        )
        forms["bfloat16 added to the float32 residual"] = unfused_model
    if precision == "fp32":
        unfused_model = unfuse(unfuse(assemble_model(model, precision), "out"), "down")
        forms["residual as a separate operation"] = unfused_model
    return forms


def bfloat16_model(model: ViT) -> Form:
    """Return a copy of the model in bfloat16."""
    model_copy = vitlib.ViT(model.config).eval()
    model_copy.load_state_dict(model.state_dict())
    model_copy.bfloat16()
    return lambda images: model_copy(images)


def time_ratios(forms: dict[str, Form], images: Tensor, rounds: int) -> dict[str, float]:
    """Return the median over the rounds of each form's time over that of "all"."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for round_index in range(rounds + WARMUP):
        for name in forms if round_index % 2 else reversed(forms):
            start = time.perf_counter()
            forms[name](images)
            if round_index >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(a / b for a, b in zip(times, seconds["all"], strict=True))
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="B/16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8"])
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = vitlib.ViT(vitlib.ViTConfig.named(options.size, num_classes=1000)).eval()
    batches = [torch.randn(n, 3, 224, 224) for n in options.batches]
    print(f"| without, {options.size} |", *(f"batch {n} |" for n in options.batches))
    print("|---|" + "--:|" * len(batches))
    with torch.inference_mode():
        for precision in options.precisions:
            forms = make_forms(model, precision)
            ratios = [time_ratios(forms, images, options.rounds) for images in batches]
            for name in forms:
                if name != "all":
                    print(
                        f"| {precision}: {name} |", *(f"{values[name]:.3f} |" for values in ratios)
                    )


if __name__ == "__main__":
    main()
