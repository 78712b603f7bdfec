"""The verb `vitlib verify`: compare a checkpoint with a reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitlib.cli.exported import is_exported, list_verdict_rows
from vitlib.cli.options import SourceOptions, json_option, source_options, subject_option
from vitlib.cli.photos import list_photos
from vitlib.cli.predictors import logs_muted, mute_libraries
from vitlib.cli.printing import echo_json, print_table
from vitlib.cli.verb import Verb, positional_arguments

if TYPE_CHECKING:
    from vitlib.checks import Verdict


@click.command(cls=Verb, examples=("vitlib verify demo", "vitlib verify mine --against mine"))
@positional_arguments("MODEL")
@subject_option
@click.option(
    "--against",
    metavar="transformers|timm|FILE",
    help="Library to compare with, where it is installed, or another checkpoint.",
)
@click.option(
    "--photos",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Photos to compare an exported file on. Default: ten in the package.",
)
@source_options
@json_option
def verify(
    model: str,
    against: str | None,
    photos: Path | None,
    reading: SourceOptions,
    as_json: bool,
) -> None:
    """Compare a checkpoint with a reference, or check its tensors.

    With --against, both models get the same pixels. Their tokens are compared after the embedding,
    after each block and at the end. Without it, the tensors are checked for layers that training
    does not produce, and facts that neither a file nor a tensor states are listed. Exit status 1
    where the two diverge, or a tensor is suspicious.

    An exported file (.onnx, .pt2, .xml) is compared with the model by its outputs on photos. The
    first output and photo that differ are named.
    """
    from vitlib import checks

    if photos is not None and not is_exported(model):
        raise click.UsageError("--photos is for an exported file: leave it out")
    mute_libraries()
    with logs_muted():
        verdict = checks.verify(
            model,
            against=against,
            photos=None if photos is None else list_photos(photos, "--photos"),
            **reading,
        )
    if as_json:
        echo_json(verdict.as_dict())
    else:
        print_table(list_verdict_rows(verdict) if verdict.photos else _rows(verdict))
    if not verdict.ok:
        sys.exit(1)


def _rows(verdict: Verdict) -> list[tuple[str, str]]:
    """List the result as (name, value)."""
    if verdict.against is None:
        rows = [(finding.what, finding.tensors) for finding in verdict.findings]
        if verdict.unverified:
            rows.append(("unverified", ", ".join(verdict.unverified)))
        return [*rows, ("verdict", verdict.verdict)]
    rows = [("after", "max |a - b| / max |b|")]
    for name, error in verdict.errors:
        mark = "  <- first above the tolerance" if name == verdict.diverges_at else ""
        rows.append((name, f"{error:.2g}{mark}"))
    if verdict.not_compared:
        rows.append(("not compared", ", ".join(verdict.not_compared)))
    rows.append(("tolerance", f"{verdict.tolerance:.2g}"))
    rows.append(("diverges at", verdict.diverges_at or "none"))
    if verdict.diverges_at:
        rows.append(("meaning", _explain(verdict)))
    return [*rows, ("verdict", verdict.verdict)]


def _explain(verdict: Verdict) -> str:
    """Explain a divergence: how large it is, what can make it, and what to do."""
    error = dict(verdict.errors)[verdict.diverges_at or ""]
    share = f"{100 * error:.2g} % of the largest value" if error < 1 else "as large as the values"
    causes = {
        "embedding": "pixels, patches or positions: compare image size, normalisation and the "
        "patch projection",
        "norm": "the final norm: compare its eps and weights",
        "logits": "the head: compare its weights and the pooling",
    }.get(
        verdict.diverges_at or "", "this block: compare its weights, the eps, GELU form and heads"
    )
    small = error < 1e-4
    return (
        f"the first difference above the tolerance is {share}; it is made in {causes}"
        f"{' (so small a difference is often eps or the GELU form)' if small else ''}; "
        "see vitlib info for what was read"
    )
