"""What would run: the table's path for each precision on this CPU, and which parts it serves.

Nothing is built and nothing is timed: the table is asked as optimize() asks it, the private
operations are tried as it tries them, and of a model only the structure is read, so that one on the
meta device does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.encoder import Block
from vitlib.errors import VitlibError
from vitlib.fast import onednn_graph, onednn_ops
from vitlib.fast.attention import is_large, plain
from vitlib.fast.cpu import PRECISIONS, Machine, Precision, Route, this_machine
from vitlib.fast.fast_vit import PASS_TOKENS
from vitlib.fast.optimization import cpu_route
from vitlib.fast.swap import as_they_are, rebuilt
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition
from vitlib.vit import ViT

AGREES = "found, agrees with the plain operation"
DIFFERS = "found, but fails here or does not agree with the plain operation: not used"
ABSENT = "not in this torch"
PLAIN_LINEAR = "torch.nn.functional.linear"


@dataclass(frozen=True)
class Served:
    """What serves one precision on this CPU; with `error` set, nothing does."""

    precision: Precision
    arithmetic: str = ""  # of the large linears: fp32, bf16 or int8
    linears: str = ""  # the operation
    attention: str = ""
    attention_dtype: str = ""
    why: str = ""
    error: str = ""  # what optimize() would raise


@dataclass(frozen=True)
class OfModel:
    """How far a model's parts are stock, and so made fast."""

    blocks: int  # of its own `depth` that are replaced whole
    depth: int
    patch_embed: bool
    positions: bool  # rotary or relative ones: remembered for each grid
    linears: int  # single ones, in the attention pool and in blocks that are not stock
    as_they_are: tuple[str, ...]  # the paths of the parts that run as the user made them


@dataclass(frozen=True)
class FastReport:
    """The answer of what_runs(); `as_dict` is what `vitlib info --fast --json` prints."""

    machine: Machine
    torch: str  # version
    threads: int  # that torch uses
    cuda: str  # the device's name, or "no CUDA device"
    operations: dict[str, str]  # those that torch does not promise -> whether they serve
    precisions: tuple[Served, ...]
    model: OfModel | None  # None where none was given

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        found = asdict(self)
        found["machine"]["features"] = self.machine.features
        found["precisions"] = {one.pop("precision"): one for one in found["precisions"]}
        if self.model is not None:
            found["model"]["as_they_are"] = list(self.model.as_they_are)
        return found


def what_runs(model: ViT | None = None) -> FastReport:
    """What optimize() does on this machine, and to which parts of `model`, which is only read.

    A model may be on the meta device: its weights are not looked at.
    """
    return FastReport(
        machine=this_machine(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cuda=_cuda(),
        operations=_operations(),
        precisions=tuple(served(precision, model) for precision in PRECISIONS),
        model=None if model is None else _of_model(model),
    )


def served(precision: Precision, model: ViT | None = None) -> Served:
    """The path of a precision on this CPU; with a model, at its own image size."""
    try:
        way = cpu_route(precision)
    except VitlibError as error:
        return Served(precision, error=str(error))
    attention, dtype = _attention(way, model)
    return Served(
        precision,
        arithmetic=way.arithmetic,
        linears=_linears(way),
        attention=attention,
        attention_dtype=_named(dtype),
        why=way.why,
    )


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _linears(way: Route) -> str:
    """The operation, as linears.make() chooses it."""
    dtype = torch.float32 if way.arithmetic == "fp32" else way.attention_dtype
    packed = way.packed and onednn_ops.has_packed_linear(dtype)
    name = "mkldnn._linear_pointwise, weights packed once" if packed else PLAIN_LINEAR
    if way.arithmetic == "int8":
        left = f"those left out: {name}, {_named(dtype)}"
        return f"onednn.qlinear_pointwise, u8 by s8 ({left})"
    return f"{name}, {_named(dtype)}"


def _attention(way: Route, model: ViT | None) -> tuple[str, torch.dtype]:
    """What gathers, as attention.py chooses it, and in which dtype."""
    dtype = way.attention_dtype
    if model is not None and way.attention != "fused" and _too_many(model, dtype):
        return "torch's fused kernel: so many scores are not held at once", dtype
    if way.attention == "graph":
        if graph_agrees(dtype):
            return "oneDNN Graph", dtype
        other = "torch's fused kernel" if dtype == torch.float32 else "two batched products"
        return f"{other}, as oneDNN Graph has none here", dtype
    return "two batched products" if way.attention == "plain" else "torch's fused kernel", dtype


def _too_many(model: ViT, dtype: torch.dtype) -> bool:
    """Whether a pass at the model's own image size is beyond the ways that hold all scores."""
    cfg = model.config
    tokens = cfg.num_prefix_tokens + cfg.grid_size[0] * cfg.grid_size[1]
    shape = max(1, PASS_TOKENS // tokens), cfg.num_heads, tokens, cfg.head_dim
    of_tokens = torch.empty(shape, dtype=dtype, device="meta")
    return is_large(of_tokens, of_tokens)


def _operations() -> dict[str, str]:
    """The operations that private.py and graph.py try, and how each trial ended."""
    linear = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    int8 = hasattr(torch.ops.onednn, "qlinear_pointwise")
    compiled = hasattr(torch._C, "_jit_set_llga_enabled")
    told = {}
    for dtype in (torch.float32, torch.bfloat16):
        agrees = onednn_ops.has_packed_linear(dtype)
        told[f"mkldnn._linear_pointwise {_named(dtype)}"] = _verdict(linear, agrees)
    told["onednn.qlinear_pointwise"] = _verdict(int8, onednn_ops.has_int8_linear())
    for dtype in (torch.float32, torch.bfloat16):
        told[f"oneDNN Graph attention {_named(dtype)}"] = _verdict(compiled, graph_agrees(dtype))
    return told


def _verdict(found: bool, agrees: bool) -> str:
    return AGREES if agrees else DIFFERS if found else ABSENT


def graph_agrees(dtype: torch.dtype) -> bool:
    """Whether oneDNN Graph takes attention in this dtype, and equals the plain products."""
    heads, tokens, width = 2, 9, 16
    count = 3 * heads * tokens * width
    numbers = torch.sin(torch.arange(count, dtype=torch.float32, device="cpu") * 0.7).to(dtype)
    # Laid out as a block's are, of which the compiled kernel takes note.
    q, k, v = numbers.view(1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    with torch.no_grad():
        kernel = onednn_graph.kernel(q, k, v, None)
        return kernel is not None and _near(kernel(q, k, v), plain(q, k, v, None))


def _near(a: Tensor, b: Tensor) -> bool:
    bound = 2e-6 if a.dtype == torch.float32 else 2e-2  # bfloat16: a rounding or two
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= bound * b.abs().max())


def _of_model(model: ViT) -> OfModel:
    """Count what optimize() would replace, without making any of it."""
    own = tuple(as_they_are(model))
    counts = {"blocks": 0, "patch_embed": 0, "positions": 0, "linears": 0}

    def look(path: str, module: nn.Module) -> nn.Module | None:
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
        return module  # in its own place: nothing is copied, and nothing within is looked at

    # Beside parts of the user's own, whose dtype is the model's, only float32 is made fast.
    if not own or next(model.parameters()).dtype == torch.float32:
        rebuilt(model, look)
    return OfModel(
        counts["blocks"],
        model.config.depth,
        counts["patch_embed"] > 0,
        counts["positions"] > 0,
        counts["linears"],
        own,
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
