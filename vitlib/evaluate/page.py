"""Parts of a page of results: everything in one file, which fetches nothing from a network.

Labels and file names are hostile input: all text is escaped, and the content security policy in the
head of the page allows a single script, SCRIPT, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape

from vitlib.evaluate.page_style import SCRIPT, STYLE

Cell = tuple[str, str]  # text, and the key that sorts it
DASH = "\N{EN DASH}"


def render_document(title: str, parts: Iterable[str]) -> str:
    """Render a page of parts.

    Args:
        title: title of the window, as text.
        parts: HTML of the parts in order; empty ones are left out.

    Returns:
        The HTML.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def escape_text(value: object) -> str:
    """Escape text for HTML.

    Args:
        value: converted to text.

    Returns:
        The text, with unprintable characters and those that turn the reading order as escapes.
    """
    clean = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
    return escape(clean, quote=True)


def format_fixed(value: float, digits: int = 4) -> str:
    """Format a number with fixed decimals.

    Args:
        value: the number.
        digits: decimals.

    Returns:
        The text; a dash for NaN and infinity.
    """
    return f"{value:.{digits}f}" if math.isfinite(value) else DASH


def format_significant(value: float, digits: int = 5) -> str:
    """Format a number of any size.

    Args:
        value: the number.
        digits: significant digits.

    Returns:
        The text; a dash for NaN and infinity.
    """
    return f"{value:.{digits}g}" if math.isfinite(value) else DASH


def render_table(
    title: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], *, sortable: bool = False
) -> str:
    """Render a table whose first column names the row, in a box that scrolls.

    Args:
        title: name of the table, which screen readers read.
        head: names of the columns.
        rows: cells of each row.
        sortable: True if a click on a column's name sorts the rows.

    Returns:
        The HTML.
    """
    names = [
        f'<th scope="col"><button type="button">{escape_text(name)}</button></th>'
        if sortable
        else f'<th scope="col">{escape_text(name)}</th>'
        for name in head
    ]
    body = [f"<tr>{''.join(_cells(row, head))}</tr>" for row in rows]
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape_text(title)}">'
        f"<table{kind}><thead><tr>{''.join(names)}</tr></thead>\n"
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )


def _cells(row: Sequence[Cell], head: Sequence[str]) -> Iterator[str]:
    """Render the cells of a row; long names of metrics may break at underscores."""
    tag = 'th scope="row"'
    for (shown, sort_key), column in zip(row, head, strict=True):
        key = f' data-v="{escape_text(sort_key)}"' if sort_key != shown else ""
        # A narrow page shows the column's name beside the cell.
        name = f' data-column="{escape_text(column)}"'
        breakable = escape_text(shown).replace("_", "_<wbr>")
        yield f"<{tag}{key}{name}>{breakable}</{tag.split()[0]}>"
        tag = "td"


def number_cell(value: float, form: Callable[[float], str] = format_fixed) -> Cell:
    """Make a cell of a number, sorted by nine significant digits.

    Args:
        value: the number.
        form: writes it.

    Returns:
        Text and key.
    """
    return form(value), f"{value:.9g}" if math.isfinite(value) else ""


def render_notes(notes: Iterable[str]) -> str:
    """Render remarks as a list.

    Args:
        notes: the remarks, as text.

    Returns:
        The HTML; empty without notes.
    """
    items = "".join(f"<li>{escape_text(note)}</li>" for note in notes)
    return f'<ul class="notes" aria-label="Notes">{items}</ul>' if items else ""


def render_section(title: str, body: str) -> str:
    """Render a section of a page.

    Args:
        title: heading, as text.
        body: HTML.

    Returns:
        The HTML.
    """
    return f"<section>\n<h2>{escape_text(title)}</h2>\n{body}\n</section>"


def render_picture(description: str, versions: Mapping[str, bytes]) -> str:
    """Render a chart, whose version follows the page's width and the reader's colour scheme.

    Args:
        description: text in place of the picture: what it shows, and where its numbers are.
        versions: PNG by version: light, dark, and for narrow pages "narrow light" and
            "narrow dark".

    Returns:
        The HTML.
    """
    dark, narrow = "screen and (prefers-color-scheme: dark)", "(max-width: 52rem)"  # paper is light
    conditions = {"narrow dark": f"{dark} and {narrow}", "narrow light": narrow, "dark": dark}
    sources = [
        f'<source media="{condition}" srcset="{encode_data(versions[name], "png")}">'
        for name, condition in conditions.items()
        if name in versions
    ]
    large = ' class="large"' if "narrow light" in versions else ""
    alt, light = escape_text(description), encode_data(versions["light"], "png")
    image = f'<img{large} alt="{alt}" src="{light}">'
    return f'<div class="picture"><picture>{"".join(sources)}{image}</picture></div>'


def encode_data(content: bytes, kind: str) -> str:
    """Encode an image as a URL.

    Args:
        content: the file.
        kind: its format, such as "png".

    Returns:
        The URL.
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
