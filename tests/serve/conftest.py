"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fixtures.hostile_requests import PHOTOS
from fixtures.server import Server
from vitlib import Predictor

for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "urllib3"):
    pytest.importorskip(module, reason="serving needs pip install 'vitlib[serve]'")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of the demo model with low limits."""
    limits = ("--max-body-mib", 2, "--body-timeout", 2, "--max-images", 20,
              "--max-pixels", 5_000_000)  # fmt: skip
    with Server(*limits) as running:
        yield running


@pytest.fixture(scope="session")
def vit() -> Predictor:
    return Predictor.load("demo")


@pytest.fixture(scope="session")
def scores(vit: Predictor) -> Any:
    """The expected scores of PHOTOS."""
    return vit.probabilities(PHOTOS)
