"""Rate of exported files beside transformers' exports of the same model, in the same runtime.

    python benchmarks/export.py MODEL [--photos FOLDER] [--formats onnx openvino] [--rounds 12]

Each side writes its own file: vitlib from float pixels, as the peer's file takes them;
transformers by its OnnxExporter, and for int8 onnxruntime's static quantization of that file (QDQ,
weights per channel). One runtime runs both with two threads, in turns. Figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vitlib
from vitlib.checks.compare import list_demo_photos
from vitlib.export import export_model
from vitlib.export.prepare import ExportSettings
from vitlib.predict.runtimes import open_file

BATCHES = (1, 8)
PAUSE = 0.05  # seconds: threads of a session spin for a while after its run
Run = Callable[[np.ndarray], Any]


def export_peer(folder: str, out: Path, size: tuple[int, int]) -> Path:
    """Export with transformers' own exporter, batch dynamic."""
    import onnx_ir
    import transformers
    from transformers.exporters import OnnxConfig, OnnxExporter

    config = transformers.AutoConfig.from_pretrained(folder)
    is_classifier = (config.architectures or [""])[0].endswith("ForImageClassification")
    kind = transformers.AutoModelForImageClassification if is_classifier else transformers.AutoModel
    model = kind.from_pretrained(folder).eval()
    inputs = {"pixel_values": torch.zeros(2, 3, *size)}
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic_shapes=shapes))
    path = out / "peer.onnx"
    onnx_ir.save(exported.program, str(path))
    return path


def quantize_peer(source: Path, pixels: np.ndarray) -> Path:
    """Quantize the peer's file statically, per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Photos(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(pixels)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.rows, None)
            return None if row is None else {"pixel_values": row[None]}

    prepared, out = source.with_name("prepared.onnx"), source.with_name("peer_int8.onnx")
    quant_pre_process(source, prepared)
    quantize_static(
        prepared, out, Photos(), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        per_channel=True, op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    return out


def open_peer(path: Path, kind: str) -> Run:
    """Open a peer's ONNX file in ONNX Runtime or in OpenVINO."""
    if kind == "openvino":
        import openvino

        settings = {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        return lambda images: compiled(images)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def measure(sides: dict[str, Run], batch: int, pixels: np.ndarray, rounds: int) -> list[str]:
    """Run the sides in turns, and return a row of the table."""
    images = np.ascontiguousarray(np.resize(pixels, (batch, *pixels.shape[1:])))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):  # the first two warm up
        for name, run in sides.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run(images)
            seconds[name] += [time.perf_counter() - start] if number > 1 else []
    mine, peer = (statistics.median(times) for times in seconds.values())
    return [f"{batch / mine:.1f}", f"{batch / peer:.1f}", f"{peer / mine:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--formats", nargs="+", default=["onnx"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(2)
    predictor = vitlib.Predictor.load(options.model, image_size=options.image_size)
    photos: list[Any] = list_demo_photos()
    if options.photos:
        photos = sorted(options.photos.rglob("*.jpg"))[:64]
    processor = predictor.image_processor
    pixels = torch.stack([processor.to_float(photo) for photo in photos[:32]]).numpy()
    size = tuple(pixels.shape[2:])
    print("| runtime | precision | batch | vitlib img/s | transformers img/s | ratio |")
    print("|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        peers = {"fp32": export_peer(options.model, work, size)}
        if "int8" in options.precisions:
            peers["int8"] = quantize_peer(peers["fp32"], pixels)
        for kind in options.formats:
            for precision in options.precisions:
                settings = ExportSettings(input="float", precision=precision)
                out = work / f"{kind}-{precision}"
                report = export_model(
                    predictor,
                    out,
                    kind,
                    settings,
                    photos=photos,
                    allow_drift=True,
                    calibrate=photos[:32] if precision == "int8" else None,
                )
                sides = {
                    "vitlib": open_file(report.path, 2).run,
                    "transformers": open_peer(peers[precision], kind),
                }
                for batch in BATCHES:
                    row = measure(sides, batch, pixels, options.rounds)
                    print(f"| {kind} | {precision} | {batch} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
