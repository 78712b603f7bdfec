"""Choose the kernels of this CPU, from a table of measurements.

docs/performance.md holds the measurements. Nothing is timed at start, so that one machine always
takes the same kernels and gives the same bits.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Precision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8", "fp8")
Arithmetic = Literal["fp32", "bf16", "fp16", "int8"]
# torch's fused kernel; two batched products around a softmax; oneDNN Graph's: see attention.py.
AttentionKernel = Literal["fused", "bmm", "graph"]


@dataclass(frozen=True)
class Machine:
    """A CPU, by the properties that decide which kernels are fast.

    Attributes:
        architecture: As platform.machine() gives it: x86_64, aarch64.
        vendor: "intel", "amd", "arm" (on any system but macOS), "apple", or "" where it is unknown.
        model: The model's name, for people.
        avx512: It has AVX-512, and torch's own kernels may use it.
        avx512_bf16: It has the bfloat16 products of AVX-512.
        avx512_vnni: It has the 8-bit products of AVX-512 (VNNI).
        amx: It has AMX's tiles for bfloat16.
        arm_bf16: It has Arm's bfloat16 products (FEAT_BF16).
    """

    architecture: str
    vendor: str
    model: str
    avx512: bool = False
    avx512_bf16: bool = False
    avx512_vnni: bool = False
    amx: bool = False
    arm_bf16: bool = False

    @property
    def features(self) -> str:
        """The instruction sets that count here, for people."""
        names = ("avx512", "avx512_bf16", "avx512_vnni", "amx", "arm_bf16")
        return ", ".join(name for name in names if getattr(self, name)) or "none of AVX-512's"


class KernelPlan(NamedTuple):
    """The kernels that compute one precision on one machine.

    Attributes:
        arithmetic: Precision of the large linear layers.
        packed: Weights are packed once for oneDNN's kernels; otherwise torch's own linear serves.
        attention: The attention kernel.
        attention_dtype: Dtype of queries, keys and values.
        reason: Why these kernels, for people.
    """

    arithmetic: Arithmetic
    packed: bool
    attention: AttentionKernel
    attention_dtype: torch.dtype
    reason: str


class PlanRow(NamedTuple):
    """A row of the table; the first row that a machine satisfies gives its plan.

    Attributes:
        needs: Fields of Machine that must be true, or the name of a vendor.
        plan: The kernels.
    """

    needs: tuple[str, ...]
    plan: KernelPlan


_F32, _BF16 = torch.float32, torch.bfloat16
_ANY = PlanRow(
    (),
    KernelPlan(
        "fp32", False, "fused", _F32, "not measured on this CPU: torch's own float32 kernels"
    ),
)

# Measured on AMD Zen 4 and Zen 5 and on Intel Sapphire Rapids with and without AMX, 2 cores each,
# torch 2.13: GFLOP/s at 1576 x 768 x 3072, and attention in ms an image of ViT-B/16. The rows of
# Arm and Apple are not measured; they follow from torch's source and its issues.
PLANS: dict[Precision, tuple[PlanRow, ...]] = {
    "fp32": (
        PlanRow(
            ("avx512", "amd"),
            KernelPlan("fp32", True, "graph", _F32, "packed oneDNN: 490 against MKL's 200 on Zen "
                       "5, 215 against 157 on Zen 4; attention by oneDNN Graph: 10 against 14"),
        ),
        PlanRow(
            ("avx512",),
            KernelPlan("fp32", True, "fused", _F32, "packed oneDNN: 320 against MKL's 315 on "
                       "Intel, 330 against 260 at batch 1"),
        ),
        PlanRow(
            ("arm",),
            KernelPlan("fp32", True, "fused", _F32, "not measured on Arm: weights packed for the "
                       "Arm Compute Library, which reorders them at every call otherwise "
                       "(pytorch#139387)"),
        ),
        PlanRow(
            ("apple",),
            KernelPlan("fp32", False, "fused", _F32, "not measured on Apple: torch's own float32, "
                       "by Accelerate; torch for macOS has no oneDNN"),
        ),
        _ANY,
    ),
    "bf16": (
        PlanRow(
            ("amx",),
            KernelPlan("bf16", True, "fused", _BF16, "packed oneDNN on bfloat16 tiles; attention "
                       "fused"),
        ),
        PlanRow(
            ("avx512_bf16", "amd"),
            KernelPlan("bf16", True, "graph", _BF16, "packed oneDNN: 950 against 490 in float32 on "
                       "Zen 5, 390 against 215 on Zen 4; attention by oneDNN Graph: 7 against 15 "
                       "fused"),
        ),
        PlanRow(
            ("avx512_bf16", "intel"),
            KernelPlan("fp32", True, "fused", _F32, "float32 serves bf16: without AMX this CPU's "
                       "bfloat16 instructions run at half its float32 rate (170 against 320)"),
        ),
        PlanRow(
            ("avx512",),
            KernelPlan("fp32", True, "fused", _F32, "float32 serves bf16: this CPU has no bfloat16 "
                       "instructions"),
        ),
        PlanRow(
            ("arm_bf16", "arm"),
            KernelPlan("bf16", False, "fused", _BF16, "not measured on Arm: torch's own bfloat16, "
                       "by the Arm Compute Library; packed weights would go to kernels over a "
                       "hundred times slower (pytorch#180447)"),
        ),
        PlanRow((), _ANY.plan._replace(reason="float32 serves bf16: bfloat16 is not measured on "
                                       "this CPU")),
    ),
    "int8": (
        PlanRow(
            ("amx",),
            KernelPlan("int8", True, "fused", _BF16, "8-bit tiles: 2500 against 1500 in bfloat16; "
                       "attention in bfloat16, fused"),
        ),
        PlanRow(
            ("avx512_vnni", "avx512_bf16", "amd"),
            KernelPlan("int8", True, "graph", _BF16, "VNNI: 1800 against 490 in float32 on Zen 5, "
                       "720 against 215 on Zen 4; attention in bfloat16 by oneDNN Graph"),
        ),
        PlanRow(
            ("avx512_vnni",),
            KernelPlan("int8", True, "fused", _F32, "VNNI: 1300 against 320 in float32; attention "
                       "in float32"),
        ),
    ),
}  # fmt: skip


# Tokens of a micro-batch: enough for the linear layers to run at their full rate, while the
# activations between them stay in the caches. Measured with 1 and 2 threads; each further thread
# brings a core with caches of its own. At the largest number the scores of ViT-B/16 still fit what
# the attention kernels hold in memory (MAX_SCORES in attention.py).
MIN_TOKENS, TOKENS_PER_THREAD, MAX_TOKENS = 1600, 800, 12_800


def tokens_at_a_time(threads: int) -> int:
    """Return the number of tokens in a micro-batch.

    Args:
        threads: Threads that compute it.
    """
    return min(max(MIN_TOKENS, TOKENS_PER_THREAD * threads), MAX_TOKENS)


def kernel_plan(precision: Precision, machine: Machine | None = None) -> KernelPlan | None:
    """Look up the kernels of a precision on a CPU.

    Args:
        precision: The precision that the user wants.
        machine: The CPU; None is this one.

    Returns:
        The plan, or None where the CPU cannot compute that precision.
    """
    machine = machine or this_machine()
    for row in PLANS.get(precision, ()):
        if all(need == machine.vendor or getattr(machine, need, False) for need in row.needs):
            return row.plan
    return None


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """Return this CPU, which is read once a process."""
    info = _cpuinfo()
    vendor = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(info.get("vendor_id", ""), "")
    if not vendor:  # Windows and macOS name it within a sentence
        processor = platform.processor().lower()
        vendor = next((name for name in ("intel", "amd") if name in processor), "")
    avx512 = _capability().startswith("AVX512")
    architecture = platform.machine().lower()
    if architecture in ("aarch64", "arm64"):
        vendor = "apple" if platform.system() == "Darwin" else "arm"
    return Machine(
        architecture=architecture,
        vendor=vendor,
        model=info.get("model name") or platform.processor() or "unknown",
        avx512=avx512,
        avx512_bf16=avx512 and _has("avx512_bf16", info),
        avx512_vnni=avx512 and _has("avx512_vnni", info),
        amx=avx512 and _has("amx_bf16", info),
        arm_bf16=vendor == "arm" and "bf16" in info.get("Features", "").split(),
    )


def _capability() -> str:
    """Return the instruction set of torch's own kernels; ATEN_CPU_CAPABILITY lowers it."""
    return torch.backends.cpu.get_cpu_capability()


# torch's function for each flag of Linux. The names begin with an underscore, and come and go
# between versions of torch.
_TORCH_CHECKS = {
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512_vnni": "_is_vnni_supported",
    "amx_bf16": "_is_amx_tile_supported",
}


def _has(flag: str, info: dict[str, str]) -> bool:
    """Return True if the CPU has a flag, by /proc/cpuinfo or by torch."""
    if "flags" in info:
        return flag in info["flags"].split()
    check = getattr(torch.cpu, _TORCH_CHECKS[flag], None)
    return bool(check and check())


def _cpuinfo() -> dict[str, str]:
    """Read the first processor of /proc/cpuinfo; empty on systems without that file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", first, re.MULTILINE))
