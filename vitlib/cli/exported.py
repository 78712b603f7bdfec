"""Output of `vitlib info` and `vitlib verify` about exported files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vitlib.errors import count_noun

if TYPE_CHECKING:
    from vitlib.checks.exported import ExportedFile
    from vitlib.checks.verdict import Verdict

_SHOWN_LABELS = 3
EXPORTED = (".onnx", ".pt2", ".xml")  # a copy of runtimes.SUFFIXES, whose module needs torch


def is_exported(model: str) -> bool:
    """Return True if the name is that of an exported file.

    Args:
        model: MODEL of the command line.
    """
    return model.lower().endswith(EXPORTED)


def list_file_rows(file: ExportedFile) -> list[tuple[str, str]]:
    """List the facts of an exported file as (name, value).

    Args:
        file: The description.

    Returns:
        The rows of `vitlib info`.
    """
    shape = " x ".join("any" if side is None else str(side) for side in file.input_shape)
    rows = [
        ("source", file.source),
        ("files", f"{', '.join(file.files)}: {file.size:,} bytes"),
        ("format", f"{file.format}, opened by {file.runtime}"),
        ("input", f"{file.input_dtype}, {shape} (images x channels x height x width)"),
        ("outputs", ", ".join(file.outputs)),
    ]
    info, processor = file.info, file.image_processor
    if info is None:
        remedy = "give --preprocess FOLDER and --labels FILE"
        return [*rows, ("labels", f"none: another exporter wrote the file; {remedy}")]
    labels = "; ".join(info.labels[:_SHOWN_LABELS])
    labels += "; …" if len(info.labels) > _SHOWN_LABELS else ""
    has_head = "logits" in info.outputs
    return [
        *rows,
        ("written by", f"vitlib {info.version}, from {info.source or 'a model in memory'}"),
        ("weights", f"sha256 {info.weights_sha256 or 'not stated'}"),
        ("precision", info.precision),
        ("family", info.family),
        ("classes", f"{info.num_classes if has_head else 0}" + (f" ({labels})" if labels else "")),
        ("task", info.task if has_head else "features"),
        ("preprocessing", "none" if processor is None else processor.describe()),
        ("verification", _describe_report(file.verification)),
    ]


def _describe_report(report: dict[str, Any] | None) -> str:
    """Describe the comparison with the model in a line; the file's own text is cut."""
    comparisons = report.get("comparisons") if report else None
    if report is None or not isinstance(comparisons, list):
        return "none"
    errors = [c.get("error") for c in comparisons if isinstance(c, dict)]
    numbers = [error for error in errors if isinstance(error, int | float)]
    worst = f", at most {max(numbers):.2g} apart (max |a - b| / max |b|)" if numbers else ""
    count = count_noun(len(comparisons), "comparison")
    return f"{str(report.get('verdict'))[:20]} in {count} with the model{worst}"


def list_verdict_rows(verdict: Verdict) -> list[tuple[str, str]]:
    """List the comparison of an exported file as (name, value): the largest error an output.

    Args:
        verdict: The verdict on the file.

    Returns:
        The rows of `vitlib verify`.
    """
    largest: dict[str, float] = {}
    for name, error in verdict.errors:
        output = name.partition(" of ")[0]
        largest[output] = max(error, largest.get(output, 0.0))
    count = count_noun(verdict.photos, "photo")
    rows = [("output", f"max |a - b| / max |b|, the largest of {count}")]
    rows += [(name, f"{error:.2g}") for name, error in largest.items()]
    if verdict.not_compared:
        rows.append(("not compared", ", ".join(verdict.not_compared)))
    limit = f"{verdict.tolerance:.2g}"
    if math.isinf(verdict.tolerance):
        limit = "labels that are not in doubt, and cosines: the file is of lower precision"
    rows.append(("tolerance", limit))
    rows.append(("diverges at", verdict.diverges_at or "none"))
    if verdict.diverges_at is not None:
        is_pixels = verdict.diverges_at.startswith("pixels")
        rows.append(("meaning", _PIXELS if is_pixels else _NUMBERS))
    return [*rows, ("verdict", verdict.verdict)]


_PIXELS = (
    "the preprocessing of the file gives other pixels than the model's: compare the two with "
    "vitlib info"
)
_NUMBERS = (
    "from the same pixels the file computes other numbers than the model: see vitlib info for the "
    "checkpoint that it was made from, or export it again"
)
