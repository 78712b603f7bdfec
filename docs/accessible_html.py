"""Extension of Sphinx that adds to the pages what WCAG 2.2 AA asks and the theme lacks.

Captions of the tree of pages get the level of their heading. Code and tables scroll on a narrow
screen: a keyboard can reach them, and a screen reader says what they are. The parameters of a long
signature are a list.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_REPLACEMENTS = (
    (r'<p class="caption" role="heading">', '<p class="caption" role="heading" aria-level="2">'),
    (r"<pre>", '<pre tabindex="0" role="group" aria-label="Code">'),
    (r'<div (class="table-wrapper)', r'<div tabindex="0" role="group" aria-label="Table" \1'),
    (r'<dl>(\s*<dd><em class="sig-param">)', r'<dl role="list">\1'),
    (r'<dd>(<em class="sig-param">)', r'<dd role="listitem">\1'),
)  # fmt: skip


def add_roles(html: str) -> str:
    """Add the roles and names to a page.

    Args:
        html: The page.

    Returns:
        The page with them.
    """
    for pattern, replacement in _REPLACEMENTS:
        html = re.sub(pattern, replacement, html)
    return html


def _add_style(app: Any, config: Any) -> None:
    """Add the style sheet to every page."""
    config.html_static_path.append(str(Path(__file__).parent / "_static"))
    app.add_css_file("accessible.css")


def _write_pages(app: Any, error: Exception | None) -> None:
    """Add the roles to every page that was written."""
    if error is None and app.builder.format == "html":
        for path in Path(app.outdir).rglob("*.html"):
            html = path.read_text(encoding="utf-8")
            path.write_text(add_roles(html), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Register the functions above.

    Args:
        app: Sphinx.

    Returns:
        What Sphinx asks of an extension.
    """
    app.connect("config-inited", _add_style)
    app.connect("build-finished", _write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
