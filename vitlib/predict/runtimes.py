"""Run exported files: ONNX Runtime, torch.export and OpenVINO behind one call.

A Runtime takes an array of pixels and returns the outputs by name. The Predictor computes with it
(exported_model.py), and export/ checks with it what it wrote.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vitlib.errors import CheckpointError, ConfigError, ImageError, SourceError, first_line
from vitlib.fast.cpu import this_machine
from vitlib.predict.exported_info import KEY, MAX_LENGTH, ExportInfo, parse_info
from vitlib.predict.pt2_archive import check_archive
from vitlib.system.atomic import expand_home
from vitlib.system.requirements import import_extra

Array = npt.NDArray[Any]
VERIFICATION_KEY = "vitlib_verification"  # entry of the report in the metadata of a file
SUFFIXES = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino"}


@dataclass(frozen=True)
class Runtime:
    """An open file.

    Attributes:
        format: "onnx", "pt2" or "openvino".
        path: The file.
        info: What the file says of itself; None for a file that vitlib did not write.
        input_dtype: "uint8" or "float32".
        input_shape: Sizes of the input; None for a size that may vary.
        outputs: Names of the outputs.
        run: Pixels (B, C, H, W) of the input's dtype -> outputs by name.
        version: Version of the library that runs the file.
        verification: Report of the comparison at export, as JSON; "" where there is none.
        devices: Kinds of devices that the library computes on here.
    """

    format: str
    path: Path
    info: ExportInfo | None
    input_dtype: str
    input_shape: tuple[int | None, ...]
    outputs: tuple[str, ...]
    run: Callable[[Array], Mapping[str, Array]]
    version: str
    verification: str = ""
    devices: tuple[str, ...] = ("cpu",)


def find_format(source: object) -> str | None:
    """Return the format of an exported file by its suffix.

    Args:
        source: Any source of a model.

    Returns:
        "onnx", "pt2" or "openvino"; None for another source.
    """
    if not isinstance(source, str | os.PathLike):
        return None
    return SUFFIXES.get(Path(os.fspath(source)).suffix.lower())


def open_file(path: str | os.PathLike[str], threads: int | None = None) -> Runtime:
    """Open an exported file with the runtime of its format.

    Args:
        path: The file: .onnx, .pt2 or .xml.
        threads: Threads that compute; None: torch's number.

    Returns:
        The open file.

    Raises:
        SourceError: There is no such file.
        ConfigError: The suffix is another, or the runtime is not installed.
        CheckpointError: The runtime cannot open the file.
    """
    path = expand_home(path)
    kind = find_format(path)
    if kind is None:
        raise ConfigError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise SourceError(f"{path}: no such file: expected the path of an exported model")
    openers = {"onnx": _open_onnx, "pt2": _open_pt2, "openvino": _open_openvino}
    return openers[kind](path, threads or torch.get_num_threads())


def run_pixels(runtime: Runtime, pixels: Array) -> dict[str, Array]:
    """Run a file on one array.

    Args:
        runtime: The open file.
        pixels: (B, C, H, W), of the input's dtype.

    Returns:
        Outputs by name.

    Raises:
        ImageError: The runtime refuses the pixels.
    """
    try:
        return dict(runtime.run(np.ascontiguousarray(pixels)))
    except Exception as error:  # exceptions of the runtimes have no common base
        size = "x".join(map(str, pixels.shape))
        raise ImageError(
            f"{runtime.path}: {runtime.version} does not compute pixels of {size}: "
            f"{first_line(error)[:200]}"
        ) from error


def _refuse(path: Path, library: str, error: Exception) -> CheckpointError:
    """Return the error for a file that its runtime does not open."""
    return CheckpointError(f"{path}: {library} cannot open it: {first_line(error)[:200]}")


def _open_onnx(path: Path, threads: int) -> Runtime:
    """Open a file with ONNX Runtime."""
    onnxruntime = import_extra("export", "onnxruntime", f"{path}: ONNX Runtime runs it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if not this_machine().avx512_vnni:
        # Without VNNI pairs of 8-bit products are added in 16 bits, which saturate, unless the
        # weights are unsigned too.
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3  # warnings about unused initializers are not the user's
    try:
        session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=onnxruntime.get_available_providers()
        )
    except Exception as error:  # its exceptions have no common base
        raise _refuse(path, "ONNX Runtime", error) from error
    if len(session.get_inputs()) != 1:
        raise CheckpointError(f"{path} has {len(session.get_inputs())} inputs: expected one")
    pixels = session.get_inputs()[0]
    texts = session.get_modelmeta().custom_metadata_map
    text = texts.get(KEY)
    names = tuple(output.name for output in session.get_outputs())
    types = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(float16)": "float16"}
    if pixels.type not in types:
        raise CheckpointError(f"{path} takes {pixels.type}: expected uint8 or float32 pixels")

    def run(images: Array) -> Mapping[str, Array]:
        return dict(zip(names, session.run(None, {pixels.name: images}), strict=True))

    return Runtime(
        "onnx", path, None if text is None else parse_info(text, str(path)), types[pixels.type],
        tuple(size if isinstance(size, int) else None for size in pixels.shape), names, run,
        f"onnxruntime {onnxruntime.__version__}", texts.get(VERIFICATION_KEY, "")[:MAX_LENGTH],
        ("cuda", "cpu") if "CUDAExecutionProvider" in session.get_providers() else ("cpu",),
    )  # fmt: skip


def _open_pt2(path: Path, threads: int) -> Runtime:  # noqa: ARG001
    """Open a program of torch.export."""
    extra = {KEY: "", VERIFICATION_KEY: ""}
    try:
        check_archive(path)
        program = torch.export.load(path, extra_files=extra)
        module = program.module()
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise _refuse(path, "torch.export", error) from error
    if not extra[KEY]:
        raise CheckpointError(f"{path} has no metadata of vitlib: export the model with vitlib")
    info = parse_info(extra[KEY], str(path))

    def run(images: Array) -> Mapping[str, Array]:
        with torch.inference_mode():
            results = module(torch.from_numpy(np.ascontiguousarray(images)))
        return {n: result.numpy() for n, result in zip(info.outputs, results, strict=True)}

    height, width = info.image_size or (None, None)
    return Runtime(
        "pt2", path, info, info.input, (None, info.in_channels, height, width), info.outputs, run,
        f"torch {torch.__version__}", extra[VERIFICATION_KEY][:MAX_LENGTH],
    )  # fmt: skip


def _open_openvino(path: Path, threads: int) -> Runtime:
    """Open an OpenVINO IR."""
    openvino = import_extra("openvino", "openvino", f"{path}: OpenVINO runs it")
    try:
        core = openvino.Core()
        model = core.read_model(os.fspath(path))
        # "f32": OpenVINO computes in bfloat16 by default where the CPU has it.
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(model, "CPU", settings)
    except Exception as error:  # its exceptions have no common base
        raise _refuse(path, "OpenVINO", error) from error
    if len(compiled.inputs) != 1:
        raise CheckpointError(f"{path} has {len(compiled.inputs)} inputs: expected one")
    pixels = compiled.input(0)
    names = tuple(sorted(output.get_names())[0] for output in compiled.outputs)
    texts = {
        key: str(model.get_rt_info([key]).value)
        for key in (KEY, VERIFICATION_KEY)
        if model.has_rt_info([key])
    }
    info = parse_info(texts[KEY], str(path)) if KEY in texts else None
    verification = texts.get(VERIFICATION_KEY, "")
    lock = threading.Lock()  # a compiled model has one request, which one thread may use
    dtype = {"u8": "uint8", "f32": "float32"}.get(pixels.element_type.get_type_name(), "")
    if not dtype:
        raise CheckpointError(f"{path} takes {pixels.element_type}: expected uint8 or float32")
    shape = tuple(d.get_length() if d.is_static else None for d in pixels.partial_shape)

    def run(images: Array) -> Mapping[str, Array]:
        with lock:
            results = compiled(images)
        return {name: results[index] for index, name in enumerate(names)}

    return Runtime(
        "openvino", path, info, dtype, shape, names, run, f"openvino {openvino.__version__}",
        verification[:MAX_LENGTH],
    )  # fmt: skip
