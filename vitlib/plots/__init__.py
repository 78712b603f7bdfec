"""Pictures of predictions and of maps over photos, as matplotlib figures."""

from vitlib.plots.figures import (
    FORMATS,
    contact_sheet,
    curves,
    heads,
    labels,
    mask,
    named,
    overlay,
    patch_pca,
    save,
    similarity,
    tiles,
)

__all__ = [
    "FORMATS",
    "contact_sheet",
    "curves",
    "heads",
    "labels",
    "mask",
    "named",
    "overlay",
    "patch_pca",
    "save",
    "similarity",
    "tiles",
]
