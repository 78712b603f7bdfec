"""What compare.py measured, and how it is told: tables, ratios by round, goals."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from setting import table

GEMM = "best GEMM"
GEMM_GFLOP = 2 * 1576 * 768 * 3072 / 1e9
OURS = {"fp32": "vitlib", "bf16": "vitlib bf16", "int8": "vitlib int8"}
MODEL_OF_GOALS = "B/16"
# Precision, batches, the other side, and how many times as fast vitlib should be.
GOALS = (
    ("fp32", (1, 8), "transformers", 2.3),
    ("fp32", (1, 8), "timm", 2.3),
    ("fp32", (1, 8), "ONNX Runtime", 1.15),
    ("fp32", (1, 8), "OpenVINO", 1.05),
    ("bf16", (8,), "transformers bf16", 1.3),
    ("bf16", (8,), "OpenVINO bf16", 1.05),
    ("int8", (8,), "OpenVINO int8", 1.05),
    ("int8", (8,), "transformers", 6.0),
)
GEMM_GOAL, MEMORY_GOAL, MEMORY_BATCH = 0.92, 0.5, 32


@dataclass
class Start:
    """A side's beginnings: seconds of each of its processes; its logits of one image."""

    load: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # process start to the first answer
    grown: float = 0.0  # anonymous memory, at most, while it loaded, above what it had before; MiB
    logits: list[float] = field(default_factory=list)


@dataclass
class Memory:
    """MiB while a batch ran: anonymous at most, before the model was loaded, and files mapped."""

    peak: float
    before: float
    mapped: float

    @property
    def grown(self) -> float:
        return self.peak - self.before


@dataclass
class Group:
    """One model in one precision, all sides in turns. Seconds: batch -> side -> round -> calls."""

    model: str
    precision: str
    gflop: float  # an image
    weights: float  # MiB of the checkpoint
    starts: dict[str, Start] = field(default_factory=dict)
    seconds: dict[int, dict[str, list[list[float]]]] = field(default_factory=dict)
    memory: dict[int, dict[str, Memory]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        return OURS[self.precision]

    def ratio(self, batch: int, name: str) -> float | None:
        """How many times as fast as `name` vitlib is: the median of the rounds' ratios."""
        sides = self.seconds.get(batch, {})
        if name not in sides or self.ours not in sides:
            return None
        pairs = zip(sides[name], sides[self.ours], strict=True)
        return statistics.median(middle(theirs) / middle(ours) for theirs, ours in pairs)

    def share(self, batch: int, name: str) -> float | None:
        """GFLOP/s of a side, an image counted in full, over the GEMM's of the same round."""
        sides = self.seconds.get(batch, {})
        if name not in sides or GEMM not in sides:
            return None
        work = batch * self.gflop / GEMM_GFLOP
        pairs = zip(sides[name], sides[GEMM], strict=True)
        return statistics.median(work * middle(gemm) / middle(own) for own, gemm in pairs)

    def beyond(self, batch: int, name: str, *, loading: bool = False) -> float | None:
        """MiB at most beyond the checkpoint's weights, wherever those lie: mapped, copied, packed.

        loading: counted from the load on, and not only while the batch runs.
        """
        memory = self.memory.get(batch, {}).get(name)
        if memory is None:
            return None
        grown = max(memory.grown, self.starts[name].grown if loading else 0.0)
        return grown + memory.mapped - self.weights


middle = statistics.median


def rank(values: list[float], share: float) -> float:
    """The value that `share` of the others do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def shown(value: float | None, form: str = ".2f", after: str = "") -> str:
    return "" if value is None else f"{value:{form}}{after}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def speeds(group: Group) -> str:
    """A row for each batch and side."""
    head = ("batch", "side", "img/s", "p50", "p99 (of calls)", "vitlib / side", "of GEMM rate",
            "peak", "grown")  # fmt: skip
    rows = []
    for batch, sides in group.seconds.items():
        for name, rounds in sides.items():
            calls = [call for turn in rounds for call in turn]
            if name == GEMM:
                rates = [GEMM_GFLOP / middle(turn) for turn in rounds]
                told = f"{middle(rates):.0f} GFLOP/s, best turn {max(rates):.0f}"
                rows.append((str(batch), name, told, *[""] * 6))
                continue
            memory, ratio = group.memory[batch][name], group.ratio(batch, name)
            rows.append(
                (
                    str(batch),
                    name,
                    f"{batch / middle([middle(turn) for turn in rounds]):.1f}",
                    f"{1e3 * rank(calls, 0.5):.1f} ms",
                    f"{1e3 * rank(calls, 0.99):.1f} ms ({len(calls)})",
                    "" if name == group.ours else shown(ratio),
                    percent(group.share(batch, name)) if name.startswith("vitlib") else "",
                    f"{memory.peak:.0f} MiB",
                    f"{memory.grown:.0f} MiB",
                )
            )
    return table(head, rows, words=2)


def beginnings(group: Group) -> str:
    """Load and start-up of each side, and how far its answer is from the reference's."""
    reference = group.starts.get("transformers")
    rows = []
    for name, start in group.starts.items():
        if name == GEMM:
            continue
        apart = ""
        if reference and reference.logits and len(start.logits) == len(reference.logits):
            most = max(map(abs, reference.logits)) or 1.0
            pairs = zip(start.logits, reference.logits, strict=True)
            apart = f"{max(abs(a - b) for a, b in pairs) / most:.0e}"
        load, first = middle(start.load), middle(start.first)
        rows.append((name, f"{load:.2f} s", f"{first:.2f} s", f"{start.grown:.0f} MiB", apart))
    head = ("side", "load", "process start to first answer", "grown while loading", "answer apart")
    return table(head, rows)


def goals(groups: list[Group]) -> str:
    """The issue's goals for ViT-B/16, as far as this run can say."""
    rows = []
    found = {group.precision: group for group in groups if group.model == MODEL_OF_GOALS}
    for precision, batches, name, goal in GOALS:
        for batch in batches:
            ratio = found[precision].ratio(batch, name) if precision in found else None
            if ratio is not None:
                what = f"{precision}, batch {batch}, vitlib / {name}"
                rows.append((what, f">= {goal}", f"{ratio:.2f}", met(ratio >= goal)))
    fp32 = found.get("fp32")
    for batch in (1, 8) if fp32 else ():
        share = fp32.share(batch, fp32.ours)
        if share is not None:
            what = f"fp32, batch {batch}, share of the GEMM rate"
            rows.append((what, f">= {percent(GEMM_GOAL)}", percent(share), met(share >= GEMM_GOAL)))
    for loading in (False, True) if fp32 else ():
        ours = fp32.beyond(MEMORY_BATCH, fp32.ours, loading=loading)
        theirs = fp32.beyond(MEMORY_BATCH, "transformers", loading=loading)
        if ours is not None and theirs is not None:
            when = "from the load on" if loading else "while it runs"
            what = f"fp32, batch {MEMORY_BATCH}, memory beyond the weights, {when}"
            told = f"{ours:.0f} of {theirs:.0f} MiB: {percent(ours / theirs)}"
            rows.append(
                (what, f"<= {percent(MEMORY_GOAL)}", told, met(ours <= MEMORY_GOAL * theirs))
            )
    if not rows:
        return ""
    return f"## Goals, ViT-{MODEL_OF_GOALS}\n\n" + table(("what", "goal", "here", ""), rows)


def met(reached: bool) -> str:
    return "met" if reached else "**not met**"


EXPLAINED = """
Every figure is taken in turns in one run, each side in a process of its own. img/s and p50 are
medians; "vitlib / side" is how many times as fast as that side vitlib is, the median of the rounds'
ratios; "of GEMM rate" counts the nominal work of an image against the best product of
1576 x 768 x 3072 in the same round and precision. p99 of fewer than 100 calls is the slowest call.
Peak: anonymous memory resident; grown: above the same process before it loaded the model. Beyond
the weights: grown, plus what is mapped of the checkpoint's file, less the checkpoint. Load: a
saved file to a model that can run, which for vitlib includes packing, and for vitlib int8
quantising (the peers' 8-bit files were made before). Answer apart: the largest difference from
transformers' answer for one image in float32, over the largest value; timm's files cannot hold
transformers' epsilon (1e-12), nor the same resizing of positions. "bf16 matmul" lets oneDNN
multiply float32 as bfloat16: where the answer is not apart, this CPU did not.
"""


def report(head: str, groups: list[Group], skipped: dict[str, str]) -> str:
    """The whole of it as Markdown."""
    parts = [head, EXPLAINED.strip(), goals(groups)]
    for group in groups:
        title = f"ViT-{group.model}" if "/" in group.model else group.model
        parts.append(f"## {title}, {group.precision} ({group.gflop:.2f} GFLOP an image)")
        parts += [speeds(group), beginnings(group)]
        left = [f"- {name}: {why}" for name, why in group.left_out.items()]
        parts.append("Left out:\n\n" + "\n".join(left) if left else "")
    listed = [f"- {name}: {why}" for name, why in skipped.items()]
    parts.append("Skipped:\n\n" + "\n".join(listed) if listed else "")
    return "\n\n".join(part for part in parts if part) + "\n"
