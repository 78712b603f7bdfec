"""The text of a vendored file: its head, imports and config, the model's source, and `load`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import vitlib
from vitlib.config import ViTConfig, _Derived
from vitlib.config_parts import Rope
from vitlib.image.processor import ImageProcessor
from vitlib.vendor.emit import Emitter
from vitlib.vendor.expressions import SIZES
from vitlib.vendor.imports import write_imports
from vitlib.vendor.layout import WIDTH
from vitlib.vit import ViT

MAX_LINES = 250  # beyond which functions of a single call are written in place
HEADLESS = ("Compute logits, (B, C, H, W) -> (B, num_classes)", "Compute the pooled vector")
FILTERS = ("nearest", "Lanczos", "bilinear", "bicubic", "box", "Hamming")  # by Pillow's code

LOAD = '''
def load(path: str | Path = WEIGHTS) -> ViT:
    """Build the model in eval mode, with the weights that vitlib wrote beside this file."""
    with torch.device("meta"):  # no weight is initialised: the file has all of them
        model = ViT(Config())
    model.load_state_dict(load_file(path), assign=True)
    return model.eval()
'''


def write_source(model: ViT, *, name: str, command: str) -> str:
    """Write a model as the source of one file.

    Args:
        model: The model, in eval mode.
        name: Name of the file without its suffix; the weights have it too.
        command: How the file was made, and is made again.

    Returns:
        The source.
    """
    text = _write(model, name, command, compact=False)
    if len(text.splitlines()) > MAX_LINES:
        text = _write(model, name, command, compact=True)
    return text


def _write(model: ViT, name: str, command: str, *, compact: bool) -> str:
    """Write the source as it is, or with fewer functions."""
    emitter = Emitter(model, compact=compact)
    definitions = emitter.write()
    body = "\n\n\n".join(definitions)
    if not model.num_classes:
        body = body.replace(*HEADLESS)
    used = emitter.program.fields
    config = _config(used)
    rope = _rope(emitter.program.rope_fields) if "Rope(" in body else ""
    parts = [config, *([rope] if rope else []), body, LOAD.strip()]
    code = "\n\n\n".join(parts)
    constants = [
        *_preprocessing(model.image_processor),
        "",
        f'WEIGHTS = Path(__file__).with_name("{name}.safetensors")',
    ]
    imports = write_imports(emitter.program, code + "\n" + "\n".join(constants))
    head = _head(model.config, command)
    return "\n".join([head, "", *imports, "", *constants, "", "", code]) + "\n"


def _head(config: ViTConfig, command: str) -> str:
    """Write the docstring of the file."""
    lines = [
        f'"""Vision Transformer of the family {config.family}: pixels -> tokens -> blocks -> head.',
        "",
        f"Written by vitlib {vitlib.__version__} from its source, for this checkpoint; again by:",
        f"    {command}",
        "Modules have vitlib's names. Dropout and stochastic depth are left out.",
        "Shapes: B images, C channels, H W pixels, h w patches (down, across), N = h * w, T tokens",
        "(prefix tokens first), Q queries (the first Q tokens), D embed_dim, H num_heads,",
        "K = D / H, M mlp_dim. Numbers such as 2010.11929 are papers of arXiv.",
        "SPDX-License-Identifier: Apache-2.0 (as vitlib). The weights have a licence of their own.",
        '"""',
    ]
    return "\n".join(lines)


def _preprocessing(processor: ImageProcessor | None) -> list[str]:
    """Write the preprocessing as comments and constants."""
    if processor is None:
        return ["# The checkpoint states no preprocessing."]
    steps = []
    library = "torch, on floats" if processor.float_resize else "Pillow"
    by = f"{FILTERS[processor.resample]} ({library})"
    if processor.shortest_edge is not None:
        steps.append(f"the shorter side is resized to {processor.shortest_edge} pixels, {by}")
    elif processor.size is not None:
        how = {"squash": "", "cover": ", to cover it", "contain": ", to lie within it"}
        steps.append(f"resized to SIZE{how[processor.fit]}, {by}")
    if processor.crop_size is not None:
        height, width = processor.crop_size
        steps.append(f"{height}x{width} are cut from the centre")
    if processor.rescale_factor is not None:
        steps.append(f"levels are multiplied by {processor.rescale_factor:.7g}")
    if processor.image_mean is not None or processor.image_std is not None:
        steps.append("(x - MEAN) / STD")
    lines = _wrap("Preprocessing of an image: " + "; ".join(steps) + ".")
    size = processor.crop_size or processor.size
    if size is not None:
        lines.append(f"SIZE = {tuple(size)}  # height and width of the pixels")
    for name, values in (("MEAN", processor.image_mean), ("STD", processor.image_std)):
        if values is not None:
            lines.append(f"{name} = {tuple(values)}")
    return lines


def _wrap(text: str) -> list[str]:
    """Break a comment to the width of the file."""
    lines, line = [], "#"
    for word in text.split():
        if len(line) + len(word) + 1 > WIDTH:
            lines.append(line)
            line = "#"
        line += f" {word}"
    return [*lines, line]


def _config(used: dict[str, Any]) -> str:
    """Write the config of the sizes that the model's source reads."""
    notes = _attribute_notes(ViTConfig) | _attribute_notes(_Derived)
    lines = ["@dataclass(frozen=True)", "class Config:", '    """Sizes of the model."""', ""]
    for name in sorted(used, key=lambda name: (SIZES.index(name) if name in SIZES else 99, name)):
        value = used[name]
        kind = "tuple[int, int]" if isinstance(value, tuple) else type(value).__name__
        shown = '"' + value + '"' if isinstance(value, str) else repr(value)
        line = f"    {name}: {kind} = {shown}"
        note = f"  # {notes[name]}" if name in notes else ""
        lines.append(line + note if len(line + note) <= WIDTH else line)
    return "\n".join(lines)


def _attribute_notes(kind: type) -> dict[str, str]:
    """Return the first sentence that a class's docstring has of each attribute."""
    entries = re.findall(
        r"^ {4,8}(\w+): ((?:.|\n {8,})*?)(?:[.;:](?=\s)|\Z)", kind.__doc__ or "", re.M
    )
    sentences = {name: " ".join(text.split()) for name, text in entries}
    return {name: text[:1].lower() + text[1:] for name, text in sentences.items()}


def _rope(names: Iterable[str]) -> str:
    """Write the class of rotations that differ between tokens."""
    kinds = {field.name: str(field.type) for field in fields(Rope)}
    lines = ["class Rope(NamedTuple):", '    """Rotation of some tokens."""', ""]
    return "\n".join([*lines, *(f"    {name}: {kinds[name]}" for name in sorted(names))])
