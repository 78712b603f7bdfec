"""Tests of the server's page as text: what it says is in one file, which a translator changes."""

from __future__ import annotations

import json
import re

from paths import ROOT

PAGE = ROOT / "vitlib" / "serve" / "page"


def test_texts_of_the_page_are_in_one_file() -> None:
    html, script = (PAGE / "index.html").read_text("utf-8"), (PAGE / "app.js").read_text("utf-8")
    block = re.search(r'<script type="application/json" id="texts">(.*?)</script>', html, re.DOTALL)
    assert block
    texts = json.loads(block[1])
    code = re.sub(r"^\s*//.*$", "", script, flags=re.MULTILINE)
    literals = [a or b for a, b in re.findall(r'"([^"\n]*)"|`([^`]*)`', code)]
    sentences = [text for text in literals if re.search(r"[a-z] [a-z]|[.…]$", text)]
    assert sentences == ["use strict"]
    # Each text is used, and each that is used exists; those of counts exist for 1, too.
    counted = set(re.findall(r'sayCount\("(\w+)"', code))
    assert {f"{name}One" for name in counted} == {name for name in texts if name.endswith("One")}
    assert set(re.findall(r'say\w*\("(\w+)"', code)) <= texts.keys()
    for name in texts:
        assert f'"{name.removesuffix("One")}"' in code


def test_texts_of_the_page_name_their_values() -> None:
    html, script = (PAGE / "index.html").read_text("utf-8"), (PAGE / "app.js").read_text("utf-8")
    values = set(re.findall(r"\{(\w+)\}", html))
    assert values == {"model", "n", "kind", "task", "method", "status"}
    for name in values:
        assert re.search(rf"\b{name}\b", script)
