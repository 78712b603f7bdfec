"""Test what the oldest torch lacks, on a newer one without it: `make test-lowest` is slow.

Each test takes away what a newer version added.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.nn.modules import module as torch_module

from fixtures.families import tiny
from vitlib.fast.module_swap import has_global_hooks


def test_hooks_of_every_module_are_found_by_torch_2_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch_module, "_has_any_global_hook", raising=False)  # newer than 2.6
    assert not has_global_hooks()
    hooks = (
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    )
    for register in hooks:
        handle: Any = register(lambda *_: None)
        assert has_global_hooks()
        handle.remove()
    assert not has_global_hooks()


def test_derived_numbers_of_a_config_are_seen_by_the_compiler_of_torch_2_6() -> None:
    """It takes a slot of a parent class for no constant."""
    config = tiny("dinov2").config
    slots = {name for kind in type(config).__mro__[1:] for name in vars(kind).get("__slots__", ())}
    assert "num_prefix_tokens" not in slots
