"""Test that libraries of C++ kernels are compiled for one torch and CPU, or not at all."""

from __future__ import annotations

import logging

import pytest
import torch

from vitlib.fast import cpp_attention, cpp_kernels
from vitlib.fast.attention import fused_attention
from vitlib.fast.cpp_kernels import FILES, FOLDER, load_kernels, read_source
from vitlib.fast.cpu import Machine


def test_library_that_is_not_compiled_leaves_torch_to_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: str) -> None:
        raise RuntimeError("no C++ compiler\nwith more")

    caplog.set_level(logging.INFO, logger="vitlib")
    monkeypatch.setattr(cpp_kernels, "load_cpp", fail)
    monkeypatch.setattr(cpp_kernels, "read_source", lambda name: name)
    monkeypatch.setattr(cpp_attention, "kernel_name", lambda *_: "attention_of_no_machine")
    monkeypatch.setattr(cpp_attention, "load_kernels", load_kernels.__wrapped__)
    assert cpp_attention.cpp_attention(torch.float32) is fused_attention
    assert "torch's kernels serve: RuntimeError: no C++ compiler" in caplog.text


def test_compiler_that_cannot_be_imported_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second import of torch's compiler would raise something that says nothing of the cause."""

    def fail() -> None:
        raise OSError("the folder cannot be made")

    monkeypatch.setattr(cpp_kernels, "import_compiler", fail)
    with pytest.raises(OSError, match="the folder cannot be made"):
        load_kernels.__wrapped__("attention_avx512", (), lambda: None)


def test_library_is_for_one_torch_and_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler keeps a library by its source, and its headers are torch's."""
    for library in FILES:
        here = read_source(library)
        assert torch.__version__ in here.splitlines()[0]
        with monkeypatch.context() as patch:
            zen = Machine("x86_64", "amd", "Zen", avx512=True)
            patch.setattr(cpp_kernels, "this_machine", lambda machine=zen: machine)
            assert read_source(library) != here


def test_package_holds_the_sources() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {name for files in FILES.values() for name in files}
