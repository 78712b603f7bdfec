"""Export models to files that run elsewhere, each checked against the model before it counts."""

from vitlib.export.export import ExportReport as ExportReport
from vitlib.export.export import export_model as export_model
from vitlib.export.prepare import ExportSettings as ExportSettings
