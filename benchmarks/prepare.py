"""The files that peers read: ONNX, its 8-bit forms, OpenVINO's, made once of one checkpoint.

compare.py runs this with the peers' interpreter; none of it is in any timing. The task, JSON on the
command line: folder (the checkpoint, as transformers reads it), into, calibration (.npy of pixels).
It prints, as JSON, why each piece that failed is not there.

ONNX Runtime's transformer optimizer is left out on purpose: it fuses what the runtime's own highest
level does not, which made these models no faster (torch's exporter, ONNX Runtime 1.32).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILES = {
    "onnx": "model.onnx",
    "onnx-dynamic": "dynamic.onnx",
    "onnx-static": "static.onnx",
    "openvino": "model.xml",
    "openvino-int8": "int8.xml",
}


def spare_torchvision() -> None:
    """Let torchvision be imported beside a torch whose C++ does not fit it.

    transformers and timm import it for its Python parts only. Its import registers shapes for
    compiled operations, torchvision::nms and the like, and fails where those are not loaded: so a
    registration for them is passed over.
    """
    import torch

    register = torch.library.register_fake

    def register_others(op: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *arguments, **options)

    torch.library.register_fake = register_others  # type: ignore[assignment]


def transformers_model(folder: str, **options: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A checkpoint in eval mode, and how its output becomes logits, or the pooled class token."""
    spare_torchvision()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = json.loads((Path(folder) / "config.json").read_text())
    if config["architectures"][0].endswith("ForImageClassification"):
        kind = transformers.AutoModelForImageClassification
        return kind.from_pretrained(folder, **options).eval(), lambda out: out.logits
    return transformers.AutoModel.from_pretrained(folder, **options).eval(), pooled


def pooled(out: Any) -> Any:
    """DINOv2's class token after the final norm."""
    return out.pooler_output


def onnx(task: dict[str, Any], file: Path) -> None:
    """torch's TorchScript exporter, for any batch; both runtimes fix the batch when they load."""
    import torch

    model, answer = transformers_model(task["folder"])

    class Answer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Any) -> Any:
            return answer(self.model(pixel_values=pixels))

    batch = {0: "batch"}
    torch.onnx.export(
        Answer(),
        (torch.zeros(2, 3, 224, 224),),
        file,
        input_names=["pixels"],
        output_names=["answer"],
        dynamic_axes={"pixels": batch, "answer": batch},
        opset_version=18,
        dynamo=False,
    )


def onnx_dynamic(task: dict[str, Any], file: Path) -> None:
    """8-bit weights a channel each; activations are measured as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = preprocessed(task)
    quantize_dynamic(
        prepared,
        file,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def onnx_static(task: dict[str, Any], file: Path) -> None:
    """Quantised after training with photos: u8 activations, s8 weights a channel each."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Photos(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = iter(photos(task))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {"pixels": image}

    quantize_static(
        preprocessed(task),
        file,
        Photos(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"MatMulConstBOnly": True},
    )


def preprocessed(task: dict[str, Any]) -> Path:
    """What ONNX Runtime's guide does to a model before it is quantised, done once."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file = Path(task["into"]) / "preprocessed.onnx"
    if not file.exists():
        quant_pre_process(str(Path(task["into"]) / FILES["onnx"]), str(file))
    return file


def openvino(task: dict[str, Any], file: Path) -> None:
    import openvino as ov

    model = ov.Core().read_model(str(Path(task["into"]) / FILES["onnx"]))
    ov.save_model(model, str(file), compress_to_fp16=False)


def openvino_int8(task: dict[str, Any], file: Path) -> None:
    """NNCF's post-training quantisation, as its guide says for transformers."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(str(Path(task["into"]) / FILES["onnx"]))
    images = list(photos(task))
    quantised = nncf.quantize(
        model,
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    ov.save_model(quantised, str(file))


def photos(task: dict[str, Any]) -> Iterator[Any]:
    """The calibration's pixels, one image at a time."""
    import numpy as np

    pixels = np.load(task["calibration"])
    yield from np.split(pixels, len(pixels))


def main() -> None:
    task = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # quantisers print
    makers = {
        "onnx": onnx,
        "onnx-dynamic": onnx_dynamic,
        "onnx-static": onnx_static,
        "openvino": openvino,
        "openvino-int8": openvino_int8,
    }
    failed = {}
    for piece in task["pieces"]:
        file = Path(task["into"]) / FILES[piece]
        beside = file.with_name("part-" + file.name)
        if file.exists():
            continue
        try:
            makers[piece](task, beside)
        except Exception as error:  # any of any library: the others may still be made
            first = " ".join(str(error).split())[:200]
            failed[piece] = f"{type(error).__name__}: {first}"
            continue
        if file.suffix == ".xml":  # its weights lie beside it, found by its name
            beside.with_suffix(".bin").replace(file.with_suffix(".bin"))
        beside.replace(file)
    print(json.dumps(failed), file=answers, flush=True)


if __name__ == "__main__":
    main()
