"""Names and words of vitlib's source that a file of its own has others for."""

from __future__ import annotations

import re

# What is said of vitlib in its source, and what that means in a file of its own.
WORDS = (
    (r"\bLayerNorm \| RMSNorm\b", "nn.Module"),
    (r"(?<![\w.])(LayerNorm|RMSNorm|Linear)\b(?=\()", r"nn.\1"),
    (r"(?<![\w.])PatchProjection\b(?=\()", "nn.Conv2d"),
    (r", bias=True\b", ""),
    (
        r"self\._misfit\(images\)",
        'f"{tuple(images.shape)} {images.dtype}: expected floats (B, C, H, W)"',
    ),
    (r"\bBlocks\(", "nn.ModuleList("),
    (r"\b(?:ImageError|ConfigError)\(", "ValueError("),
    ("with an ImageProcessor", "with MEAN and STD"),
    (r" \(see positions\.py\)", ""),
    (r"  # as encoder\.Linear", ""),  # whose initial weights a file has not
    (r", see dropout\.py", ""),
    (" of any rule but the class token alone", ""),
    (r"; without a head, the output of `embed`", ""),
    (
        r"One trunk for every family .*\(2012\.12877\)",
        "Vision Transformer: patches and positions -> blocks -> norm -> pool -> head",
    ),
)


def in_own_words(text: str) -> str:
    """Write a line without names that only vitlib has.

    Args:
        text: A line of code, or of a docstring.
    """
    for pattern, word in WORDS:
        text = re.sub(pattern, word, text)
    return text
