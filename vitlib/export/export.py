"""Export a model to one file, and check that the file answers like the model.

How data flows: the prepared model (prepare.py) -> the writer of the format, into a hidden folder
beside the target -> the file opened by its own runtime and compared on photos (verification.py) ->
the report into the file's metadata and a JSON beside it -> the target's name. A file that differs
is deleted.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

import vitlib
from vitlib.checks.compare import list_demo_photos
from vitlib.errors import CheckpointError, ConfigError, SourceError
from vitlib.export.executorch_file import (
    check_executorch,
    open_executorch,
    skip_metadata,
    write_executorch,
)
from vitlib.export.mlflow_folder import check_mlflow, write_mlflow
from vitlib.export.onnx_file import append_metadata, check_onnx, write_onnx
from vitlib.export.openvino_file import append_rt_info, check_openvino, write_openvino
from vitlib.export.precision import check_precision, lower_precision
from vitlib.export.prepare import ExportSettings, PreparedModel, open_model, prepare
from vitlib.export.pt2_file import append_extra_file, write_pt2
from vitlib.export.verification import Comparison, verify_file
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.predict.predictor import Predictor
from vitlib.predict.runtimes import VERIFICATION_KEY, Runtime, open_file
from vitlib.system.atomic import (
    expand_home,
    publish_folder,
    refuse_input,
    replace_files,
    staging_folder,
)
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

Format = Literal["onnx", "pt2", "openvino", "mlflow", "executorch"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, str] = {
    "onnx": ".onnx",
    "pt2": ".pt2",
    "openvino": ".xml",
    "executorch": ".pte",
}
# "mlflow" is a folder, which has no suffix.
REPORT = "export.json"


@dataclass(frozen=True)
class FileWriter:
    """Functions that write one format.

    Attributes:
        check: Raises ConfigError where a library is missing.
        write: Writes the model into an empty folder, and returns the main file.
        add_metadata: Adds an entry (key, text) to the metadata of a written file.
        is_folder: The format is a folder, `write` makes it under the name "model", and it appears
            as a whole.
        open: Opens a written file with its own runtime.
    """

    check: Callable[[], None]
    write: Callable[[PreparedModel, Path], Path]
    add_metadata: Callable[[Path, str, str], None]
    is_folder: bool = False
    open: Callable[[Path], Runtime] = open_file


def _get_writer(file_format: str) -> FileWriter:
    """Return the writer of a format; raise ConfigError for another."""
    if file_format == "onnx":
        return FileWriter(check_onnx, write_onnx, append_metadata)
    if file_format == "pt2":
        return FileWriter(lambda: None, write_pt2, append_extra_file)  # torch alone
    if file_format == "openvino":
        return FileWriter(check_openvino, write_openvino, append_rt_info)
    if file_format == "mlflow":
        return FileWriter(check_mlflow, write_mlflow, append_metadata, is_folder=True)
    if file_format == "executorch":
        return FileWriter(check_executorch, write_executorch, skip_metadata, open=open_executorch)
    raise ConfigError(f"format={file_format!r}: expected one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class ExportReport:
    """The result of an export; `as_dict` is what the JSON beside the file holds.

    Attributes:
        path: The written file.
        format: Its format.
        precision: Its arithmetic.
        source: The checkpoint; "" for a model in memory.
        weights_sha256: Of the checkpoint's tensors.
        input: "uint8" or "float32".
        image_size: Pixels (height, width); None where any size is taken.
        size: Bytes of all written files.
        versions: Libraries that wrote and ran the file.
        seconds: Of writing and of the comparison.
        comparisons: Every output beside the model's.
    """

    path: Path
    format: str
    precision: str
    source: str
    weights_sha256: str
    input: str
    image_size: tuple[int, int] | None
    size: int
    versions: dict[str, str]
    seconds: dict[str, float]
    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        """True if every output counts as the model's."""
        return all(comparison.equal for comparison in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON's types.

        Returns:
            Names and values of the fields, paths as text.
        """
        return {
            "verdict": "equal" if self.ok else "differs",
            "file": self.path.name,
            "format": self.format,
            "precision": self.precision,
            "source": self.source,
            "weights_sha256": self.weights_sha256,
            "input": self.input,
            "image_size": None if self.image_size is None else list(self.image_size),
            "bytes": self.size,
            "versions": self.versions,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
        }


@isolate_torch_settings()
def export_model(
    source: ViT | Predictor | str | os.PathLike[str],
    out: str | os.PathLike[str],
    file_format: Format,
    settings: ExportSettings,
    *,
    image_processor: ImageProcessor | None = None,
    photos: Sequence[ImageLike] | None = None,
    calibrate: Iterable[ImageLike] | Tensor | None = None,
    allow_drift: bool = False,
    **reading: Any,
) -> ExportReport:
    """Export a model, and check the file on photos.

    Args:
        source: A model, a Predictor, a hub id, a folder or a weights file.
        out: The file to write, with the suffix of its format, and the report beside it
            (vit.onnx.json); or a folder, which gets model.onnx (model.pt2, model.xml, model.pte)
            and export.json. For "mlflow" a folder that does not exist.
        file_format: "onnx", "pt2", "openvino", "mlflow" or "executorch".
        settings: Choices of the export.
        image_processor: The preprocessing; None is the model's own.
        photos: Photos to compare on, five or more; None: those of the package.
        calibrate: For int8, 32 or more of your photos, or their normalised pixels (B, C, H, W). The
            ranges of activations are measured on them.
        allow_drift: True writes a file whose outputs differ, and the report says how far.
        **reading: Options of Predictor.load for a checkpoint.

    Returns:
        The report.

    Raises:
        ConfigError: A choice does not suit the model, or a library is not installed.
        SourceError: The target exists, or cannot be written.
        CheckpointError: The file's outputs differ from the model's. Nothing is written.
    """
    writer = _get_writer(file_format)
    writer.check()
    target, report_name = _choose_target(expand_home(out), file_format)
    if isinstance(source, str | os.PathLike):
        refuse_input(target, [source])
    check_precision(file_format, settings.precision, calibrate)
    model, processor, name = open_model(source, image_processor, **reading)
    compared = photos or list_demo_photos()
    prepared = prepare(model, processor, settings, name)
    prepared = lower_precision(prepared, calibrate, compared)
    with staging_folder(target.parent) as staging:
        start = time.perf_counter()
        path = writer.write(prepared, staging)
        gc.collect()  # the exporter's graph has cycles, and holds copies of the weights
        written = time.perf_counter()
        runtime = writer.open(path)
        comparisons = verify_file(prepared, runtime, compared)
        report = ExportReport(
            target, file_format, settings.precision, name, prepared.info.weights_sha256,
            prepared.info.input, prepared.info.image_size,
            sum(file.stat().st_size for file in staging.rglob("*") if file.is_file()),
            _list_versions(runtime.version),
            {"export": written - start, "verify": time.perf_counter() - written},
            tuple(comparisons),
        )  # fmt: skip
        if not report.ok and not allow_drift:
            raise CheckpointError(_describe_drift(report))
        text = json.dumps(report.as_dict(), indent=2)
        writer.add_metadata(path, VERIFICATION_KEY, text)
        folder = staging / "model" if writer.is_folder else staging
        (folder / report_name).write_text(text + "\n", encoding="utf-8")
        if writer.is_folder:
            publish_folder(folder, target)
            return report
        for file in list(staging.glob("model.*")):
            file.rename(file.with_name(target.stem + file.suffix))
        replace_files(staging, target.parent, last=target.name)
    return report


def _choose_target(out: Path, file_format: str) -> tuple[Path, str]:
    """Return the main file to write and its report's name; raise SourceError if one exists."""
    if file_format not in SUFFIXES:
        if out.exists():
            raise SourceError(f"{out} exists: name a folder that does not, or delete it first")
        return out, REPORT
    suffix = SUFFIXES[file_format]
    other = next((s for s in SUFFIXES.values() if s == out.suffix.lower() != suffix), None)
    if other is not None:
        raise ConfigError(f"{out}: expected a name that ends in {suffix}, the format {file_format}")
    is_file = out.suffix.lower() == suffix
    target = out if is_file else out / f"model{suffix}"
    # Files of several exports can be in one folder, each with its own report.
    report_name = f"{out.name}.json" if is_file else REPORT
    companions = [target.with_suffix(".bin")] if file_format == "openvino" else []
    for path in (target, target.with_name(report_name), *companions):
        if path.exists():
            other_name = "file" if is_file else "folder"
            raise SourceError(f"{path} exists: name another {other_name}, or delete it first")
    return target, report_name


def _list_versions(runtime: str) -> dict[str, str]:
    """List the versions of the libraries of an export."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    library, _, number = runtime.partition(" ")
    versions = {"vitlib": vitlib.__version__, "torch": torch.__version__, library: number}
    for name in ("onnx", "onnxscript"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _describe_drift(report: ExportReport) -> str:
    """Explain how far a file is from its model."""
    worst = max((c for c in report.comparisons if not c.equal), key=lambda c: c.error)
    size = "{}x{}".format(*worst.image_size)
    limit = (
        f"expected at most {worst.bound:.2g}"
        if worst.bound is not None
        else f"{worst.agreeing} of {worst.clear} clear labels, a cosine of {worst.cosine:.4f}"
    )
    return (
        f"the {report.format} file differs from the model: {worst.output} {worst.error:.2g} apart "
        f"(max |a - b| / max |b|) at batch {worst.batch}, {size}: {limit}; nothing was written "
        "(allow_drift=True, --allow-drift writes it)"
    )
