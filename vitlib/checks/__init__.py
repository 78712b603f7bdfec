"""What a checkpoint is, whether it is whole, and the same checkpoint in another layout.

info says what a file holds and what was assumed of it; verify runs it beside a reference, or alone
looks for layers that cannot be right; convert writes another layout and proves what it wrote.
"""

from vitlib.checks.convert import Change, Conversion, convert
from vitlib.checks.info import Info, Profiles, info, profiles
from vitlib.checks.verify import Verdict, verify

__all__ = [
    "Change",
    "Conversion",
    "Info",
    "Profiles",
    "Verdict",
    "convert",
    "info",
    "profiles",
    "verify",
]
