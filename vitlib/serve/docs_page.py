"""The page /docs: every route with its parameters, bodies and answers, made from /openapi.json.

It is HTML without scripts, so that it works without a network and in any browser. Every text is
escaped. FastAPI's own page loads its scripts from another host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: routes</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="page/style.css">
</head>
<body class="docs">
<header>
  <h1>{title} {version}</h1>
  <p>{description} <a href="./">Try it with photos</a>. <a href="openapi.json">openapi.json</a></p>
</header>
<main>
"""
_TAIL = "</main>\n</body>\n</html>\n"
# A command for each kind of body.
_COMMANDS = {
    "image/*": "curl --data-binary @cat.jpg {url}",
    "multipart/form-data": "curl -F a=@cat.jpg -F b=@dog.jpg {url}",
    "application/json": (
        """curl -H 'Content-Type: application/json' -d '{{"input_data": ["BASE64"]}}' """
        "{url}"
    ),
}


def render(schema: Mapping[str, Any], address: str) -> str:
    """Render the page.

    Args:
        schema: The app's OpenAPI schema.
        address: The URL of the server, for the commands.

    Returns:
        HTML.
    """
    info = {name: escape(str(text)) for name, text in schema["info"].items()}
    sections = [
        section
        for route, operations in schema["paths"].items()
        for method, operation in operations.items()
        for section in _render_operation(address.rstrip("/") + route, method, route, operation)
    ]
    return _HEAD.format(**info) + "".join(sections) + _TAIL


def _render_operation(
    url: str, method: str, route: str, operation: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the HTML of one route."""
    name = f"{method.upper()} {route}"
    yield f'<section class="card" id="{escape(route.strip("/"))}">\n<h2>{escape(name)}</h2>\n'
    yield f"<p>{escape(operation.get('summary', ''))}</p>\n"
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [(item["name"], _describe_parameter(item)) for item in parameters]
        yield _table("Parameters of the URL", rows)
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        yield f"<p>Body: {escape(', '.join(content))}</p>\n"
        commands = [text.format(url=url) for kind, text in _COMMANDS.items() if kind in content]
        label = escape(f"Commands of {name}")  # the box scrolls, so that a keyboard must reach it
        text = escape(chr(10).join(commands))
        yield f'<pre tabindex="0" role="region" aria-label="{label}">{text}</pre>\n'
    answers = operation.get("responses", {})
    yield _table("Answers", [(code, item.get("description", "")) for code, item in answers.items()])
    yield "</section>\n"


def _describe_parameter(item: Mapping[str, Any]) -> str:
    """Describe the values of a parameter of the URL."""
    schema = item["schema"]
    values = " | ".join(map(str, schema["enum"])) if "enum" in schema else str(schema["type"])
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None:
        values += f", {low} to {high}" if high is not None else f", {low} or more"
    if "default" in schema:
        values += f"; default {schema['default']}"
    return f"{values}. {schema.get('description', '')}".strip()


def _table(caption: str, rows: list[tuple[str, str]]) -> str:
    """Return a table of two columns."""
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
        for name, text in rows
    ]
    return f"<table><caption>{escape(caption)}</caption>\n" + "\n".join(lines) + "\n</table>\n"
