"""Figure that a notebook shows as a picture. Imports matplotlib, so it is imported on first use."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """Figure that Jupyter shows without pyplot, which would teach it figures at its first use."""

    def _repr_png_(self) -> bytes:
        """Return the figure as PNG, for IPython's display."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()
