"""The page docs/architectures.md, made of the tables of the package; run it to write it anew."""

from __future__ import annotations

from itertools import groupby

from paths import ROOT
from vitlib.checkpoint.architectures import OPENCLIP, TIMM, TRANSFORMERS, list_architectures

PAGE = ROOT / "docs/architectures.md"
TITLES = {
    TIMM: "timm's architectures",
    TRANSFORMERS: "transformers' model types and published checkpoints",
    OPENCLIP: "open_clip's configs",
}
START = """\
# Architectures

<!-- Made by `python tests/architectures_page.py`; a test compares it with the code. -->

Every architecture that vitlib knows by name, as `vitlib list` prints it: {total}, of which
{loads} load. `ViTConfig.named(name)` gives the config of those of timm and open_clip. A dash stands
for what no table of vitlib says. The sizes are the width, the blocks, the heads, the patch and the
image in pixels. A model type has models of any size; a published checkpoint stands for those of its
width.
"""
HEAD = "| name | family | size | status |\n|---|---|---|---|\n"


def make_page() -> str:
    """Return the page."""
    entries = list_architectures()
    text = START.format(total=len(entries), loads=sum(entry.loads for entry in entries))
    for library, group in groupby(entries, key=lambda entry: entry.library):
        rows = [
            f"| `{entry.name}` | {entry.family or '-'} | {entry.size or '-'} | {entry.status} |"
            for entry in group
        ]
        text += f"\n## {TITLES[library]}\n\n{HEAD}" + "\n".join(rows) + "\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
