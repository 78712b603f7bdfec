"""Checks of checkpoints: what one contains, whether it is sound, and conversion with proof.

- info lists the content of a checkpoint and what was assumed.
- describe_file lists what an exported file says of itself.
- verify compares it with a reference block by block, or searches one file for anomalies.
- convert writes another layout, and compares the logits of both.
"""

from vitlib.checks.convert import Change, Conversion, convert
from vitlib.checks.exported import ExportedFile, describe_file
from vitlib.checks.info import Info, Profiles, info, profiles
from vitlib.checks.verdict import Verdict
from vitlib.checks.verify import verify

__all__ = [
    "Change",
    "Conversion",
    "ExportedFile",
    "Info",
    "Profiles",
    "Verdict",
    "convert",
    "describe_file",
    "info",
    "profiles",
    "verify",
]
