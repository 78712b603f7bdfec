"""Test what the simulated GPU computes with; make test-simulated runs the tests for GPUs on it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from paths import ROOT
from simulated_gpu.build import SOURCES, find_functions
from simulated_gpu.definitions import aten, attend, attend_backward

WITHOUT_CUDA = torch.version.cuda is None


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_attention_and_its_gradients_equal_torchs(has_bias: bool, scale: float | None) -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 8, requires_grad=True)
    bias = torch.randn(1, 3, 7, 7, requires_grad=True) if has_bias else None
    expected = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    actual, sums = attend(q, k, v, bias, scale)
    assert torch.allclose(actual, expected, atol=1e-6)
    scores = q @ k.transpose(-1, -2) * (8**-0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    assert torch.allclose(torch.exp(scores - sums[..., None]).sum(-1), torch.ones(2, 3, 7))
    gradient = torch.randn_like(expected)
    inputs = [x for x in (q, k, v, bias) if x is not None]
    found = attend_backward(gradient, q, k, v, bias, scale)
    for mine, its in zip(found, torch.autograd.grad(expected, inputs, gradient), strict=True):
        assert torch.allclose(mine, its, atol=1e-5)


def test_operations_with_definitions_take_torchs_arguments() -> None:
    """Else a version of torch with other arguments would be computed wrongly, in silence."""
    schemas: dict[Any, str] = {
        aten._scaled_dot_product_flash_attention: "query key value dropout_p is_causal "
        "return_debug_mask scale",
        aten._scaled_dot_product_efficient_attention: "query key value attn_bias "
        "compute_log_sumexp dropout_p is_causal scale",
        aten._scaled_dot_product_cudnn_attention: "query key value attn_bias compute_log_sumexp "
        "dropout_p is_causal return_debug_mask scale",
        aten._addmm_activation: "self mat1 mat2 beta alpha use_gelu",
        aten._scaled_mm: "self mat2 scale_a scale_b bias scale_result out_dtype use_fast_accum",
    }
    for operation, names in schemas.items():
        assert [a.name for a in operation.default._schema.arguments] == names.split()


def test_every_function_of_a_source_is_found() -> None:
    for path in SOURCES.glob("*.cpp"):
        text = path.read_text()
        assert len(find_functions(text)) == text.count("\nEXPORT ") + text.count("\nPRODUCT("), path


@pytest.mark.skipif(not WITHOUT_CUDA, reason="this torch is built for CUDA")
def test_torch_without_cuda_is_one_line() -> None:
    command = [sys.executable, "-m", "simulated_gpu", "true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("a simulated GPU needs torch's build for CUDA 13")
    assert len(done.stderr.splitlines()) == 1
