"""What this machine can do, and the table that says which path serves it.

The table is made from measurements (docs/performance.md); nothing is timed at start, so that one
machine always takes one path and gives the same bits.
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
Attention = Literal["fused", "plain", "graph"]


@dataclass(frozen=True)
class Machine:
    """A CPU, as far as the table asks."""

    architecture: str  # x86_64, aarch64, as platform.machine() says
    vendor: str  # intel, amd, or "" where nothing says it
    model: str  # for people
    avx512: bool = False
    avx512_bf16: bool = False
    avx512_vnni: bool = False
    amx: bool = False  # bfloat16 tiles

    @property
    def features(self) -> str:
        """The instructions that count here, for people."""
        names = ("avx512", "avx512_bf16", "avx512_vnni", "amx")
        return ", ".join(name for name in names if getattr(self, name)) or "none of AVX-512's"


class Route(NamedTuple):
    """Which path serves a precision on a CPU."""

    arithmetic: Arithmetic  # of the large linears
    packed: bool  # weights packed once for oneDNN's own kernels; else torch's plain linear
    attention: Attention
    attention_dtype: torch.dtype
    why: str


class Row(NamedTuple):
    """A line of the table: it serves the first machine that has all of `needs`."""

    needs: tuple[str, ...]  # fields of Machine that are true, or a vendor's name
    route: Route


_F32, _BF16 = torch.float32, torch.bfloat16
_ANY = Row(
    (), Route("fp32", False, "fused", _F32, "not measured on this CPU: torch's own float32 kernels")
)

# Measured on AMD Zen 4 and Zen 5 and on Intel Sapphire Rapids without AMX, 2 cores each, torch
# 2.13: GFLOP/s at 1576 x 768 x 3072, and attention in ms an image of ViT-B/16.
TABLE: dict[Precision, tuple[Row, ...]] = {
    "fp32": (
        Row(
            ("avx512", "amd"),
            Route("fp32", True, "graph", _F32, "packed oneDNN: 490 against MKL's 200 on Zen 5, 215 "
                  "against 157 on Zen 4; attention by oneDNN Graph: 10 against 14"),
        ),
        Row(
            ("avx512",),
            Route("fp32", True, "fused", _F32, "packed oneDNN: 320 against MKL's 315 on Intel, 330 "
                  "against 260 at batch 1"),
        ),
        _ANY,
    ),
    "bf16": (
        Row(
            ("amx",),
            Route("bf16", True, "fused", _BF16, "packed oneDNN on bfloat16 tiles; attention fused"),
        ),
        Row(
            ("avx512_bf16", "amd"),
            Route("bf16", True, "graph", _BF16, "packed oneDNN: 950 against 490 in float32 on Zen "
                  "5, 390 against 215 on Zen 4; attention by oneDNN Graph: 7 against 15 fused"),
        ),
        Row(
            ("avx512_bf16", "intel"),
            Route("fp32", True, "fused", _F32, "float32 serves bf16: without AMX this CPU's "
                  "bfloat16 instructions run at half its float32 rate (170 against 320)"),
        ),
        Row(
            ("avx512",),
            Route("fp32", True, "fused", _F32, "float32 serves bf16: this CPU has no bfloat16 "
                  "instructions"),
        ),
        Row((), _ANY.route._replace(why="float32 serves bf16: bfloat16 is not measured on this "
                                    "CPU")),
    ),
    "int8": (
        Row(
            ("avx512_vnni", "avx512_bf16", "amd"),
            Route("int8", True, "graph", _BF16, "VNNI: 1800 against 490 in float32 on Zen 5, 720 "
                  "against 215 on Zen 4; attention in bfloat16 by oneDNN Graph"),
        ),
        Row(
            ("avx512_vnni",),
            Route("int8", True, "fused", _F32, "VNNI: 1300 against 320 in float32; attention in "
                  "float32"),
        ),
    ),
}  # fmt: skip


def route(precision: Precision, machine: Machine | None = None) -> Route | None:
    """The path of a precision on a CPU (default: this one); None where it cannot be served."""
    machine = machine or this_machine()
    for row in TABLE.get(precision, ()):
        if all(need == machine.vendor or getattr(machine, need, False) for need in row.needs):
            return row.route
    return None


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """This CPU, read once a process."""
    said = _cpuinfo()
    vendor = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(said.get("vendor_id", ""), "")
    if not vendor:  # Windows and macOS say it in a sentence
        words = platform.processor().lower()
        vendor = next((name for name in ("intel", "amd") if name in words), "")
    avx512 = _capability().startswith("AVX512")
    return Machine(
        architecture=platform.machine().lower(),
        vendor=vendor,
        model=said.get("model name") or platform.processor() or "unknown",
        avx512=avx512,
        avx512_bf16=avx512 and _has("avx512_bf16", said),
        avx512_vnni=avx512 and _has("avx512_vnni", said),
        amx=avx512 and _has("amx_bf16", said),
    )


def _capability() -> str:
    """The instructions that torch's own kernels use; ATEN_CPU_CAPABILITY lowers it."""
    return torch.backends.cpu.get_cpu_capability()


# torch's own question for each flag of Linux; their names begin with an underscore, and came and
# went between versions.
_ASKED = {
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512_vnni": "_is_vnni_supported",
    "amx_bf16": "_is_amx_tile_supported",
}


def _has(flag: str, said: dict[str, str]) -> bool:
    if "flags" in said:
        return flag in said["flags"].split()
    ask = getattr(torch.cpu, _ASKED[flag], None)
    return bool(ask and ask())


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", first, re.MULTILINE))
