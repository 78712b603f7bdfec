"""The sides of compare.py, each a model behind the same few orders, in a process of its own.

    python benchmarks/peers.py TASK      a side: orders on stdin, answers on stdout (turns.py)
    python benchmarks/peers.py probe     the versions of what is installed here, or why it is not

A task says side, precision, folder or file of the weights, pixels (.npy, float32) and threads.
Each side is set as its own documentation sets it for one stream of requests on a CPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from prepare import spare_torchvision, transformers_model
from turns import serve

PACKAGES = ("torch", "transformers", "timm", "onnxruntime", "openvino", "nncf", "onnx")
M, K, N = 1576, 768, 3072  # the yardstick's GEMM: eight images in the MLP of ViT-B/16


class Side:
    """What compare.py orders. A side imports in __init__, before its memory is first read."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.images = np.load(task["pixels"])

    def load(self) -> float:
        """Everything up to a model that can run; seconds."""
        start = time.perf_counter()
        self.build()
        return time.perf_counter() - start

    def batch(self, size: int) -> None:
        """Take so many images from now on."""
        repeats = -(-size // len(self.images))
        self.given = self.ready(np.concatenate([self.images] * repeats)[:size].copy())
        gc.collect()

    def turn(self, seconds: float) -> list[float]:
        """One call after another for so long, at least one; the seconds of each.

        Where a call is short, the first is not counted: the caches still hold another side's.
        """
        start, taken = time.perf_counter(), []
        while not taken or time.perf_counter() - start < seconds:
            before = time.perf_counter()
            self.run()
            taken.append(time.perf_counter() - before)
        return taken[1:] if len(taken) > 2 else taken

    def answer(self) -> list[float]:
        """What it makes of the first image."""
        out = self.run()
        return np.asarray(out.float() if hasattr(out, "float") else out)[0].ravel().tolist()

    def build(self) -> None:
        raise NotImplementedError

    def ready(self, images: Any) -> Any:
        """Images as the model takes them; not in any timing."""
        return images

    def run(self) -> Any:
        raise NotImplementedError


class Torch(Side):
    """A side that is an nn.Module, called under inference_mode."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        import torch

        torch.set_num_threads(task["threads"])
        self.torch = torch
        bf16 = task["precision"] == "bf16" and not task.get("bf16_matmul")
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def ready(self, images: Any) -> Any:
        return self.torch.from_numpy(images).to(self.dtype)

    def run(self) -> Any:
        with self.torch.inference_mode():
            return self.call(self.given)

    def call(self, pixels: Any) -> Any:
        return self.model(pixels)  # type: ignore[attr-defined]


class Vitlib(Torch):
    """vitlib.optimize: float32 pixels in every precision, as it takes them."""

    def __init__(self, task: dict[str, Any]) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's
        super().__init__(task | {"precision": "fp32"})
        import vitlib

        self.vitlib, self.precision = vitlib, task["precision"]

    def build(self) -> None:
        options = {}
        if self.task.get("calibration"):
            pixels = np.load(self.task["calibration"])
            options["calibrate"] = self.torch.from_numpy(pixels)
        model = self.vitlib.load(self.task["folder"])
        self.model = self.vitlib.optimize(model, self.precision, **options)


class VitlibPlain(Vitlib):
    """vitlib as it is loaded, not optimized."""

    def build(self) -> None:
        self.model = self.vitlib.load(self.task["folder"])


class Transformers(Torch):
    """Eager, its default attention (SDPA). bf16_matmul: oneDNN multiplies float32 as bfloat16."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        spare_torchvision()
        import transformers

        # Its classes are imported on their first use: that belongs to the imports, not to a load.
        _ = transformers.ViTForImageClassification, transformers.Dinov2Model

    def build(self) -> None:
        if self.task.get("bf16_matmul"):
            self.torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        self.model, self.of = transformers_model(self.task["folder"], dtype=self.dtype)

    def call(self, pixels: Any) -> Any:
        return self.of(self.model(pixel_values=pixels))


class Timm(Torch):
    """Eager, fused attention where it takes it (its default)."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        spare_torchvision()
        self.timm = importlib.import_module("timm")

    def build(self) -> None:
        # As if it were its own published file: then timm also resizes the positions that it holds.
        model = self.timm.create_model(
            self.task["timm"],
            img_size=224,
            num_classes=self.task["num_classes"],
            pretrained=True,
            pretrained_cfg_overlay={"file": str(Path(self.task["folder"]) / "model.safetensors")},
        )
        self.model = model.eval().to(self.dtype)


class OnnxRuntime(Side):
    """The CPU provider, every graph optimisation, the batch fixed so that all shapes are known."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        self.runtime = importlib.import_module("onnxruntime")

    def build(self) -> None:
        self.fixed(len(self.images[:1]))

    def batch(self, size: int) -> None:
        super().batch(size)
        self.fixed(size)

    def fixed(self, size: int) -> None:
        """A session for this batch, unless it is the one there is."""
        if getattr(self, "size", None) == size:
            return
        self.session = None
        gc.collect()
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.task["threads"]
        options.graph_optimization_level = self.runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_free_dimension_override_by_name("batch", size)
        self.session = self.runtime.InferenceSession(
            self.task["file"], options, providers=["CPUExecutionProvider"]
        )
        self.size = size

    def run(self) -> Any:
        return self.session.run(None, {"pixels": self.given})[0]


class OpenVino(OnnxRuntime):
    """The CPU plugin under its latency hint: one stream over all threads; the batch fixed."""

    def __init__(self, task: dict[str, Any]) -> None:
        Side.__init__(self, task)
        self.ov = importlib.import_module("openvino")

    def fixed(self, size: int) -> None:
        if getattr(self, "size", None) == size:
            return
        self.compiled = None
        gc.collect()
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.task["threads"]}
        # For 8-bit models what is not in 8 bits stays at the plugin's choice, bf16 where it can.
        hint = {"fp32": "f32", "bf16": "bf16"}.get(self.task["precision"])
        options |= {"INFERENCE_PRECISION_HINT": hint} if hint else {}
        core = self.ov.Core()
        model = core.read_model(self.task["file"])
        model.reshape([size, *self.images.shape[1:]])
        self.compiled = core.compile_model(model, "CPU", options)
        self.size = size

    def run(self) -> Any:
        return self.compiled(self.given, share_inputs=True, share_outputs=True)[0]


class Gemm(Torch):
    """The best rate at which this machine multiplies M x K by K x N with torch's operations.

    Of the routes there are, plain and packed, the fastest is found by trying before the first turn.
    A turn is seconds of single products, as it is seconds of single calls for the others.
    """

    def build(self) -> None:
        routes = {}
        for name in ("packed_int8",) if self.task["precision"] == "int8" else ("plain", "packed"):
            try:
                routes[name] = getattr(self, name)()
                routes[name]()
            except (AttributeError, NotImplementedError, RuntimeError):
                continue  # not in this torch, or not on this CPU
        self.routes = routes or {"plain": self.plain()}

    def batch(self, size: int) -> None:  # noqa: ARG002
        def rate(name: str) -> float:
            self.given = self.routes[name]
            return float(np.median(self.turn(0.2)))

        self.given = self.routes[min(self.routes, key=rate)]

    def run(self) -> Any:
        with self.torch.inference_mode():
            return self.given()

    def answer(self) -> list[float]:
        return []

    def plain(self) -> Any:
        x, weight = self.operands()
        return lambda: self.torch.nn.functional.linear(x, weight)

    def packed(self) -> Any:
        x, weight = self.operands()
        held = self.torch.ops.mkldnn._reorder_linear_weight(weight, M)
        call = self.torch.ops.mkldnn._linear_pointwise
        return lambda: call(x, held, None, "none", [], "")

    def packed_int8(self) -> Any:
        """u8 by s8 to bfloat16: signed activations would get a reference kernel."""
        torch = self.torch
        x = torch.randint(0, 256, (M, K), dtype=torch.uint8)
        weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        held = torch.ops.onednn.qlinear_prepack(weight, None)
        scale, zero = torch.full((N,), 1e-3), torch.zeros(N, dtype=torch.int64)
        call = torch.ops.onednn.qlinear_pointwise
        given = (x, 0.01, 128, held, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], "")
        return lambda: call(*given)

    def operands(self) -> tuple[Any, Any]:
        """(M, K) and (N, K) of the precision."""
        return tuple(self.torch.randn(n, K).to(self.dtype) for n in (M, N))  # type: ignore[return-value]


SIDES = {
    "vitlib": Vitlib,
    "vitlib-plain": VitlibPlain,
    "transformers": Transformers,
    "timm": Timm,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "gemm": Gemm,
}


def probe() -> dict[str, str]:
    """Package -> its version, or "missing: " and why it cannot be imported."""
    found = {}
    for name in PACKAGES:
        try:
            if name == "transformers":
                spare_torchvision()
            found[name] = importlib.import_module(name).__version__.split("-")[0]
        except Exception as error:  # a broken installation fails as it likes
            found[name] = f"missing: {str(error).splitlines()[0]}"
    return found


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        print(json.dumps(probe()))
    else:
        serve(lambda task: SIDES[task["side"]](task))
