"""Describe an exported file: what it says of itself, without a run of it.

Its labels, preprocessing and the report of its comparison with the model are in its metadata.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from vitlib.checks.compare import to_json
from vitlib.image.processor import ImageProcessor
from vitlib.predict.exported_files import list_files
from vitlib.predict.exported_info import ExportInfo
from vitlib.predict.runtimes import open_file


@dataclass(frozen=True)
class ExportedFile:
    """The result of describe_file(); `as_dict` is what `vitlib info --json` prints.

    Attributes:
        source: The file.
        files: Names of the file and of those that hold its weights.
        size: Their bytes.
        format: "onnx", "pt2" or "openvino".
        runtime: The library that runs it, with its version.
        input_dtype: "uint8" or "float32".
        input_shape: Sizes of the input; None for a size that may vary.
        outputs: Names of the outputs.
        info: What the file says of itself; None for a file that vitlib did not write.
        verification: Report of the comparison at export; None where there is none.
    """

    source: str
    files: tuple[str, ...]
    size: int
    format: str
    runtime: str
    input_dtype: str
    input_shape: tuple[int | None, ...]
    outputs: tuple[str, ...]
    info: ExportInfo | None
    verification: dict[str, Any] | None

    @property
    def image_processor(self) -> ImageProcessor | None:
        """The preprocessing; None where the file states none."""
        return None if self.info is None else self.info.make_processor()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields.

        Returns:
            A dict of JSON's types.
        """
        result: dict[str, Any] = to_json(asdict(self))
        return result


def describe_file(source: str | os.PathLike[str]) -> ExportedFile:
    """Describe an exported file.

    Args:
        source: The file: .onnx, .pt2 or .xml.

    Returns:
        What it says of itself.

    Raises:
        VitlibError: Its runtime cannot open it, or is not installed.
    """
    runtime = open_file(source)
    files = list_files(runtime)
    return ExportedFile(
        source=os.fspath(source),
        files=tuple(path.name for path in files),
        size=sum(path.stat().st_size for path in files),
        format=runtime.format,
        runtime=runtime.version,
        input_dtype=runtime.input_dtype,
        input_shape=runtime.input_shape,
        outputs=runtime.outputs,
        info=runtime.info,
        verification=_parse_report(runtime.verification),
    )


def _parse_report(text: str) -> dict[str, Any] | None:
    """Parse the report of a file; None where it is not one."""
    try:
        report = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) else None
