"""The table of docs/checkpoints.md, made of what the tests prove; run it to write it anew."""

from __future__ import annotations

from fixtures import layout_files, references
from paths import ROOT
from vitlib.checkpoint.families import list_families
from vitlib.checkpoint.layouts.detect import LAYOUTS

PAGE = ROOT / "docs/checkpoints.md"
START, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
# Proved by a test of their own in test_parity.py, under another family's name.
AS_ANOTHER = {("deit3", "hf"): "read and written as `dinov2`: test_deit3_opens_as_dinov2"}
# Written to by fixtures/prove.py alone, and read back under the family that timm gives them.
AS_VIT = {("vit_mae", "timm"), ("vit_msn", "timm")}


def table() -> str:
    """One row a family, one column a layout."""
    cells: dict[tuple[str, str], list[str]] = {}
    for name in layout_files.NAMES:
        layout, _, fixture = name.partition("/")
        if name != "jax/bigvit_sincos":
            family = layout_files.load_fixture(name).config.family
            cells.setdefault((family, layout), []).append(fixture)
    for name in references.MODELS:
        model_type = references.image_config(references.MODELS[name]().config).model_type
        family = next(
            f.name for f in list_families() if f.hf is not None and f.hf.model_type == model_type
        )
        cells.setdefault((family, "hf"), []).append(name)
    lines = [f"| family | {' | '.join(LAYOUTS)} |", f"|---|{'---|' * len(LAYOUTS)}"]
    for family in list_families():
        row = [cell(cells, family.name, layout) for layout in LAYOUTS]
        lines.append(f"| `{family.name}`: {family.title} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def cell(cells: dict[tuple[str, str], list[str]], family: str, layout: str) -> str:
    """Return the text of a cell: what is proved of a family in a layout."""
    proofs = cells.get((family, layout), [])
    if (family, layout) in AS_ANOTHER:
        return AS_ANOTHER[family, layout]
    if (family, layout) in AS_VIT:
        return "written, read as `vit`"
    if not proofs:
        return "\u2013"
    apart = {n.partition("/")[2] for n in layout_files.UNEQUAL if n.startswith(f"{layout}/")}
    sure = [name for name in proofs if layout == "hf" or name not in apart]
    rest = [name for name in proofs if name not in sure]
    message = f"read, written: {', '.join(sure)}"
    return message + (f"; read, not proved equal: {', '.join(rest)}" if rest else "")


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + table() + END + rest.partition(END)[2], encoding="utf-8")
