"""Figures of predictions and of maps over photos, drawn with matplotlib."""

from vitlib.plots.figures import (
    FORMATS,
    check_figure_path,
    curves,
    labels,
    save,
)
from vitlib.plots.head_figures import heads, tiles
from vitlib.plots.map_figures import mask, overlay, patch_pca, similarity
from vitlib.plots.sheet import caption_predictions, contact_sheet, file_name

__all__ = [
    "FORMATS",
    "caption_predictions",
    "check_figure_path",
    "contact_sheet",
    "curves",
    "file_name",
    "heads",
    "labels",
    "mask",
    "overlay",
    "patch_pca",
    "save",
    "similarity",
    "tiles",
]
