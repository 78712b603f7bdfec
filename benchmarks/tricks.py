"""What each trick of vitlib.optimize buys: the whole, and the whole without one of them, in turns.

    python benchmarks/tricks.py [--size B/16] [--batches 1 8] [--rounds 11]

One process, 2 threads, random weights. Every form takes its turn in every round, in reverse order
every other round; the figure is the median of the rounds' ratios to the whole: 1.10 says that the
forward takes 10 % longer without it.
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
from vitlib.fast.linears import FastLinear, PackedLinear, apply_activation
from vitlib.fast.optimization import assemble, cpu_plan
from vitlib.vit import ViT

Form = Callable[[Tensor], Tensor]


def made(model: ViT, precision: str, **changes: object) -> FastViT:
    """The model by the table's path, with some of it changed."""
    way = cpu_plan(precision)._replace(**changes)
    blocks = {f"blocks.{i}": extract_weights(block) for i, block in enumerate(model.blocks)}
    return assemble(model, blocks, way, precision, None)


class Unfused(PackedLinear):
    """A packed linear whose activation or residual comes after it."""

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:  # noqa: ARG002
        return apply_activation(self(x), activation)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class TwoDtypes(PackedLinear):
    """A packed bfloat16 linear added to the float32 residual in one operation of torch's."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class Apart(Int8Linear):
    """An 8-bit linear that never writes into the residual."""

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.add(x, residual)


def torchs_bytes(form: Form) -> Form:
    """With levels converted by torch's own float32 to uint8."""

    def run(images: Tensor) -> Tensor:
        wraps, onednn_ops._int8_cast_wraps = onednn_ops._int8_cast_wraps, lambda: False
        try:
            return form(images)
        finally:
            onednn_ops._int8_cast_wraps = wraps

    return run


def of_class(fast: FastViT, linear: type[FastLinear], *names: str) -> FastViT:
    """With the linears of these names of another class."""
    for block in blocks_of(fast):
        for name in names:
            if type(getattr(block, name)) in linear.__mro__:
                getattr(block, name).__class__ = linear
    return fast


def unfused(fast: FastViT, name: str) -> FastViT:
    """With the linears of one name ("up": GELU; "out", "down": residual) unfused."""
    return of_class(fast, Unfused, name)


def blocks_of(fast: FastViT) -> list[FastBlock]:
    """Every block of a fast model, the two ways of the last one both."""
    return [part for part in fast.trunk.modules() if isinstance(part, FastBlock)]


def not_absorbed(fast: FastViT) -> FastViT:
    """With K and V of the last block computed for all tokens; only the class token asks."""
    last = fast.trunk.blocks[-1]
    if isinstance(last, LastBlock):
        fast.trunk.blocks._modules[str(len(fast.trunk.blocks) - 1)] = last.full_block
    for block in blocks_of(fast):
        block.absorbed = None
    return fast


class EveryToken(nn.Module):
    """A last block that computes all tokens, whoever asks."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(
        self,
        x: Tensor,
        num_queries: int | None = None,  # noqa: ARG002
        attn_pos: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.of(x, None, attn_pos)


def every_token(fast: FastViT) -> FastViT:
    """With the last block as wide as the others."""
    blocks = fast.trunk.blocks
    blocks._modules[str(len(blocks) - 1)] = EveryToken(blocks[-1])
    return fast


def forms(model: ViT, precision: str) -> dict[str, Form]:
    """The whole of a precision first, then without one trick each."""
    if precision == "int8":
        pixels = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with_photos = vitlib.optimize(model, "int8", calibrate=pixels)
        again = vitlib.optimize(model, "int8", calibrate=pixels)
        return {
            "whole": with_photos,
            "scales found for each token": vitlib.optimize(model, "int8"),
            "levels to bytes as torch converts them": torchs_bytes(with_photos),
            "residual never written over": of_class(again, Apart, "down"),
        }
    found: dict[str, Form] = {
        "whole": made(model, precision),
        "linears as torch has them": made(model, precision, packed=False),
        "attention by torch's fused kernel": made(model, precision, attention="fused"),
        "attention as two products and softmax": made(model, precision, attention="linear_weights"),
        "GELU after its linear": unfused(made(model, precision), "up"),
        "last block: K and V of every token": not_absorbed(made(model, precision)),
        "last block: every token": every_token(made(model, precision)),
        "unoptimized": model if precision == "fp32" else in_bfloat16(model),
    }
    if precision == "bf16":
        both = of_class(made(model, precision), TwoDtypes, "out", "down")
        found["residual and bfloat16 added at once"] = both
    if precision == "fp32":
        both = unfused(unfused(made(model, precision), "out"), "down")
        found["residual after its linear"] = both
    return found


def in_bfloat16(model: ViT) -> Form:
    """The model itself, all in bfloat16."""
    copy = vitlib.ViT(model.config).eval()
    copy.load_state_dict(model.state_dict())
    copy.bfloat16()
    return lambda images: copy(images)


def ratios(sides: dict[str, Form], images: Tensor, rounds: int) -> dict[str, float]:
    """Median over rounds of each side's time over that of the whole."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(rounds + 2):  # two that do not count
        for name in sides if count % 2 else reversed(sides):
            start = time.perf_counter()
            sides[name](images)
            if count > 1:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(a / b for a, b in zip(took, seconds["whole"], strict=True))
        for name, took in seconds.items()
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
            sides = forms(model, precision)
            found = [ratios(sides, images, options.rounds) for images in batches]
            for name in sides:
                if name != "whole":
                    print(f"| {precision}: {name} |", *(f"{f[name]:.3f} |" for f in found))


if __name__ == "__main__":
    main()
