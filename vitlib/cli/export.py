"""The verb `vitlib export`: write a model for another runtime, checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitlib.cli.options import SourceOptions, json_option, source_options, subject_option
from vitlib.cli.photos import list_photos
from vitlib.cli.predictors import logs_muted, mute_libraries
from vitlib.cli.printing import echo_json, print_table, show_life
from vitlib.cli.values import ImageSize, Size
from vitlib.cli.verb import Verb, positional_arguments

if TYPE_CHECKING:
    from vitlib.export import ExportReport

# Copies of values of vitlib.export, which needs torch. A test compares them.
FORMATS = ("onnx", "pt2", "openvino", "mlflow", "executorch")
OUTPUTS = ("logits", "embedding", "tokens", "attention")
PRECISIONS = ("fp32", "fp16", "int8")


class OutputNames(click.ParamType[tuple[str, ...]]):
    """Names of outputs, with commas between."""

    name = "outputs"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split the names, and check each.

        Args:
            value: text of the command line, or names.
            param: the option.
            ctx: context of the verb.

        Returns:
            The names.
        """
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        for name in names:
            if name not in OUTPUTS:
                self.fail(f"{name!r}: expected some of {', '.join(OUTPUTS)}", param, ctx)
        return names


@click.command(
    cls=Verb,
    examples=(
        "vitlib export demo --format onnx --out exported",
        "vitlib export demo --format pt2 --outputs logits,embedding --out demo.pt2",
    ),
)
@positional_arguments("MODEL")
@subject_option
@click.option(
    "--format", "-f", "file_format", required=True, type=click.Choice(FORMATS),
    help="Format of the file.",
)  # fmt: skip
@click.option(
    "--out", "-o", metavar="FILE", required=True,
    help="File to write, or a folder, which gets model.onnx (.pt2, .xml, .pte). For mlflow: the "
    "folder to make.",
)  # fmt: skip
@click.option(
    "--outputs", type=OutputNames(), metavar="NAME,…", default=(),
    help=f"Outputs of the file: {', '.join(OUTPUTS)}. Default: logits; without a head, embedding.",
)  # fmt: skip
@click.option(
    "--input", "input_kind", type=click.Choice(("uint8", "float")),
    help="uint8 levels, whose normalisation is part of the file, or normalised float pixels. "
    "Default: levels.",
)  # fmt: skip
@click.option(
    "--image-size", type=ImageSize(), metavar="N|HxW",
    help="Pixels of the input. Default: the preprocessing's.",
)  # fmt: skip
@click.option("--dynamic-size", is_flag=True, help="Height and width of the input may vary.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True,
              help="Arithmetic of the file.")  # fmt: skip
@click.option(
    "--calibrate", metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="32 or more photos like yours, for --precision int8.",
)  # fmt: skip
@click.option(
    "--photos", metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Photos to compare the file with the model on, 5 or more. Default: those of the package.",
)  # fmt: skip
@click.option("--opset", type=int, metavar="N", default=20, show_default=True,
              help="Version of ONNX's operators, 20 to 23.")  # fmt: skip
@click.option("--allow-drift", is_flag=True, help="Write it even if its outputs differ.")
@source_options
@json_option
def export(
    model: str,
    file_format: Any,
    out: str,
    outputs: tuple[str, ...],
    input_kind: Any,
    image_size: Size | None,
    dynamic_size: bool,
    precision: Any,
    calibrate: Path | None,
    photos: Path | None,
    opset: int,
    allow_drift: bool,
    reading: SourceOptions,
    as_json: bool,
) -> None:
    """Write a model as a file for another runtime, and check the file on photos.

    MODEL is a hub id, a folder or a weights file. The file takes batches of any size, and contains
    labels, task and preprocessing. It is opened by its own runtime and gets photos in batches of 1,
    2 and 5. Where an output differs from the model's, nothing is written and the exit status is 1,
    unless --allow-drift is given. A JSON beside the file (vit.onnx.json; in a folder export.json)
    has the numbers. vitlib's other verbs take the file as MODEL.
    """
    if image_size == "keep":
        raise click.UsageError("--image-size keep: expected a size; --dynamic-size takes any")
    if calibrate is not None and precision != "int8":
        raise click.UsageError("--calibrate is for --precision int8")
    from vitlib.export import ExportSettings, export_model

    mute_libraries()
    settings = ExportSettings(
        outputs, input_kind, image_size, dynamic_size, precision,
        opset,
    )  # fmt: skip
    with logs_muted(), show_life(f"writing {file_format} and comparing it with the model"):
        report = export_model(
            model,
            out,
            file_format,
            settings,
            calibrate=None if calibrate is None else list_photos(calibrate, "--calibrate"),
            photos=None if photos is None else list_photos(photos, "--photos"),
            allow_drift=allow_drift,
            **reading,
        )
    if as_json:
        echo_json(report.as_dict())
    else:
        print_table(_rows(report))


def _rows(report: ExportReport) -> list[tuple[str, str]]:
    """List the report as (name, value)."""
    size = "any" if report.image_size is None else "{}x{}".format(*report.image_size)
    rows = [
        ("file", f"{report.path} ({report.size / 1e6:.1f} MB)"),
        ("format", f"{report.format}, {report.precision}"),
        ("input", f"{report.input}, {size} pixels (height x width), any number of images"),
    ]
    for name in dict.fromkeys(comparison.output for comparison in report.comparisons):
        chosen = [c for c in report.comparisons if c.output == name]
        worst = max(chosen, key=lambda comparison: comparison.error)
        text = f"{worst.error:.2g} apart at most (max |a - b| / max |b|)"
        counted = max(chosen, key=lambda comparison: comparison.clear)
        if counted.clear:
            text += f"; {counted.agreeing} of {counted.clear} clear labels equal"
        rows.append((name, text))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    rows.append(("time", seconds))
    rows.append(("verdict", "equal" if report.ok else "differs (written as asked)"))
    return rows
