"""Colours of a report's charts, on light and on dark pages."""

from __future__ import annotations

from typing import Any, NamedTuple


class Palette(NamedTuple):
    """Colours of a chart, which colour-blind readers can tell apart (after Okabe and Ito).

    Attributes:
        back: Background, as that of the page.
        ink: Text and axes.
        gray: Guides, and what matters least.
        blue: First colour.
        orange: Second colour.
        curves: Colours of the curves of classes.
        empty: Cells of a matrix without a value.
        shares: Colours of a share of 0 and of 1.
        on_full: Text on the colour of 1.
    """

    back: str
    ink: str
    gray: str
    blue: str
    orange: str
    curves: tuple[str, ...]
    empty: str
    shares: tuple[str, str]
    on_full: str

    def settings(self) -> Any:
        """Return matplotlib's settings for artists that get no colour of their own."""
        inked = (
            "text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
            "ytick.color", "legend.labelcolor",
        )  # fmt: skip
        return dict.fromkeys(inked, self.ink) | {
            "figure.facecolor": self.back,
            "axes.facecolor": self.back,
            "font.size": 9,
        }


LIGHT = Palette(
    back="#FFFFFF", ink="#1C1C1E", gray="#B5B5B5", blue="#0072B2", orange="#D55E00",
    curves=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
    empty="#EEEEEE", shares=("#F2F6FB", "#08519C"), on_full="#FFFFFF",
)  # fmt: skip
DARK = Palette(
    back="#17181A", ink="#ECECEE", gray="#77777D", blue="#56B4E9", orange="#FF8A3D",
    curves=("#56B4E9", "#FF8A3D", "#2FC79A", "#E79AC6", "#B8A6FF", "#F0C04A"),
    empty="#2A2B2F", shares=("#1F2A36", "#8CCBF7"), on_full="#101214",
)  # fmt: skip
