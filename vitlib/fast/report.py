"""Report what optimize() would run on this CPU, and which modules of a model it would replace.

Nothing is built and nothing is timed. The table of kernels is asked as optimize() asks it, and
torch's private operations are checked as it checks them. Of a model only the structure is read, so
that a model on the meta device serves.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.encoder import Block
from vitlib.errors import VitlibError
from vitlib.fast import onednn_graph, onednn_ops
from vitlib.fast.attention import bmm_attention, is_large
from vitlib.fast.cpu import (
    PRECISIONS,
    KernelPlan,
    Machine,
    Precision,
    this_machine,
    tokens_at_a_time,
)
from vitlib.fast.module_swap import swap_stock_modules, unoptimized_modules
from vitlib.fast.optimization import cpu_plan
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition
from vitlib.vit import ViT

AGREES = "found, agrees with the plain operation"
DIFFERS = "found, but fails here or does not agree with the plain operation: not used"
ABSENT = "not in this torch"
TORCH_LINEAR = "torch.nn.functional.linear"


@dataclass(frozen=True)
class PrecisionSupport:
    """The kernels of one precision on this CPU.

    Attributes:
        precision: The precision.
        arithmetic: Precision of the large linear layers: "fp32", "bf16" or "int8".
        linears: The operation of the linear layers.
        attention: The operation of the attention.
        attention_dtype: Dtype of queries, keys and values.
        reason: Why these kernels.
        error: What optimize() would raise; then the other fields are empty.
    """

    precision: Precision
    arithmetic: str = ""
    linears: str = ""
    attention: str = ""
    attention_dtype: str = ""
    reason: str = ""
    error: str = ""


@dataclass(frozen=True)
class ModelCoverage:
    """The modules of a model that optimize() would replace.

    Attributes:
        blocks: How many of its blocks are replaced.
        depth: How many blocks it has.
        patch_embed: The patch embedding is replaced.
        positions: Rotary or relative positions are cached for each grid.
        linears: Single linear layers, in the attention pool and in blocks that are not stock.
        unoptimized_modules: Paths of the modules that run as the user made them.
    """

    blocks: int
    depth: int
    patch_embed: bool
    positions: bool
    linears: int
    unoptimized_modules: tuple[str, ...]


@dataclass(frozen=True)
class FastReport:
    """The result of fast_report().

    Attributes:
        machine: This CPU.
        torch: The version of torch.
        threads: The number of threads that torch uses.
        cuda: The name of the GPU, or "no CUDA device".
        operations: Private operations of torch, and whether they are used.
        precisions: The kernels of each precision.
        model: The modules that are replaced; None where no model was given.
    """

    machine: Machine
    torch: str
    threads: int
    cuda: str
    operations: dict[str, str]
    precisions: tuple[PrecisionSupport, ...]
    model: ModelCoverage | None

    def as_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON has, as `vitlib info --fast --json` prints it."""
        fields = asdict(self)
        fields["machine"]["features"] = self.machine.features
        fields["precisions"] = {row.pop("precision"): row for row in fields["precisions"]}
        if self.model is not None:
            fields["model"]["unoptimized_modules"] = list(self.model.unoptimized_modules)
        return fields


def fast_report(model: ViT | None = None) -> FastReport:
    """Report what optimize() does on this machine.

    Args:
        model: A model to report on, which is only read; it may be on the meta device.

    Returns:
        The report.
    """
    return FastReport(
        machine=this_machine(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cuda=_cuda(),
        operations=_operations(),
        precisions=tuple(precision_support(precision, model) for precision in PRECISIONS),
        model=None if model is None else _model_coverage(model),
    )


def precision_support(precision: Precision, model: ViT | None = None) -> PrecisionSupport:
    """Report the kernels of a precision on this CPU.

    Args:
        precision: The precision.
        model: A model, whose image size may be too large for an attention kernel.

    Returns:
        The kernels, or the error of optimize().
    """
    try:
        plan = cpu_plan(precision)
    except VitlibError as error:
        return PrecisionSupport(precision, error=str(error))
    attention, dtype = _attention(plan, model)
    return PrecisionSupport(
        precision,
        arithmetic=plan.arithmetic,
        linears=_linears(plan),
        attention=attention,
        attention_dtype=_dtype_name(dtype),
        reason=plan.reason,
    )


def _cuda() -> str:
    """Describe the GPU."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _linears(plan: KernelPlan) -> str:
    """Name the operation that make_linear() chooses."""
    dtype = torch.float32 if plan.arithmetic == "fp32" else plan.attention_dtype
    packed = plan.packed and onednn_ops.has_packed_linear(dtype)
    name = "mkldnn._linear_pointwise, weights packed once" if packed else TORCH_LINEAR
    if plan.arithmetic == "int8":
        rest = f"those left out: {name}, {_dtype_name(dtype)}"
        return f"onednn.qlinear_pointwise, u8 by s8 ({rest})"
    return f"{name}, {_dtype_name(dtype)}"


def _attention(plan: KernelPlan, model: ViT | None) -> tuple[str, torch.dtype]:
    """Name the attention kernel that attention.py chooses, and its dtype."""
    dtype = plan.attention_dtype
    if model is not None and plan.attention != "fused" and _has_large_scores(model, dtype):
        return "torch's fused kernel: so many scores are not held at once", dtype
    if plan.attention == "graph":
        if graph_agrees(dtype):
            return "oneDNN Graph", dtype
        other = "torch's fused kernel" if dtype == torch.float32 else "two batched products"
        return f"{other}, as oneDNN Graph has none here", dtype
    return "two batched products" if plan.attention == "bmm" else "torch's fused kernel", dtype


def _has_large_scores(model: ViT, dtype: torch.dtype) -> bool:
    """Return True if a micro-batch of the model's own image size has too many scores."""
    cfg = model.config
    tokens = cfg.num_prefix_tokens + cfg.grid_size[0] * cfg.grid_size[1]
    shape = (
        max(1, tokens_at_a_time(torch.get_num_threads()) // tokens),
        cfg.num_heads,
        tokens,
        cfg.head_dim,
    )
    queries = torch.empty(shape, dtype=dtype, device="meta")
    return is_large(queries, queries)


def _operations() -> dict[str, str]:
    """Check the private operations that onednn_ops.py and onednn_graph.py use."""
    linear = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    int8 = hasattr(torch.ops.onednn, "qlinear_pointwise")
    graph = hasattr(torch._C, "_jit_set_llga_enabled")
    verdicts = {}
    for dtype in (torch.float32, torch.bfloat16):
        agrees = onednn_ops.has_packed_linear(dtype)
        name = f"mkldnn._linear_pointwise {_dtype_name(dtype)}"
        verdicts[name] = _verdict(linear, agrees)
    verdicts["onednn.qlinear_pointwise"] = _verdict(int8, onednn_ops.has_int8_linear())
    for dtype in (torch.float32, torch.bfloat16):
        name = f"oneDNN Graph attention {_dtype_name(dtype)}"
        verdicts[name] = _verdict(graph, graph_agrees(dtype))
    return verdicts


def _verdict(is_present: bool, agrees: bool) -> str:
    """Word the result of a check."""
    return AGREES if agrees else DIFFERS if is_present else ABSENT


def graph_agrees(dtype: torch.dtype) -> bool:
    """Return True if oneDNN Graph's attention equals the separate products.

    Args:
        dtype: Of queries, keys and values.

    Returns:
        False also where this torch has no such kernel.
    """
    heads, tokens, width = 2, 9, 16
    count = 3 * heads * tokens * width
    numbers = torch.sin(torch.arange(count, dtype=torch.float32, device="cpu") * 0.7).to(dtype)
    # The strides of a block's queries, keys and values, as a compiled kernel is made for strides.
    q, k, v = numbers.view(1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    with torch.no_grad():
        kernel = onednn_graph.attention_kernel(q, k, v, None)
        return kernel is not None and _is_near(kernel(q, k, v), bmm_attention(q, k, v, None))


def _is_near(a: Tensor, b: Tensor) -> bool:
    """Return True if two results of one dtype are equal to its rounding."""
    bound = 2e-6 if a.dtype == torch.float32 else 2e-2  # bfloat16: a rounding or two
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= bound * b.abs().max())


def _model_coverage(model: ViT) -> ModelCoverage:
    """Count the modules that optimize() would replace, without making any."""
    unoptimized = tuple(unoptimized_modules(model))
    counts = {"blocks": 0, "patch_embed": 0, "positions": 0, "linears": 0}

    def count(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, Block):
            kind = "blocks"
        elif isinstance(module, PatchEmbed):
            kind = "patch_embed"
        elif isinstance(module, AttentionPosition):
            kind = "positions"
        elif isinstance(module, nn.Linear) and path.split(".")[0] in ("blocks", "attn_pool"):
            kind = "linears"
        else:
            return None
        counts[kind] += 1
        return module  # replaced by itself: nothing is copied, and nothing within is counted

    # Beside modules of the user's own, which expect the model's dtype, only float32 is optimized.
    if not unoptimized or next(model.parameters()).dtype == torch.float32:
        swap_stock_modules(model, count)
    return ModelCoverage(
        counts["blocks"],
        model.config.depth,
        counts["patch_embed"] > 0,
        counts["positions"] > 0,
        counts["linears"],
        unoptimized,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")
