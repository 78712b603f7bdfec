"""Export models to files that run elsewhere, each checked against the model before it counts."""

from vitlib.export.export import ExportReport, export_model
from vitlib.export.formats import to_executorch, to_mlflow, to_onnx, to_openvino, to_pt2
from vitlib.export.prepare import ExportSettings

__all__ = [
    "ExportReport",
    "ExportSettings",
    "export_model",
    "to_executorch",
    "to_mlflow",
    "to_onnx",
    "to_openvino",
    "to_pt2",
]
