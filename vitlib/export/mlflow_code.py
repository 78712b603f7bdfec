"""Code that an MLflow folder holds: base64 photos in, the model card's answer out.

mlflow_folder.py copies this file, with the functions that it imports from vitlib, into the folder.
There it needs numpy, Pillow and ONNX Runtime alone. MLflow calls _load_pyfunc().
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vitlib.image.base64_text import parse_base64
from vitlib.image.pixels import center_crop, normalize_values, resized_sides

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
MAX_PIXELS = 178_956_970  # of an image, tested before it is decoded
BATCH = 8  # photos that are computed together
_MODES = {3: "RGB", 1: "L"}  # Pillow's modes by the number of channels


class ExportedModel:
    """An ONNX file with its preprocessing and labels.

    Args:
        path: The file, which vitlib wrote.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=onnxruntime.get_available_providers()
        )
        info = json.loads(self.session.get_modelmeta().custom_metadata_map["vitlib"])
        self.info, self.steps = info, info["image_processor"]
        self.labels = info["labels"] or [f"LABEL_{i}" for i in range(info["num_classes"])]

    def predict(self, model_input: Any, params: Any = None) -> list[dict[str, Any]]:  # noqa: ARG002
        """Answer a request.

        Args:
            model_input: Photos in base64: a table with a column "image" or with one column, or a
                list.
            params: No use is made of them; MLflow passes them.

        Returns:
            For each photo {"probs", "labels"} in the model's order ("values" and "labels" of a
            regression), and the other outputs of the file by name.

        Raises:
            ValueError: A photo cannot be read; the message has its index.
        """
        pixels = [self._read(number, text) for number, text in enumerate(_list_texts(model_input))]
        answers: list[dict[str, Any]] = []
        step = BATCH if len({image.shape for image in pixels}) == 1 else 1
        for start in range(0, len(pixels), step):
            results = self.session.run(None, {"pixels": np.stack(pixels[start : start + step])})
            named = dict(zip(self.info["outputs"], results, strict=True))
            answers += [
                self._answer({name: rows[i] for name, rows in named.items()})
                for i in range(len(results[0]))
            ]
        return answers

    def preprocess(self, data: bytes) -> Any:
        """Decode a photo and preprocess it as vitlib does.

        Args:
            data: An encoded image of 8 bits a channel.

        Returns:
            (C, H, W): uint8 levels or normalised float32 pixels, as the file takes.

        Raises:
            ValueError: The image is too large, or deeper than 8 bits.
            OSError: The bytes are no image.
        """
        steps = self.steps
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height}: at most {MAX_PIXELS} pixels")
            if image.mode[0] in "IF":
                raise ValueError("deeper than 8 bits: expected an image of 8 bits a channel")
            upright = ImageOps.exif_transpose(image).convert(_MODES[steps["in_channels"]])
        size = _to_pair(steps["size"])
        height, width = resized_sides(
            (upright.height, upright.width), size=size, fit=steps["fit"],
            shortest_edge=steps["shortest_edge"], multiple_of=_to_pair(steps["multiple_of"]),
            max_patches=steps["max_patches"],
        )  # fmt: skip
        if (width, height) != upright.size:
            upright = upright.resize((width, height), Image.Resampling(steps["resample"]))
        array = np.atleast_3d(np.asarray(upright))
        crop = _to_pair(steps["crop_size"])
        if crop is not None:
            array = center_crop(array, crop, steps["crop_rounding"], steps["fill"])
        if self.info["input"] == "float32":
            stats = (steps["rescale_factor"], steps["image_mean"], steps["image_std"])
            array = normalize_values(array, *stats)
        return np.ascontiguousarray(array.transpose(2, 0, 1))

    def _read(self, number: int, text: Any) -> Any:
        """Read one photo of a request; raise ValueError with its index."""
        if not isinstance(text, str):
            raise ValueError(f"input {number}: expected base64 text")
        try:
            return self.preprocess(parse_base64(text))
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"input {number}: {error}") from None

    def _answer(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Return the answer for one photo."""
        answer: dict[str, Any] = {}
        if "logits" in outputs:
            logits = outputs.pop("logits").astype(np.float64)
            kind = self.info["problem_type"]
            if kind == "regression":
                answer["values"] = logits.tolist()
            elif kind == "multi_label_classification" or len(logits) == 1:
                answer["probs"] = np.exp(-np.logaddexp(0, -logits)).tolist()
            else:
                powers = np.exp(logits - logits.max())
                answer["probs"] = (powers / powers.sum()).tolist()
            answer["labels"] = self.labels
        return {**answer, **{name: rows.tolist() for name, rows in outputs.items()}}


def _list_texts(model_input: Any) -> Iterable[Any]:
    """Return the photos of a table, of a list, or of one text."""
    columns = getattr(model_input, "columns", None)
    if columns is None:
        return [model_input] if isinstance(model_input, str) else list(model_input)
    name = "image" if "image" in columns else columns[0]
    return list(model_input[name])


def _to_pair(value: Any) -> tuple[int, int] | None:
    """Return JSON's list of two as a tuple."""
    return None if value is None else (value[0], value[1])


def _accept_input_data() -> None:
    """Let MLflow's server take the key of the model card.

    Azure's gateway renames "input_data" before MLflow reads a request. `mlflow models serve` alone
    refuses it. A server that has no such function keeps its own forms.
    """
    server: Any = sys.modules.get("mlflow.pyfunc.scoring_server")
    decode = getattr(server, "_decode_json_input", None)
    if decode is None or decode.__module__ == __name__:  # done by another model of the process
        return

    def decode_any(json_input: Any) -> Any:
        value = decode(json_input)
        if isinstance(value, dict) and "input_data" in value and "dataframe_split" not in value:
            rows = value.pop("input_data")
            table = rows if isinstance(rows, dict) else {"columns": ["image"], "data": rows}
            value["dataframe_split"] = table
        return value

    server._decode_json_input = decode_any


def _load_pyfunc(data_path: str) -> ExportedModel:
    """Open the file of an MLflow folder; MLflow calls this."""
    _accept_input_data()
    path = Path(data_path)
    return ExportedModel(path if path.is_file() else path / "model.onnx")
