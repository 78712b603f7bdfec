"""Write a model as one ONNX file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vitlib.errors import ConfigError
from vitlib.export.prepare import PreparedModel
from vitlib.predict.exported_info import KEY
from vitlib.system.requirements import import_extra

# 20 is the first with Gelu as one operator; LayerNormalization is one from 17 on.
OPSETS = range(20, 24)
_MAX_BYTES = 2**31 - 2**20  # of a protobuf message, less the graph


def check_onnx() -> None:
    """Check that the libraries that write ONNX files are installed.

    Raises:
        ConfigError: One is not.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        import_extra("export", package, f"ONNX files need {package}")


def write_onnx(prepared: PreparedModel, folder: Path) -> Path:
    """Write a model as ONNX, by torch's exporter.

    Args:
        prepared: The model.
        folder: An empty folder.

    Returns:
        The file, folder/model.onnx.

    Raises:
        ConfigError: The opset is another, or the file would pass ONNX's limit of 2 GB.
    """
    opset, path = prepared.settings.opset, folder / "model.onnx"
    if opset not in OPSETS:
        raise ConfigError(f"opset={opset}: expected {OPSETS.start} to {OPSETS.stop - 1}")
    size = sum(tensor.nbytes for tensor in prepared.graph.state_dict().values())
    if size > _MAX_BYTES:
        raise ConfigError(
            f"the weights are {size / 2**30:.1f} GB, and an ONNX file holds 2: export it as "
            "openvino or pt2"
        )
    with quiet_exporter():
        program = torch.onnx.export(
            prepared.graph,
            (prepared.example(),),
            dynamo=True,
            dynamic_shapes=prepared.dynamic_shapes(),
            opset_version=opset,
            input_names=["pixels"],
            output_names=list(prepared.outputs),
            verbose=False,
        )
    assert program is not None
    _strip_traces(program.model)
    if prepared.settings.precision == "int8":
        _drop_zero_points(program.model)
    program.model.metadata_props[KEY] = prepared.info.to_json()
    program.save(path, external_data=False)
    return path


def append_metadata(path: Path, key: str, text: str) -> None:
    """Add an entry to the metadata of a file.

    A protobuf message that follows another is merged with it, so that the weights need not be read.

    Args:
        path: The ONNX file.
        key: Name of the entry.
        text: Its text.
    """
    import onnx

    entry = onnx.StringStringEntryProto(key=key, value=text)
    message = onnx.ModelProto(metadata_props=[entry])
    with path.open("ab") as file:
        file.write(message.SerializeToString())


def _strip_traces(model: Any) -> None:
    """Remove the Python traces that the exporter stores with every node."""
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()


def _drop_zero_points(model: Any) -> None:
    """Remove the zero points of int8 weights, all 0, which is what a missing one means.

    The exporter lets layers share them. ONNX Runtime then cannot open the file where it has to make
    the weights unsigned, as on CPUs without VNNI.
    """
    shared = {}
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():
            shared[node.inputs[2].name] = node.inputs[2]
            node.resize_inputs(2)
    for name, value in shared.items():
        if not value.uses():
            del model.graph.initializers[name]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Mute the lines of torch's exporters about libraries that are not installed."""
    names = ("torch.onnx", "torch.export", "onnxscript", "mlflow")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
