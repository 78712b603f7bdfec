"""The model of the tests of batches."""

from __future__ import annotations

import pytest

from fixtures.synthetic_photos import DEMO
from vitlib import Predictor


@pytest.fixture(scope="session")
def vit() -> Predictor:
    """The demo model."""
    return Predictor.load(DEMO)
