"""Pictures of predictions and of maps over photos, as matplotlib figures."""

from vitlib.plots.figures import (
    FORMATS,
    check_figure_path,
    contact_sheet,
    curves,
    heads,
    labels,
    mask,
    overlay,
    patch_pca,
    save,
    similarity,
    tiles,
)

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
