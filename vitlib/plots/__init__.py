"""Figures of predictions and of maps over photos, drawn with matplotlib."""

from vitlib.plots.figures import (
    FORMATS,
    check_figure_path,
    contact_sheet,
    curves,
    labels,
    save,
)
from vitlib.plots.map_figures import heads, mask, overlay, patch_pca, similarity, tiles

__all__ = [
    "FORMATS",
    "check_figure_path",
    "contact_sheet",
    "curves",
    "heads",
    "labels",
    "mask",
    "overlay",
    "patch_pca",
    "save",
    "similarity",
    "tiles",
]
