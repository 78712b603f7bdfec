"""The verb `vitlib probe`: measure frozen features on labelled photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from vitlib.cli.options import (
    DEFAULT_MODEL,
    ModelOptions,
    SourceOptions,
    batch_size_option,
    device_option,
    embeddings_option,
    features_option,
    image_size_option,
    json_option,
)
from vitlib.cli.photos import on_bad_image_option, report_errors
from vitlib.cli.predictors import logs_muted, open_predictor
from vitlib.cli.printing import (
    advise_after_interrupt,
    echo,
    echo_json,
    is_terminal,
    print_columns,
    print_table,
)
from vitlib.cli.values import Size
from vitlib.cli.verb import Verb
from vitlib.errors import count_noun

if TYPE_CHECKING:
    from vitlib.predict.predictor import Predictor
    from vitlib.probe import ProbeReport

METHODS = ("knn", "logistic", "linear")
POOLS = ("cls", "mean", "cls+mean", "map", "embed")
SHOWN = 24  # rows of the table on the terminal
Count = int | Literal["all"]


Callback = Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]


def _names(*choices: str) -> Callback:
    """Return a callback that parses names such as cls,mean."""

    def parse(
        ctx: click.Context, param: click.Parameter, value: str | None
    ) -> tuple[str, ...] | None:
        if value is None:
            return None
        names = tuple(part.strip() for part in value.split(","))
        for name in names:
            if name not in choices:
                text = f"{name!r}: expected one or more of {', '.join(choices)}"
                raise click.BadParameter(text, ctx, param)
        return tuple(dict.fromkeys(names))

    return parse


def _numbers(*words: str) -> Callback:
    """Return a callback that parses numbers such as 1,6,12, and words that stand for some."""

    def parse(
        ctx: click.Context, param: click.Parameter, value: str | None
    ) -> tuple[int | str, ...]:
        entries: list[int | str] = []
        for part in map(str.strip, (value or "").split(",") if value else ()):
            if part in words:
                entries.append(part)
            elif part.isascii() and part.isdecimal() and int(part[:9]) > 0:
                entries.append(int(part[:9]))
            else:
                more = "".join(f", or {word}" for word in words)
                text = f"{part!r}: expected whole numbers from 1, with commas between them{more}"
                raise click.BadParameter(text, ctx, param)
        return tuple(dict.fromkeys(entries))

    return parse


@click.command(
    cls=Verb,
    examples=(
        "vitlib probe photos -m demo -o probe",
        "vitlib probe photos -m demo --layers all --pool cls,mean --few-shot 1,5 -o probe",
    ),
    headings={"layers": "Probe"},
)
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--model",
    "-m",
    "models",
    multiple=True,
    metavar="MODEL",
    default=(DEFAULT_MODEL,),
    show_default=True,
    help="Hub id, folder, weights file or exported file; several may be given, each with -m.",
)
@click.option(
    "--layers",
    callback=_numbers("all", "last"),
    metavar="all|last|N,N",
    default="last",
    show_default=True,
    help="Layers whose tokens are probed: the number of blocks that they pass.",
)
@click.option(
    "--pool",
    "pools",
    callback=_names(*POOLS),
    metavar="NAME,NAME",
    help="cls: class token; mean: mean of the patches; cls+mean: both; map: attention pool; embed: "
    "the vector that the model's head reads.  [default: cls, or embed without a class token]",
)
@click.option(
    "--methods",
    callback=_names(*METHODS),
    metavar="NAME,NAME",
    default=",".join(METHODS),
    show_default=True,
    help="knn: weighted neighbours; logistic: regression; linear: heads by SGD at 13 rates.",
)
@click.option(
    "--few-shot",
    callback=_numbers("all"),
    metavar="N,N",
    help="Photos of a class, for further probes of so few; all photos are always probed.",
)
@click.option(
    "--k",
    callback=_numbers(),
    metavar="N,N",
    default="10,20,100,200",
    show_default=True,
    help="Numbers of neighbours, of which one is chosen.",
)
@click.option(
    "--multi-label/--single-label", default=False, help="Several labels per photo, or one."
)
@click.option(
    "--out",
    "-o",
    required=True,
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the report: new, empty, or of an earlier probe, which continues.",
)
@features_option
@embeddings_option
@click.option(
    "--seed", type=int, metavar="N", default=0, show_default=True, help="Seed of folds and draws."
)
@on_bad_image_option
@batch_size_option
@device_option
@image_size_option
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub id.")
@click.option("--local-files-only", is_flag=True, help="Take hub ids from the cache alone.")
@json_option
def probe(
    data: Path,
    models: tuple[str, ...],
    layers: tuple[int | str, ...],
    few_shot: tuple[int | str, ...],
    out: Path,
    device: str | None,
    image_size: Size | None,
    revision: str | None,
    local_files_only: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure frozen features on labelled photos: which model, layer and pooling serves best.

    DATA is a folder with a folder per class or labels.csv, a .csv or a .jsonl. With train/ and
    val/ or test/ in it, the latter measure; other sets are measured by 5 folds. Every choice is
    made inside the training part.

    OUT/report.html contains the report, OUT/model the best probe as a classifier, which classify,
    serve, finetune and transformers open; probe.json and probe.csv are for programs.
    Where no store of vectors is named, OUT/features is one.

    A photo that cannot be read is left out and named, and the exit status is 1.
    """
    from vitlib.evaluate.folder import check_folder
    from vitlib.probe import run
    from vitlib.probe.results import KIND
    from vitlib.system.atomic import refuse_input

    chosen = _parse_layers(layers)
    check_folder(out, KIND)
    refuse_input(out, [data], inside=True)
    advise_after_interrupt("the same command continues")
    with logs_muted():
        predictors = [
            _open(model, device, image_size, revision, local_files_only) for model in models
        ]
        report = run(
            data,
            predictors,
            out,
            layers=chosen,
            few_shot=[n for n in few_shot if isinstance(n, int)],
            progress=is_terminal(),
            **settings,
        )
    with report_errors() as failed:
        failed.note_files(report.failed)
        if as_json:
            echo_json(report.as_dict() | {"report": str(out / "report.html")})
        else:
            _print(report)


def _parse_layers(layers: tuple[int | str, ...]) -> Literal["all", "last"] | list[int]:
    """Return the layers as run() takes them. Raises UsageError for a word beside others."""
    if layers == ("all",):
        return "all"
    if layers == ("last",):
        return "last"
    numbers = [layer for layer in layers if isinstance(layer, int)]
    if len(numbers) < len(layers):
        raise click.UsageError("--layers: expected all, last or numbers, not both")
    return numbers


def _open(
    model: str,
    device: str | None,
    image_size: Size | None,
    revision: str | None,
    local_files_only: bool,
) -> Predictor:
    """Load a model of the command line."""
    reading: SourceOptions = {
        "layout": None, "profile": None, "prefix": None, "architecture": None, "num_heads": None,
        "activation": None, "pool": None, "revision": revision,
        "local_files_only": local_files_only,
    }  # fmt: skip
    return open_predictor(ModelOptions(model, reading, device, image_size))


def _print(report: ProbeReport) -> None:
    """Print the best rows, what the photos chose, and where the report is."""
    several = len({row.model for row in report.rows}) > 1
    head = [
        *["model"] * several,
        "layer",
        "pool",
        "method",
        report.primary,
        "95 % interval",
        "chosen",
    ]
    lines = [head]
    best = sorted(report.rows, key=lambda row: -row.value)
    for row in best[:SHOWN]:
        cells = [f"{row.layer}", row.pool, row.method, f"{row.value:.4f}"]
        span = f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        values = [next(iter(choice.items())) for choice in row.choices]
        low, high = min(v for _, v in values), max(v for _, v in values)
        text = f"{values[0][0]} {low:.2g}" + (f" to {high:.2g}" if high > low else "")
        lines.append([*[row.model] * several, *cells, span, text])
    print_columns(lines)
    if len(best) > SHOWN:
        echo(f"and {len(best) - SHOWN} more rows in {report.folder / 'probe.csv'}")
    for few in report.few_shot if len(report.few_shot) <= SHOWN else ():
        where = f"layer {few.layer}, {few.pool}, {few.method}"
        echo(f"{count_noun(few.per_class, 'photo')} a class: {where}: {few.value:.4f} +- "
             f"{few.spread:.3f}")  # fmt: skip
    rows = []
    for choice in report.selected:
        span = f"{choice.interval[0]:.3f} to {choice.interval[1]:.3f}"
        name = "layer and pool chosen" if choice.model else "model chosen, too"
        of = f", {choice.model}" if several and choice.model else ""
        rows.append((name, f"{report.primary} {choice.value:.4f} ({span}){of}"))
    if report.best is not None:
        probe = report.best
        saved = f" in {probe.folder}" if probe.folder is not None else ""
        rows.append(
            (
                "best probe",
                f"{probe.model}, layer {probe.layer}, {probe.pool}, C {probe.c:.3g}{saved}",
            )
        )
    rows += [("note", note) for note in report.notes]
    print_table([*rows, ("report", str(report.folder / "report.html"))])
