"""The verb `vitlib audit`: look for what is wrong with a set of photos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitlib.cli.options import (
    ModelOptions,
    embeddings_option,
    features_option,
    json_option,
    model_options,
    precision_options,
)
from vitlib.cli.photos import report_errors
from vitlib.cli.predictors import load_predictor, logs_muted
from vitlib.cli.printing import (
    advise_after_interrupt,
    echo_json,
    is_terminal,
    print_table,
)
from vitlib.cli.verb import Verb
from vitlib.errors import count_noun

if TYPE_CHECKING:
    from vitlib.audit import AuditReport

# Findings of the table, by the name of their count.
TEXTS = {
    "leaked": "in two splits",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "conflicting_groups": "groups with two labels",
    "label_suspects": "doubtful labels",
    "outliers": "unlike the rest",
    "quality": "of odd quality",
}


@click.command(
    cls=Verb,
    examples=(
        "vitlib audit photos -m demo -o audit",
        "vitlib audit photos -m demo --against validation -o audit --fix-list leave-out.csv",
    ),
)
@click.argument("data")
@click.option(
    "--against",
    "other",
    metavar="TEST",
    help="Photos that should not be in DATA, such as the test set: those in both are listed.",
)
@click.option(
    "--multi-label/--single-label",
    default=False,
    help="Several labels per photo, or one.  [default: one]",
)
@click.option("--unlabelled", is_flag=True, help="Read folders as photos without labels.")
@model_options
@precision_options
@click.option(
    "--out",
    "-o",
    required=True,
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the report: new, empty, or with an earlier audit.",
)
@click.option(
    "--fix-list",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the photos to leave out as a .csv, for vitlib finetune --exclude.",
)
@click.option(
    "--next",
    "next_count",
    type=click.IntRange(0),
    metavar="N",
    default=20,
    show_default=True,
    help="Photos to label next.",
)
@click.option(
    "--next-by",
    type=click.Choice(("typicality", "coverage")),
    default="typicality",
    show_default=True,
    help="The most typical photo of each cluster, or the farthest from those before.",
)
@features_option
@embeddings_option
@click.option(
    "--seed",
    type=int,
    metavar="N",
    default=0,
    show_default=True,
    help="Seed of folds and clusters.",
)
@json_option
def audit(
    data: str,
    other: str | None,
    multi_label: bool,
    unlabelled: bool,
    out: Path,
    options: ModelOptions,
    features: Path | None,
    embeddings: Path | None,
    fix_list: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Look for what is wrong with photos: duplicates, leaks, doubtful labels, odd photos.

    DATA is a labelled set (a folder with a folder per class or labels.csv, a .csv or a .jsonl), a
    folder with train/ and val/, or a folder or pattern of photos without labels. OUT/report.html
    holds everything; the lists are CSVs, ranked and with reasons. Nothing is deleted or moved.

    A photo that cannot be read is named on stderr and in the report, and the exit status is 1.
    """
    from vitlib.audit import run
    from vitlib.audit.audit import check_output
    from vitlib.audit.files import begin_report
    from vitlib.audit.source import read_set
    from vitlib.batch.store_embeddings import store_embeddings
    from vitlib.features import open_store

    inputs = [data] if other is None else [data, other]
    check_output(out, inputs, fix_list)
    advise_after_interrupt("the same command goes on where it stopped")
    with logs_muted():
        photos = read_set(data, other, multi_label=multi_label, unlabelled=unlabelled)
        store = open_store(features, out / "features")
        predictor = load_predictor((), options)
        if embeddings is not None and store is not None:
            begin_report(out)
            store_embeddings(embeddings, predictor, store)
        report = run(
            predictor,
            photos,
            out,
            model=options.model,
            store=store,
            fix_list=fix_list,
            batch_size=options.batch_size,
            progress=is_terminal(),
            **settings,
        )
    with report_errors() as failed:
        failed.note_files(report.failed)
        if as_json:
            echo_json(report.as_dict() | {"report": str(out / "report.html")})
        else:
            print_table(_rows(report, fix_list))


def _rows(report: AuditReport, fix_list: Path | None) -> list[tuple[str, str]]:
    """List the findings as (name, value)."""
    data = report.about["data"]
    rows = [
        ("model", report.about["model"]["name"]),
        ("audited", f"{count_noun(data['photos'], 'photo')} of {data['source']}"),
        *((text, str(report.counts[name])) for name, text in TEXTS.items()),
        *(("note", note) for note in report.notes),
    ]
    if fix_list is not None:
        rows.append(("to leave out", str(fix_list)))
    return [*rows, ("report", str(report.folder / "report.html"))]
