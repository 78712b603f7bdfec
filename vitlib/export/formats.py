"""One function for each format: `vitlib.export.to_onnx(model, "model.onnx")`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vitlib.errors import to_pair
from vitlib.export.export import ExportReport, export_model
from vitlib.export.prepare import ExportSettings, Input, Precision
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.predict.predictor import Predictor
from vitlib.vit import ViT

Source = ViT | Predictor | str | os.PathLike[str]


def to_onnx(
    model: Source,
    out: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = (),
    input: Input | None = None,  # noqa: A002
    image_size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    precision: Precision = "fp32",
    calibrate: Sequence[ImageLike] | None = None,
    opset: int = 20,
    image_processor: ImageProcessor | None = None,
    photos: Sequence[ImageLike] | None = None,
    allow_drift: bool = False,
) -> ExportReport:
    """Write a model as one ONNX file, and check the file with ONNX Runtime.

    Args:
        model: A model, a Predictor, a hub id, a folder or a weights file.
        out: The file to write, or a folder, which gets model.onnx; the report is beside it.
        outputs: Names of outputs: "logits", "embedding", "tokens", "attention" (of the class token
            in the last block); empty: logits, or the embedding of a model without a head.
        input: "uint8" levels (B, C, H, W), whose normalisation is part of the file, or "float" for
            normalised pixels; None: levels where the preprocessing has them.
        image_size: Pixels, one side or (height, width); None: the preprocessing's.
        dynamic_size: Height and width may vary.
        precision: "fp32", "fp16" or "int8".
        calibrate: Photos for int8, 32 or more.
        opset: Version of ONNX's operators, 20 to 23.
        image_processor: The preprocessing; None is the model's own.
        photos: Photos to compare on, five or more; None: those of the package.
        allow_drift: True writes a file whose outputs differ; the report says how far.

    Returns:
        The report, which the JSON beside the file holds.

    Raises:
        ConfigError: A choice does not suit the model, or a library is not installed.
        SourceError: The target exists, or cannot be written.
        CheckpointError: The file's outputs differ from the model's. Nothing is written.
    """
    settings = _make_settings(outputs, input, image_size, dynamic_size, precision, opset)
    return export_model(
        model, out, "onnx", settings, image_processor=image_processor, calibrate=calibrate,
        photos=photos, allow_drift=allow_drift,
    )  # fmt: skip


def to_pt2(
    model: Source,
    out: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = (),
    input: Input | None = None,  # noqa: A002
    image_size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    image_processor: ImageProcessor | None = None,
    photos: Sequence[ImageLike] | None = None,
    allow_drift: bool = False,
) -> ExportReport:
    """Write a model as a program of torch.export, which needs torch alone to run.

    Args:
        model: As in to_onnx().
        out: The file to write, or a folder, which gets model.pt2.
        outputs: As in to_onnx().
        input: As in to_onnx().
        image_size: As in to_onnx().
        dynamic_size: As in to_onnx().
        image_processor: As in to_onnx().
        photos: As in to_onnx().
        allow_drift: As in to_onnx().

    Returns:
        The report.

    Raises:
        VitlibError: As to_onnx().
    """
    settings = _make_settings(outputs, input, image_size, dynamic_size)
    return export_model(
        model, out, "pt2", settings, image_processor=image_processor, photos=photos,
        allow_drift=allow_drift,
    )  # fmt: skip


def to_openvino(
    model: Source,
    out: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = (),
    input: Input | None = None,  # noqa: A002
    image_size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    precision: Precision = "fp32",
    image_processor: ImageProcessor | None = None,
    photos: Sequence[ImageLike] | None = None,
    allow_drift: bool = False,
) -> ExportReport:
    """Write a model as an OpenVINO IR, two files, and check it with OpenVINO.

    Args:
        model: As in to_onnx().
        out: The .xml file to write, or a folder, which gets model.xml; model.bin is beside it.
        outputs: As in to_onnx().
        input: As in to_onnx().
        image_size: As in to_onnx().
        dynamic_size: As in to_onnx().
        precision: "fp32", or "fp16" for weights that are stored in half.
        image_processor: As in to_onnx().
        photos: As in to_onnx().
        allow_drift: As in to_onnx().

    Returns:
        The report.

    Raises:
        VitlibError: As to_onnx().
    """
    settings = _make_settings(outputs, input, image_size, dynamic_size, precision)
    return export_model(
        model, out, "openvino", settings, image_processor=image_processor, photos=photos,
        allow_drift=allow_drift,
    )  # fmt: skip


def to_mlflow(
    model: Source,
    out: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    image_processor: ImageProcessor | None = None,
    photos: Sequence[ImageLike] | None = None,
    allow_drift: bool = False,
) -> ExportReport:
    """Write a model as an MLflow folder, which `mlflow models serve` answers with.

    Args:
        model: As in to_onnx().
        out: The folder to make.
        image_size: As in to_onnx().
        image_processor: As in to_onnx().
        photos: As in to_onnx().
        allow_drift: As in to_onnx().

    Returns:
        The report.

    Raises:
        VitlibError: As to_onnx().
    """
    settings = _make_settings((), None, image_size)
    return export_model(
        model, out, "mlflow", settings, image_processor=image_processor, photos=photos,
        allow_drift=allow_drift,
    )  # fmt: skip


def to_executorch(
    model: Source,
    out: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = (),
    input: Input | None = None,  # noqa: A002
    image_size: int | tuple[int, int] | None = None,
    image_processor: ImageProcessor | None = None,
    photos: Sequence[ImageLike] | None = None,
    allow_drift: bool = False,
) -> ExportReport:
    """Write a model as a program of ExecuTorch, for phones and boards.

    Args:
        model: As in to_onnx().
        out: The .pte file to write, or a folder, which gets model.pte.
        outputs: As in to_onnx().
        input: As in to_onnx().
        image_size: As in to_onnx().
        image_processor: As in to_onnx().
        photos: As in to_onnx().
        allow_drift: As in to_onnx().

    Returns:
        The report.

    Raises:
        VitlibError: As to_onnx().
    """
    settings = _make_settings(outputs, input, image_size)
    return export_model(
        model, out, "executorch", settings, image_processor=image_processor, photos=photos,
        allow_drift=allow_drift,
    )  # fmt: skip


def _make_settings(
    outputs: Sequence[str],
    input_kind: Input | None,
    image_size: int | tuple[int, int] | None,
    dynamic_size: bool = False,
    precision: Precision = "fp32",
    opset: int = 20,
) -> ExportSettings:
    """Return the settings of an export, with names and sizes in one form."""
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    size = None if image_size is None else to_pair("image_size", image_size)
    return ExportSettings(names, input_kind, size, dynamic_size, precision, opset)
