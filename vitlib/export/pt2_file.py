"""Write a model as a program of torch.export, which loads without vitlib."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

from vitlib.errors import ConfigError
from vitlib.export.onnx_file import quiet_exporter
from vitlib.export.prepare import PreparedModel
from vitlib.predict.exported_info import KEY


def write_pt2(prepared: PreparedModel, folder: Path) -> Path:
    """Write a model as a program of torch.export.

    Args:
        prepared: The model.
        folder: An empty folder.

    Returns:
        The file, folder/model.pt2.

    Raises:
        ConfigError: The precision is not float32.
    """
    if prepared.settings.precision != "fp32":
        raise ConfigError(
            f"precision={prepared.settings.precision!r}: a pt2 file computes in fp32: expected "
            "precision='fp32', or the format onnx"
        )
    path = folder / "model.pt2"
    program = trace(prepared)
    program.example_inputs = None  # of the size of two photos
    torch.export.save(program, path, extra_files={KEY: prepared.info.to_json()})
    return path


def trace(prepared: PreparedModel, max_batch: int | None = None) -> ExportedProgram:
    """Trace the graph of a model.

    Args:
        prepared: The model.
        max_batch: The largest batch; None for no limit.

    Returns:
        The program, without the stack traces of this machine.
    """
    (sizes,) = prepared.dynamic_shapes()
    if max_batch is not None:
        sizes[0] = torch.export.Dim("batch", min=1, max=max_batch)
    with quiet_exporter(), torch.no_grad():
        program = torch.export.export(
            prepared.graph,
            (prepared.example(),),
            dynamic_shapes=(sizes,),
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def append_extra_file(path: Path, key: str, text: str) -> None:
    """Add an entry to the extra files of an archive; the weights need not be read.

    Args:
        path: The pt2 file, which is a zip archive.
        key: Name of the entry.
        text: Its text.
    """
    with zipfile.ZipFile(path, "a") as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith(f"/extra/{KEY}"))
        archive.writestr(entry.removesuffix(KEY) + key, text)
