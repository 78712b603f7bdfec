"""Workers of compare.py: each side is a model behind one interface, in its own process.

    python benchmarks/peers.py TASK      run a worker: requests on stdin, replies on stdout
    (turns.py)
    python benchmarks/peers.py probe     print the installed versions, or why an import fails

A task has the keys side, precision, folder or file (the weights), pixels (.npy, float32) and
threads. Each side is set up as its documentation says for one stream of requests on a CPU.
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
from prepare import skip_torchvision_ops, transformers_model
from turns import serve

PACKAGES = ("torch", "transformers", "timm", "onnxruntime", "openvino", "nncf", "onnx")
M, K, N = 1576, 768, 3072  # shape of the reference GEMM: eight images in the MLP of ViT-B/16


class Side:
    """A model that compare.py measures.

    Libraries are imported in __init__, because the memory is first read after it.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.images = np.load(task["pixels"])

    def load(self) -> float:
        """Build a model that can run; return the seconds."""
        start = time.perf_counter()
        self.build()
        return time.perf_counter() - start

    def set_batch_size(self, size: int) -> None:
        """Set the number of images in a call."""
        repeats = -(-size // len(self.images))
        self.inputs = self.prepare_inputs(np.concatenate([self.images] * repeats)[:size].copy())
        gc.collect()

    def time_calls(self, seconds: float) -> list[float]:
        """Call the model for some seconds, at least once; return the seconds of each call.

        The first of several short calls is dropped, because the caches still hold another side's
        data.
        """
        start, call_seconds = time.perf_counter(), []
        while not call_seconds or time.perf_counter() - start < seconds:
            call_start = time.perf_counter()
            self.run()
            call_seconds.append(time.perf_counter() - call_start)
        return call_seconds[1:] if len(call_seconds) > 2 else call_seconds

    def first_output(self) -> list[float]:
        """Return the output for the first image, flattened."""
        output = self.run()
        return (
            np.asarray(output.float() if hasattr(output, "float") else output)[0].ravel().tolist()
        )

    def build(self) -> None:
        raise NotImplementedError

    def prepare_inputs(self, images: Any) -> Any:
        """Convert images to the model's input; this is never timed."""
        return images

    def run(self) -> Any:
        raise NotImplementedError


class Torch(Side):
    """An nn.Module, called in inference mode."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        import torch

        torch.set_num_threads(task["threads"])
        self.torch = torch
        bf16 = task["precision"] == "bf16" and not task.get("bf16_matmul")
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def prepare_inputs(self, images: Any) -> Any:
        return self.torch.from_numpy(images).to(self.dtype)

    def run(self) -> Any:
        with self.torch.inference_mode():
            return self.call(self.inputs)

    def call(self, pixels: Any) -> Any:
        return self.model(pixels)  # type: ignore[attr-defined]


class Vitlib(Torch):
    """A model optimized by vitlib. It takes float32 pixels in every precision."""

    def __init__(self, task: dict[str, Any]) -> None:
        # Import vitlib from this checkout.
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        super().__init__(task | {"precision": "fp32"})
        import vitlib

        self.vitlib, self.precision = vitlib, task["precision"]

    def build(self) -> None:
        options: dict[str, Any] = {"compile": bool(self.task.get("compiles"))}
        if self.task.get("calibration"):
            pixels = np.load(self.task["calibration"])
            options["calibrate"] = self.torch.from_numpy(pixels)
        model = self.vitlib.load(self.task["folder"])
        self.model = self.vitlib.optimize(model, self.precision, **options)


class UnoptimizedVitlib(Vitlib):
    """A model as vitlib loads it."""

    def build(self) -> None:
        self.model = self.vitlib.load(self.task["folder"])


class Transformers(Torch):
    """The eager model with SDPA, transformers' default attention.

    With bf16_matmul in the task, oneDNN multiplies float32 matrices in bfloat16.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        skip_torchvision_ops()
        import transformers

        # transformers imports a class on its first use; keep that import out of the load time.
        _ = transformers.ViTForImageClassification, transformers.Dinov2Model

    def build(self) -> None:
        if self.task.get("bf16_matmul"):
            self.torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        self.model, self.extract_output = transformers_model(self.task["folder"], dtype=self.dtype)

    def call(self, pixels: Any) -> Any:
        return self.extract_output(self.model(pixel_values=pixels))


class Timm(Torch):
    """The eager model with fused attention, timm's default."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        skip_torchvision_ops()
        self.timm = importlib.import_module("timm")

    def build(self) -> None:
        # Load the file like a pretrained one, so that timm resizes its position embeddings.
        model = self.timm.create_model(
            self.task["timm"],
            img_size=224,
            num_classes=self.task["num_classes"],
            pretrained=True,
            pretrained_cfg_overlay={"file": str(Path(self.task["folder"]) / "model.safetensors")},
        )
        self.model = model.eval().to(self.dtype)


class OnnxRuntime(Side):
    """The CPU provider with all graph optimizations and a fixed batch size."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        self.runtime = importlib.import_module("onnxruntime")

    def build(self) -> None:
        self.open_session(len(self.images[:1]))

    def set_batch_size(self, size: int) -> None:
        super().set_batch_size(size)
        self.open_session(size)

    def open_session(self, size: int) -> None:
        """Open a session for a batch size, unless it is the current one."""
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
        return self.session.run(None, {"pixels": self.inputs})[0]


class OpenVino(OnnxRuntime):
    """The CPU plugin with its latency hint: one stream on all threads, a fixed batch size."""

    def __init__(self, task: dict[str, Any]) -> None:
        Side.__init__(self, task)
        self.ov = importlib.import_module("openvino")

    def open_session(self, size: int) -> None:
        if getattr(self, "size", None) == size:
            return
        self.compiled = None
        gc.collect()
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.task["threads"]}
        # In an 8-bit model the plugin chooses the precision of the other operations.
        hint = {"fp32": "f32", "bf16": "bf16"}.get(self.task["precision"])
        options |= {"INFERENCE_PRECISION_HINT": hint} if hint else {}
        core = self.ov.Core()
        model = core.read_model(self.task["file"])
        model.reshape([size, *self.images.shape[1:]])
        self.compiled = core.compile_model(model, "CPU", options)
        self.size = size

    def run(self) -> Any:
        return self.compiled(self.inputs, share_inputs=True, share_outputs=True)[0]


class Gemm(Torch):
    """The fastest product of M x K and K x N that torch has on this machine.

    set_batch_size() tries the regular and the packed product and selects the faster one. A call is
    one
    product, so that its times compare with those of single calls of a model.
    """

    def build(self) -> None:
        products = {}
        for name in (
            ("packed_int8_linear",)
            if self.task["precision"] == "int8"
            else ("linear", "packed_linear")
        ):
            try:
                products[name] = getattr(self, name)()
                products[name]()
            except (AttributeError, NotImplementedError, RuntimeError):
                continue  # this torch or this CPU does not have it
        self.products = products or {"linear": self.linear()}

    def set_batch_size(self, size: int) -> None:  # noqa: ARG002
        def median_seconds(name: str) -> float:
            self.inputs = self.products[name]
            return float(np.median(self.time_calls(0.2)))

        self.inputs = self.products[min(self.products, key=median_seconds)]

    def run(self) -> Any:
        with self.torch.inference_mode():
            return self.inputs()

    def first_output(self) -> list[float]:
        return []

    def linear(self) -> Any:
        x, weight = self.operands()
        return lambda: self.torch.nn.functional.linear(x, weight)

    def packed_linear(self) -> Any:
        x, weight = self.operands()
        packed_weight = self.torch.ops.mkldnn._reorder_linear_weight(weight, M)
        linear = self.torch.ops.mkldnn._linear_pointwise
        return lambda: linear(x, packed_weight, None, "none", [], "")

    def packed_int8_linear(self) -> Any:
        """Return a product of uint8 by int8 with a bfloat16 result.

        For signed activations oneDNN has only a reference kernel.
        """
        torch = self.torch
        x = torch.randint(0, 256, (M, K), dtype=torch.uint8)
        weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        packed_weight = torch.ops.onednn.qlinear_prepack(weight, None)
        scale, zero_point = torch.full((N,), 1e-3), torch.zeros(N, dtype=torch.int64)
        linear = torch.ops.onednn.qlinear_pointwise
        arguments = (
            x,
            0.01,
            128,
            packed_weight,
            scale,
            zero_point,
            None,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        )
        return lambda: linear(*arguments)

    def operands(self) -> tuple[Any, Any]:
        """Return random matrices (M, K) and (N, K) in the precision's dtype."""
        return tuple(self.torch.randn(n, K).to(self.dtype) for n in (M, N))  # type: ignore[return-value]


SIDES = {
    "vitlib": Vitlib,
    "vitlib-unoptimized": UnoptimizedVitlib,
    "transformers": Transformers,
    "timm": Timm,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "gemm": Gemm,
}


def probe() -> dict[str, str]:
    """Map each package to its version, or to "missing: " and the error of its import."""
    versions = {}
    for name in PACKAGES:
        try:
            if name == "transformers":
                skip_torchvision_ops()
            versions[name] = importlib.import_module(name).__version__.split("-")[0]
        except Exception as error:  # a broken installation can raise any error
            versions[name] = f"missing: {str(error).splitlines()[0]}"
    return versions


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        print(json.dumps(probe()))
    else:
        serve(lambda task: SIDES[task["side"]](task))
