"""Libraries of others, imported once: torchvision's compiled operators are not for this torch."""

from __future__ import annotations

import warnings

import pytest

from census.operators import without_operators


@pytest.fixture(scope="session", autouse=True)
def libraries() -> None:
    """Import what needs torchvision; `make test-ecosystem` installs all."""
    pytest.importorskip("torchinfo", reason="make test-ecosystem installs the libraries")
    with without_operators(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others do on import is not what is tested
        import lightning  # noqa: F401
        import peft  # noqa: F401
        import pytorch_grad_cam  # noqa: F401
        import timm  # noqa: F401
