"""Make the files that peers read from one checkpoint: ONNX, its 8-bit forms, OpenVINO.

compare.py runs this script with the peers' interpreter; it is never timed. The command line has the
task in JSON: folder (checkpoint in transformers' layout), work_folder, calibration (.npy of pixels)
and file_keys. The output is JSON: the reason why a file is absent, by key.

ONNX Runtime's transformer optimizer is not used. It fuses patterns that the runtime's highest level
leaves, but did not make these models faster (torch's exporter, ONNX Runtime 1.32).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Name of each file, by key.
FILES = {
    "onnx": "model.onnx",
    "onnx-dynamic": "dynamic.onnx",
    "onnx-static": "static.onnx",
    "openvino": "model.xml",
    "openvino-int8": "int8.xml",
}


def skip_torchvision_ops() -> None:
    """Let torchvision be imported without its compiled operators.

    transformers and timm import torchvision for its Python parts only. Its import registers fake
    kernels for operators such as torchvision::nms, and fails if the operators are not loaded. This
    function makes torch ignore those registrations.
    """
    import torch

    register = torch.library.register_fake

    def register_fake(op: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *arguments, **options)

    torch.library.register_fake = register_fake  # type: ignore[assignment]


def transformers_model(folder: str, **options: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Load a checkpoint in eval mode.

    Returns:
        The model, and a function that extracts the logits or the pooled class token.
    """
    skip_torchvision_ops()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = json.loads((Path(folder) / "config.json").read_text())
    if config["architectures"][0].endswith("ForImageClassification"):
        auto_class = transformers.AutoModelForImageClassification
        return auto_class.from_pretrained(folder, **options).eval(), lambda output: output.logits
    return transformers.AutoModel.from_pretrained(folder, **options).eval(), pooled_output


def pooled_output(output: Any) -> Any:
    """Return DINOv2's class token after the final norm."""
    return output.pooler_output


def export_onnx(task: dict[str, Any], file: Path) -> None:
    """Export to ONNX with a dynamic batch size by torch's TorchScript exporter.

    Both runtimes fix the batch size when they load the file.
    """
    import torch

    model, extract_output = transformers_model(task["folder"])

    class ExportedModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Any) -> Any:
            return extract_output(self.model(pixel_values=pixels))

    batch_axis = {0: "batch"}
    torch.onnx.export(
        ExportedModel(),
        (torch.zeros(2, 3, 224, 224),),
        file,
        input_names=["pixels"],
        output_names=["output"],
        dynamic_axes={"pixels": batch_axis, "output": batch_axis},
        opset_version=18,
        dynamo=False,
    )


def quantize_onnx_dynamic(task: dict[str, Any], file: Path) -> None:
    """Quantize weights per channel to int8, and activations at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = preprocess_onnx(task)
    quantize_dynamic(
        source,
        file,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def quantize_onnx_static(task: dict[str, Any], file: Path) -> None:
    """Quantize with calibration: uint8 activations, int8 weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class CalibrationImages(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = iter(calibration_images(task))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {"pixels": image}

    quantize_static(
        preprocess_onnx(task),
        file,
        CalibrationImages(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"MatMulConstBOnly": True},
    )


def preprocess_onnx(task: dict[str, Any]) -> Path:
    """Run the preprocessing of ONNX Runtime's quantization guide, once."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file = Path(task["work_folder"]) / "preprocessed.onnx"
    if not file.exists():
        quant_pre_process(str(Path(task["work_folder"]) / FILES["onnx"]), str(file))
    return file


def convert_to_openvino(task: dict[str, Any], file: Path) -> None:
    """Convert the ONNX file to OpenVINO's format, in float32."""
    import openvino as ov

    model = ov.Core().read_model(str(Path(task["work_folder"]) / FILES["onnx"]))
    ov.save_model(model, str(file), compress_to_fp16=False)


def quantize_openvino(task: dict[str, Any], file: Path) -> None:
    """Quantize by NNCF's post-training quantization for transformers."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(str(Path(task["work_folder"]) / FILES["onnx"]))
    images = list(calibration_images(task))
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    ov.save_model(quantized, str(file))


def calibration_images(task: dict[str, Any]) -> Iterator[Any]:
    """Yield the calibration images one by one, (1, 3, H, W) each."""
    import numpy as np

    pixels = np.load(task["calibration"])
    yield from np.split(pixels, len(pixels))


def main() -> None:
    task = json.loads(sys.argv[1])
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # quantizers print to stdout; it must have only the result
    makers = {
        "onnx": export_onnx,
        "onnx-dynamic": quantize_onnx_dynamic,
        "onnx-static": quantize_onnx_static,
        "openvino": convert_to_openvino,
        "openvino-int8": quantize_openvino,
    }
    failed = {}
    for key in task["file_keys"]:
        file = Path(task["work_folder"]) / FILES[key]
        temporary = file.with_name("part-" + file.name)
        if file.exists():
            continue
        try:
            makers[key](task, temporary)
        except Exception as error:  # any error of a library: the other files may still succeed
            message = " ".join(str(error).split())[:200]
            failed[key] = f"{type(error).__name__}: {message}"
            continue
        if file.suffix == ".xml":  # OpenVINO finds the weights by the file's name
            temporary.with_suffix(".bin").replace(file.with_suffix(".bin"))
        temporary.replace(file)
    print(json.dumps(failed), file=output, flush=True)


if __name__ == "__main__":
    main()
