"""Export models to files that run elsewhere, each checked against the model before it counts."""

from vitlib.export.export import ExportReport as ExportReport
from vitlib.export.export import export_model as export_model
from vitlib.export.formats import to_executorch as to_executorch
from vitlib.export.formats import to_mlflow as to_mlflow
from vitlib.export.formats import to_onnx as to_onnx
from vitlib.export.formats import to_openvino as to_openvino
from vitlib.export.formats import to_pt2 as to_pt2
from vitlib.export.prepare import ExportSettings as ExportSettings
