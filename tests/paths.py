"""Folders that tests read: the repository, the pinned fixtures, the shared models and photos."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SHARED = Path(os.environ.get("VITLIB_SHARED") or ROOT.parent / "shared")
