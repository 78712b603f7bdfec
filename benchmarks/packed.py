"""Time of photos of many shapes: packed, one by one, padded, and by other ways to attend.

    python benchmarks/packed.py [--models B/16] [--sizes small] [--rounds 9] [--threads 1] [--ways]

16 photos of 8 shapes, two of each. "native" photos have about as many patches as a square photo of
the model's 224 pixels, in eight aspect ratios; "small" ones have 60 to 120 patches. Rounds are
interleaved. Each row has its median, and the median of "one by one" over it in one round: above
1 is faster. One thread is timed in seconds of the CPU, several by the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import groupby, product
from typing import Any

import torch
import torch.nn.functional as F
from setting import SHARED, describe_run
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import vitlib
from vitlib.parts.packed import RunBlock, packed
from vitlib.parts.sequence import AttnPos, Group

GRIDS = {
    "native": [(16, 16), (13, 19), (19, 13), (12, 21), (21, 12), (11, 23), (23, 11), (14, 18)],
    "small": [(9, 9), (7, 9), (9, 7), (8, 11), (11, 8), (6, 10), (10, 6), (10, 12)],
}
NATIVE_16 = [(14, 14), (12, 16), (16, 12), (11, 17), (17, 11), (10, 19), (19, 10), (13, 15)]
Run = Callable[[], Tensor]


def load(name: str) -> vitlib.ViT:
    """Load a model of ../shared, or make one of random weights."""
    if name == "B/16":
        torch.manual_seed(0)
        return vitlib.ViT(vitlib.ViTConfig.named("B/16", num_classes=1000)).eval()
    folders = {"deit-tiny": "deit-tiny-patch16-224", "dinov2-small": "dinov2-small"}
    return vitlib.load(SHARED / "models" / folders[name])


def draw_photos(model: vitlib.ViT, size: str) -> list[Tensor]:
    """Draw pixels of 16 photos of 8 shapes."""
    p, q = model.config.patch_size
    grids = NATIVE_16 if (size, p) == ("native", 16) else GRIDS[size]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, h * p, w * q, generator=generator) for h, w in grids * 2]


class Rows:
    """Rows of the tokens of each image in a sequence.

    Args:
        groups: Groups of the sequence.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.lengths = [g.num_tokens for g in groups for _ in range(g.num_images)]
        lengths = torch.tensor(self.lengths)
        self.offsets = F.pad(lengths.cumsum(0), (1, 0))
        self.mask = torch.arange(max(self.lengths)) < lengths[:, None]  # (n, longest)
        self.image = torch.arange(len(lengths)).repeat_interleave(lengths)  # (S,)


def attend_nested(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Attend by torch's jagged nested tensors, (S, H, K) -> (S, H, K)."""

    def nest(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(x, rows.offsets).transpose(1, 2)

    heads = F.scaled_dot_product_attention(nest(q), nest(k), nest(v))
    return heads.transpose(1, 2).values()


def attend_padded(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Attend on images padded to the longest, with a mask, (S, H, K) -> (S, H, K)."""

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(*rows.mask.shape, *x.shape[1:])
        padded[rows.mask] = x
        return padded.transpose(1, 2)

    mask = rows.mask[:, None, None]
    heads = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), mask)
    return heads.transpose(1, 2)[rows.mask]


def attend_masked(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Attend on the whole sequence, with a block-diagonal mask, (S, H, K) -> (S, H, K)."""
    mask = rows.image[:, None] == rows.image
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask)[0].transpose(0, 1)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Attend by FlexAttention, not compiled, (S, H, K) -> (S, H, K)."""
    length = len(rows.image)
    same = rows.image
    mask: BlockMask = create_block_mask(
        lambda _, __, i, j: same[i] == same[j], None, None, length, length, device="cpu"
    )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask)[0].transpose(0, 1)


Attend = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]
ATTENTIONS: dict[str, Attend] = {
    "of nested tensors": attend_nested,
    "padded, with a mask": attend_padded,
    "of the sequence, with a mask": attend_masked,
    "by FlexAttention, not compiled": attend_flex,
}


def run_with(attend: Attend) -> RunBlock:
    """Return a function that runs a block as `packed` does, but attends by another function."""

    def run(block: Any, x: Tensor, groups: Sequence[Group], _: AttnPos) -> Tensor:
        rows, attn, y = Rows(groups), block.attn, block.norm1(x)
        q, k, v = (
            layer(y)[0].unflatten(1, (attn.num_heads, -1)) for layer in (attn.q, attn.k, attn.v)
        )
        y = attn.proj(attend(q, k, v, rows).flatten(1)[None])
        x = x + block.residual(y, block.ls1, 1)
        return x + block.residual(block.mlp(block.norm2(x)), block.ls2, 3)

    return run


def pad_photos(model: vitlib.ViT, images: Sequence[Tensor]) -> Tensor:
    """Compute logits of photos padded to the longest, with a mask of the keys."""
    same_shape = groupby(sorted(images, key=lambda x: x.shape), lambda x: x.shape)
    batches = [model.patch_embed(torch.stack(list(same))) for _, same in same_shape]
    longest = max(x.shape[1] for x in batches)
    lengths = torch.tensor([x.shape[1] for x in batches for _ in x])
    x = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in batches])
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
    block: Any
    for index, block in enumerate(model.blocks):
        queries = model.count_queries() if index == len(model.blocks) - 1 else None
        y, attn = block.norm1(x), block.attn
        q, k, _ = attn.project_qk(y, queries, None)
        heads = F.scaled_dot_product_attention(q, k, attn.split_heads(attn.v(y)), mask)
        y = attn.proj(heads.transpose(1, 2).flatten(2))
        x = x[:, :queries] + block.residual(y, block.ls1, 1)
        x = x + block.residual(block.mlp(block.norm2(x)), block.ls2, 3)
    return model.forward_head(model.norm(x))


def batch_shapes(model: vitlib.ViT, images: Sequence[Tensor]) -> Tensor:
    """Compute logits of the photos of each shape as a batch."""
    same_shape = groupby(sorted(images, key=lambda x: x.shape), lambda x: x.shape)
    return torch.cat([model(torch.stack(list(same))) for _, same in same_shape])


def list_runs(model: vitlib.ViT, images: Sequence[Tensor], ways: bool) -> dict[str, Run]:
    """List what is timed, by name; the first is what the ratios are to."""
    fast, bf16 = vitlib.optimize(model), vitlib.optimize(model, "bf16")
    runs: dict[str, Run] = {
        "one by one": lambda: torch.cat([model(image[None]) for image in images]),
        "packed, tokens=False": lambda: model.packed(images, tokens=False).logits,
        "packed": lambda: model.packed(images).logits,
        "a batch a shape": lambda: batch_shapes(model, images),
        "padded": lambda: pad_photos(model, images),
        "optimized, one by one": lambda: torch.cat([fast(image[None]) for image in images]),
        "optimized, packed, tokens=False": lambda: fast.packed(images, tokens=False).logits,
        "bf16, one by one": lambda: torch.cat([bf16(image[None]) for image in images]),
        "bf16, packed, tokens=False": lambda: bf16.packed(images, tokens=False).logits,
    }

    if not ways:
        return runs

    def pack(attend: Attend | None, max_tokens: int | None) -> Run:
        run = None if attend is None else run_with(attend)
        settings: dict[str, Any] = {"run": run, "max_tokens": max_tokens, "tokens": False}
        return lambda: packed(model, images, **settings).logits

    for tokens in (400, 1600, 100_000):
        runs[f"packed, sequences of {tokens} tokens"] = pack(None, tokens)
    for name, attend in ATTENTIONS.items():
        runs[f"packed, attention {name}"] = pack(attend, None)
    return runs


def main() -> None:
    """Print a table of ratios for each model and size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["deit-tiny", "dinov2-small", "B/16"])
    parser.add_argument("--sizes", nargs="+", default=list(GRIDS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", action="store_true", help="also time other ways to pack")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(describe_run({"torch": torch.__version__}), f"threads: {args.threads}", sep="\n")
    for name, size in product(args.models, args.sizes):
        model = load(name)
        runs = list_runs(model, draw_photos(model, size), args.ways)
        times: dict[str, list[float]] = {run: [] for run in runs}
        with torch.no_grad():
            for turn in range(args.rounds + 1):  # the first warms up
                for run, function in runs.items():
                    start = clock()
                    function()
                    if turn:
                        times[run].append(clock() - start)
        first = times["one by one"]
        print(f"\n{name}, {size} photos\n\n| run | ms | one by one / run |\n|---|--:|--:|")
        for run, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(first, seconds, strict=True))
            print(f"| {run} | {1e3 * statistics.median(seconds):.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
