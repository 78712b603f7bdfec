"""Lower the precision of a prepared model, before it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.export.graph import ExportGraph
from vitlib.export.half import choose_half_scales, halve_products
from vitlib.export.prepare import PreparedModel
from vitlib.image.decode import ImageLike

_PHOTOS = 16  # that the ranges of float16 are measured on, one at a time


def check_precision(
    file_format: str, precision: str, calibrate: Iterable[ImageLike] | Tensor | None
) -> None:
    """Check the choices of a precision.

    Args:
        file_format: The format of the file.
        precision: "fp32", "fp16" or "int8".
        calibrate: Photos or normalised pixels to calibrate with, or None.

    Raises:
        ConfigError: The format has no such precision, or photos are missing or of no use.
    """
    if precision == "int8" and file_format != "onnx":
        raise ConfigError(
            f"int8 is for ONNX files, which OpenVINO runs too: expected format onnx, not "
            f"{file_format}"
        )
    if precision == "int8" and calibrate is None:
        raise ConfigError(
            "int8 needs photos to measure the ranges of activations on: give 32 or more of yours "
            "with calibrate= (--calibrate)"
        )
    if precision != "int8" and calibrate is not None:
        raise ConfigError(f"calibrate= is for int8: leave it out for {precision}")


def lower_precision(
    prepared: PreparedModel,
    calibrate: Iterable[ImageLike] | Tensor | None,
    photos: Sequence[ImageLike],
) -> PreparedModel:
    """Lower the precision of a model's graph to that of its settings.

    Args:
        prepared: The prepared model in float32, which is only read.
        calibrate: Photos or normalised pixels that int8 is calibrated on.
        photos: Photos that the ranges of float16 are measured on.

    Returns:
        The model whose graph has the precision.

    Raises:
        ConfigError: int8 has no photos, or no layer bears it.
        ImageError: A photo cannot be read.
    """
    precision, graph = prepared.settings.precision, prepared.graph
    if precision == "fp32":
        return prepared
    if precision == "fp16":
        scales = choose_half_scales(prepared.model, _read_photos(prepared, photos[:_PHOTOS]))
        lowered = halve_products(graph.model, scales)
    else:
        from vitlib.export.int8 import quantize_products

        assert calibrate is not None  # check_precision
        lowered = quantize_products(prepared.model, graph.model, calibrate, prepared.processor)
    center = None if graph.center is None else graph.center.flatten()
    return replace(prepared, graph=ExportGraph(lowered, graph.outputs, center))


def _read_photos(prepared: PreparedModel, photos: Sequence[ImageLike]) -> Iterator[Tensor]:
    """Read photos as batches of one, (1, C, H, W)."""
    for photo in photos:
        yield torch.stack([prepared.processor.to_float(photo)])
