"""Small trainable parts that are added to a frozen model, and saved without it.

`adaptation.py` adds them: prompts (2203.12119), bottleneck adapters (1902.00751, 2205.13535) and
LoRA (2106.09685). `delta.py` writes them to a file and puts them on their base again.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitlib.adapters.adaptation import adapt, merge_lora
    from vitlib.adapters.delta import load_delta, save_delta

__all__ = ["adapt", "load_delta", "merge_lora", "save_delta"]


def __getattr__(name: str) -> Any:
    """Load a function on first use (PEP 562): vitlib.save_delta needs few of these files."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "delta" if name.endswith("_delta") else "adaptation"
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
