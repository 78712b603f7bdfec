"""Write a model as OpenVINO IR: model.xml and model.bin."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import quoteattr

from vitlib.errors import ConfigError
from vitlib.export.onnx_file import quiet_exporter
from vitlib.export.prepare import PreparedModel
from vitlib.export.pt2_file import trace
from vitlib.predict.exported_info import KEY
from vitlib.system.requirements import import_extra

_END = "</rt_info>\n</net>"


def check_openvino() -> None:
    """Check that OpenVINO is installed.

    Raises:
        ConfigError: It is not.
    """
    import_extra("openvino", "openvino", "OpenVINO files need openvino")


def write_openvino(prepared: PreparedModel, folder: Path) -> Path:
    """Write a model as OpenVINO IR.

    Args:
        prepared: The model.
        folder: An empty folder.

    Returns:
        The file folder/model.xml. The weights are in folder/model.bin, in float16 only where the
        settings say so.

    Raises:
        ConfigError: The precision is int8.
    """
    import openvino

    precision = prepared.settings.precision
    if precision == "int8":
        raise ConfigError(
            "precision='int8': vitlib writes OpenVINO files in fp32 or with weights in fp16: "
            "export int8 as onnx, which OpenVINO reads"
        )
    program, path = trace(prepared), folder / "model.xml"
    with quiet_exporter():
        model = openvino.convert_model(program)
    info = prepared.info
    model.reshape([-1, info.in_channels, *(info.image_size or (-1, -1))])
    model.inputs[0].get_tensor().set_names({"pixels"})
    for output, name in zip(model.outputs, prepared.outputs, strict=True):
        output.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    model.set_rt_info(info.to_json(), [KEY])
    # save_model() halves the weights unless told not to.
    openvino.save_model(model, path, compress_to_fp16=precision == "fp16")
    return path


def append_rt_info(path: Path, key: str, text: str) -> None:
    """Add an entry to the rt_info of a file; the weights need not be read.

    Args:
        path: The .xml file.
        key: Name of the entry.
        text: Its text.
    """
    content = path.read_text(encoding="utf-8").rstrip()
    assert content.endswith(_END), "an IR ends in its rt_info"
    entry = f"\t<{key} value={quoteattr(text)} />\n\t"
    path.write_text(f"{content.removesuffix(_END)}{entry}{_END}\n", encoding="utf-8")
