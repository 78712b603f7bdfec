"""Fixtures of the tests of vitlib.fast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fixtures.fast_models import forget_probes


@pytest.fixture(autouse=True)
def limit_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tiny models in one thread, as a second one would only wait; real models as torch does."""
    before = torch.get_num_threads()
    if not {"deit_tiny", "dinov2_small"} & set(request.fixturenames):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_probes() -> Iterator[None]:
    """Forget the checks of private operations before and after the test."""
    forget_probes()
    yield
    forget_probes()
