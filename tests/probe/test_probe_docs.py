"""The code of docs/probe.md runs, and says what the package does."""

from __future__ import annotations

import re

import pytest

from paths import ROOT
from vitlib.probe.linear import MIN_STEPS, RATES
from vitlib.probe.logistic_head import FEW, PENALTIES
from vitlib.probe.neighbours import COUNTS, TEMPERATURE
from vitlib.probe.projection import MAX_POINTS

PAGE = (ROOT / "docs" / "probe.md").read_text(encoding="utf-8")


def test_python_of_the_page_runs() -> None:
    pytest.importorskip("sklearn", reason="logistic regression needs scikit-learn")
    names: dict[str, object] = {}
    [code] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(code, "probe.md", "exec"), names)
    assert {k: rows.shape for k, rows in names["scores"].items()} == {10: (3, 5), 20: (3, 5)}
    assert names["head"].scores(names["features"][:3]).shape == (3, 5)


def test_numbers_of_the_page_are_those_of_the_code() -> None:
    assert f"k of {', '.join(map(str, COUNTS))}" in PAGE
    assert f"softmax(cosine / {TEMPERATURE})" in PAGE
    assert f"{len(PENALTIES)} values from 1e-6 to 1e5" in PAGE
    assert (PENALTIES[0], PENALTIES[-1]) == (1e-6, 1e5)
    assert f"one of {len(RATES)} from 1e-5 to 0.1" in PAGE
    assert (RATES[0], RATES[-1]) == (1e-5, 0.1)
    assert f"at least {MIN_STEPS} steps" in PAGE
    assert f"up to {FEW:,} training photos" in PAGE
    assert f"at most {MAX_POINTS:,} of them" in PAGE
