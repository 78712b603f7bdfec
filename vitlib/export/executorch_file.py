"""Write a model as an ExecuTorch program (.pte) for phones and boards, and run it here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from vitlib.errors import CheckpointError, ConfigError, first_line
from vitlib.export.onnx_file import quiet_exporter
from vitlib.export.prepare import PreparedModel
from vitlib.export.pt2_file import trace
from vitlib.predict.exported_info import KEY, parse_info
from vitlib.predict.runtimes import Array, Runtime
from vitlib.system.requirements import import_extra

MAX_BATCH = 8  # ExecuTorch plans the memory of the largest input ahead


def check_executorch() -> None:
    """Check that ExecuTorch is installed, and its backend for CPUs works.

    Raises:
        ConfigError: It is not, or a library that it needs is not.
    """
    with quiet_exporter():
        for module in ("backends.xnnpack.partition.xnnpack_partitioner", "runtime"):
            purpose = "ExecuTorch files need executorch"
            import_extra("executorch", "executorch", purpose, f"executorch.{module}")


def write_executorch(prepared: PreparedModel, folder: Path) -> Path:
    """Write a model as an ExecuTorch program, its linear layers by XNNPACK.

    Args:
        prepared: The model.
        folder: An empty folder.

    Returns:
        The file, folder/model.pte. It takes batches of 1 to 8 photos. Its method "vitlib" returns
        the metadata.

    Raises:
        ConfigError: The precision is not float32, or the size of the input may vary.
    """
    settings = prepared.settings
    if settings.precision != "fp32" or settings.dynamic_size:
        what = "dynamic_size" if settings.dynamic_size else f"precision={settings.precision!r}"
        raise ConfigError(
            f"{what}: an ExecuTorch file computes in fp32 at one image size: leave it out, or "
            "export as onnx"
        )
    path = folder / "model.pte"
    with quiet_exporter():
        from executorch.backends.xnnpack.partition.config import (
            ALL_PARTITIONER_CONFIGS,
            GeluConfig,
        )
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        # XNNPACK's GELU in its tanh form differs by 8e-5; ExecuTorch's own kernels compute it.
        skipped = (GeluConfig,) if prepared.model.config.activation == "gelu_tanh" else ()
        exact = [config for config in ALL_PARTITIONER_CONFIGS if config not in skipped]
        program = trace(prepared, MAX_BATCH)
        _replace_chunks(program)
        lowered = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner(configs=exact)],
            constant_methods={KEY: prepared.info.to_json()},
        )
        with path.open("wb") as file:
            lowered.to_executorch().write_to_file(file)
    return path


def _replace_chunks(program: ExportedProgram) -> None:
    """Replace each chunk() of a program by slices: the lowering of a chunk fixes the batch."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.chunk.default:
            continue
        source, _, dim = node.args
        ends = list(accumulate(part.shape[dim] for part in node.meta["val"]))
        for getitem in list(node.users):
            index = getitem.args[1]
            start = ends[index - 1] if index else 0
            with graph.inserting_before(getitem):
                part = graph.call_function(
                    torch.ops.aten.slice.Tensor, (source, dim, start, ends[index])
                )
            part.meta = dict(getitem.meta)
            getitem.replace_all_uses_with(part)
            graph.erase_node(getitem)
        graph.erase_node(node)
    program.graph_module.recompile()


def skip_metadata(path: Path, key: str, text: str) -> None:
    """Leave a file as it is: an ExecuTorch program has no metadata to add to.

    Args:
        path: The .pte file.
        key: Name of the entry, which only the JSON beside the file has.
        text: Its text.
    """
    del path, key, text


def open_executorch(path: Path) -> Runtime:
    """Open an ExecuTorch program.

    Args:
        path: The .pte file, which vitlib wrote.

    Returns:
        The open file.

    Raises:
        CheckpointError: ExecuTorch cannot open the file.
    """
    from importlib.metadata import version

    try:
        with quiet_exporter():
            from executorch.runtime import Runtime as Library

            program = Library.get().load_program(os.fspath(path))
            method = program.load_method("forward")
            (text,) = program.load_method(KEY).execute([])
    except Exception as error:  # its exceptions have no common base
        message = f"{path}: ExecuTorch cannot open it: {first_line(error)[:200]}"
        raise CheckpointError(message) from error
    info = parse_info(text, str(path))

    def run(images: Array) -> Mapping[str, Array]:
        try:
            results = method.execute([torch.from_numpy(np.ascontiguousarray(images))])
        except RuntimeError as error:
            raise CheckpointError(
                f"ExecuTorch does not run a batch of {len(images)}: {first_line(error)[:80]}: "
                "export the model as onnx or pt2"
            ) from error
        # The next call writes over the memory of the outputs.
        copies = [result.numpy().copy() for result in results]
        return dict(zip(info.outputs, copies, strict=True))

    height, width = info.image_size or (None, None)
    return Runtime(
        "executorch", path, info, info.input, (None, info.in_channels, height, width),
        info.outputs, run, f"executorch {version('executorch')}",
    )  # fmt: skip
