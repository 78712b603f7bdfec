"""Tables of the results of compare.py: speed, memory, start, ratios and goals."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from setting import markdown_table

# Name of the side that multiplies bare matrices, and the work of one product.
GEMM = "best GEMM"
GEMM_GFLOP = 2 * 1576 * 768 * 3072 / 1e9
# vitlib's main side in each precision; ratios compare it with the others.
VITLIB_SIDES = {"fp32": "vitlib", "bf16": "vitlib bf16", "int8": "vitlib int8"}
GOAL_MODEL = "B/16"
# Precision, batch sizes, the other side, and the least speedup of vitlib over it.
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
# Least share of the GEMM rate; largest share of transformers' memory, and its batch size.
GEMM_GOAL, MEMORY_GOAL, MEMORY_BATCH = 0.92, 0.5, 32


@dataclass
class Start:
    """Measurements of a side's start.

    Attributes:
        load_seconds: Seconds to load the model, for each process.
        first_answer_seconds: Seconds from the process start to the first answer, for each process.
        load_mib: Peak anonymous memory while loading, above that before it.
        logits: Output for one image.
    """

    load_seconds: list[float] = field(default_factory=list)
    first_answer_seconds: list[float] = field(default_factory=list)
    load_mib: float = 0.0
    logits: list[float] = field(default_factory=list)


@dataclass
class Memory:
    """Memory of a process that runs a batch size.

    Attributes:
        peak_mib: Peak anonymous memory.
        before_mib: Anonymous memory before the model was loaded.
        mapped_mib: Resident pages of mapped files.
    """

    peak_mib: float
    before_mib: float
    mapped_mib: float

    @property
    def grown_mib(self) -> float:
        return self.peak_mib - self.before_mib


@dataclass
class Group:
    """Results of one model in one precision, with all sides interleaved.

    Attributes:
        model: Name of the model.
        precision: "fp32", "bf16" or "int8".
        gflop: Nominal GFLOP of one image.
        weights_mib: Size of the checkpoint.
        starts: Start of each side.
        seconds: Seconds of calls: batch size -> side -> round -> calls.
        memory: Memory by batch size and side.
        left_out: Reason why a side was not measured.
    """

    model: str
    precision: str
    gflop: float
    weights_mib: float
    starts: dict[str, Start] = field(default_factory=dict)
    seconds: dict[int, dict[str, list[list[float]]]] = field(default_factory=dict)
    memory: dict[int, dict[str, Memory]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def vitlib_side(self) -> str:
        return VITLIB_SIDES[self.precision]

    def speedup(self, batch: int, side: str, own: str = "") -> float | None:
        """Return the speedup of vitlib over a side: the median of the rounds' ratios.

        It is None if either was not measured.

        Args:
            batch: Batch size.
            side: Name of the side.
            own: The side of vitlib's; "" for vitlib_side.
        """
        sides, own = self.seconds.get(batch, {}), own or self.vitlib_side
        if side not in sides or own not in sides:
            return None
        pairs = zip(sides[side], sides[own], strict=True)
        return statistics.median(median(peer) / median(ours) for peer, ours in pairs)

    def gemm_share(self, batch: int, side: str) -> float | None:
        """Return a side's GFLOP/s over that of the GEMM in the same rounds; None if not measured.

        The work of an image is its nominal work.
        """
        sides = self.seconds.get(batch, {})
        if side not in sides or GEMM not in sides:
            return None
        work = batch * self.gflop / GEMM_GFLOP
        pairs = zip(sides[side], sides[GEMM], strict=True)
        return statistics.median(work * median(gemm) / median(own) for own, gemm in pairs)

    def extra_mib(self, batch: int, side: str, *, includes_load: bool = False) -> float | None:
        """Return the peak memory beyond the checkpoint's weights, in MiB; None if not measured.

        The weights may be mapped, copied or packed.

        Args:
            batch: Batch size.
            side: Name of the side.
            includes_load: Count from the load on, not only while the batch runs.
        """
        memory = self.memory.get(batch, {}).get(side)
        if memory is None:
            return None
        grown = max(memory.grown_mib, self.starts[side].load_mib if includes_load else 0.0)
        return grown + memory.mapped_mib - self.weights_mib


median = statistics.median


def percentile(values: list[float], share: float) -> float:
    """Return the value that a share of the values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def format_value(value: float | None, spec: str = ".2f", suffix: str = "") -> str:
    """Format a number; "" for None."""
    return "" if value is None else f"{value:{spec}}{suffix}"


def format_percent(value: float | None) -> str:
    """Format a share as a percentage; "" for None."""
    return "" if value is None else f"{100 * value:.0f} %"


def speed_table(group: Group) -> str:
    """Build the table of speed and memory, with a row for each batch size and side."""
    header = ("batch", "side", "img/s", "p50", "p99 (calls)", "speedup of vitlib",
            "share of GEMM rate", "peak", "growth")  # fmt: skip
    rows = []
    for batch, sides in group.seconds.items():
        for side, rounds in sides.items():
            calls = [call for turn in rounds for call in turn]
            if side == GEMM:
                rates = [GEMM_GFLOP / median(turn) for turn in rounds]
                rate_text = f"{median(rates):.0f} GFLOP/s, best round {max(rates):.0f}"
                rows.append((str(batch), side, rate_text, *[""] * 6))
                continue
            memory, speedup = group.memory[batch][side], group.speedup(batch, side)
            rows.append(
                (
                    str(batch),
                    side,
                    f"{batch / median([median(turn) for turn in rounds]):.1f}",
                    f"{1e3 * percentile(calls, 0.5):.1f} ms",
                    f"{1e3 * percentile(calls, 0.99):.1f} ms ({len(calls)})",
                    "" if side == group.vitlib_side else format_value(speedup),
                    format_percent(group.gemm_share(batch, side))
                    if side.startswith("vitlib")
                    else "",
                    f"{memory.peak_mib:.0f} MiB",
                    f"{memory.grown_mib:.0f} MiB",
                )
            )
    return markdown_table(header, rows, num_text_columns=2)


def start_table(group: Group) -> str:
    """Build the table of load time, start time and error against the reference."""
    reference = group.starts.get("transformers")
    rows = []
    for side, start in group.starts.items():
        if side == GEMM:
            continue
        error = ""
        if reference and reference.logits and len(start.logits) == len(reference.logits):
            largest = max(map(abs, reference.logits)) or 1.0
            pairs = zip(start.logits, reference.logits, strict=True)
            error = f"{max(abs(a - b) for a, b in pairs) / largest:.0e}"
        load, first = median(start.load_seconds), median(start.first_answer_seconds)
        rows.append((side, f"{load:.2f} s", f"{first:.2f} s", f"{start.load_mib:.0f} MiB", error))
    header = (
        "side",
        "load",
        "process start to first output",
        "growth while loading",
        "output error",
    )
    return markdown_table(header, rows)


def goal_table(groups: list[Group]) -> str:
    """Build the table of the goals for ViT-B/16, as far as they were measured."""
    rows = []
    measured = {group.precision: group for group in groups if group.model == GOAL_MODEL}
    for precision, batches, peer, goal in GOALS:
        for batch in batches:
            speedup = measured[precision].speedup(batch, peer) if precision in measured else None
            if speedup is not None:
                description = f"{precision}, batch {batch}, speedup over {peer}"
                rows.append(
                    (description, f">= {goal}", f"{speedup:.2f}", format_verdict(speedup >= goal))
                )
    fp32 = measured.get("fp32")
    for batch in (1, 8) if fp32 else ():
        gemm_share = fp32.gemm_share(batch, fp32.vitlib_side)
        if gemm_share is not None:
            description = f"fp32, batch {batch}, share of the GEMM rate"
            rows.append(
                (
                    description,
                    f">= {format_percent(GEMM_GOAL)}",
                    format_percent(gemm_share),
                    format_verdict(gemm_share >= GEMM_GOAL),
                )
            )
    for includes_load in (False, True) if fp32 else ():
        vitlib_mib = fp32.extra_mib(MEMORY_BATCH, fp32.vitlib_side, includes_load=includes_load)
        peer_mib = fp32.extra_mib(MEMORY_BATCH, "transformers", includes_load=includes_load)
        if vitlib_mib is not None and peer_mib is not None:
            period = "from the load on" if includes_load else "while running"
            description = f"fp32, batch {MEMORY_BATCH}, memory beyond the weights, {period}"
            value_text = (
                f"{vitlib_mib:.0f} of {peer_mib:.0f} MiB: {format_percent(vitlib_mib / peer_mib)}"
            )
            rows.append(
                (
                    description,
                    f"<= {format_percent(MEMORY_GOAL)}",
                    value_text,
                    format_verdict(vitlib_mib <= MEMORY_GOAL * peer_mib),
                )
            )
    if not rows:
        return ""
    return f"## Goals, ViT-{GOAL_MODEL}\n\n" + markdown_table(
        ("metric", "goal", "result", "verdict"), rows
    )


def format_verdict(is_met: bool) -> str:
    """Format the verdict on a goal."""
    return "met" if is_met else "**not met**"


NOTES = """
All sides are interleaved in one run, each in its own process. img/s and p50 are medians. "Speedup
of vitlib" is the median of the rounds' ratios. "Share of GEMM rate" compares the nominal work of an
image with the best product of 1576 x 768 x 3072 in the same round and precision. The p99 of fewer
than 100 calls is the slowest call. "Peak" is resident anonymous memory. "Growth" is the peak above
the same process before it loaded the model. Memory beyond the weights is the growth, plus mapped
pages of the checkpoint, minus the size of the checkpoint. "Load" starts at a saved file and ends at
a model that can run. For vitlib it includes packing, and for vitlib int8 quantization; the peers'
8-bit files are made before. "Output error" is the largest difference from transformers' float32
output for one image, over its largest value. timm's files cannot store transformers' epsilon
(1e-12), nor the same resizing of positions. "bf16 matmul" lets oneDNN multiply float32 as bfloat16.
If its output has no error, this CPU did not use bfloat16.
"""


def report(header: str, groups: list[Group], skipped: dict[str, str]) -> str:
    """Build the whole report in Markdown.

    Args:
        header: Description of the run.
        groups: Results.
        skipped: Reason why a model was skipped, by name.
    """
    parts = [header, NOTES.strip(), goal_table(groups)]
    for group in groups:
        title = f"ViT-{group.model}" if "/" in group.model else group.model
        parts.append(f"## {title}, {group.precision} ({group.gflop:.2f} GFLOP an image)")
        parts += [speed_table(group), start_table(group)]
        reasons = [f"- {name}: {reason}" for name, reason in group.left_out.items()]
        parts.append("Left out:\n\n" + "\n".join(reasons) if reasons else "")
    reasons = [f"- {name}: {reason}" for name, reason in skipped.items()]
    parts.append("Skipped:\n\n" + "\n".join(reasons) if reasons else "")
    return "\n\n".join(part for part in parts if part) + "\n"
