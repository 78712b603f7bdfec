"""Compile the forward of an optimized model for a CPU, by torch's own compiler.

How data flows: a batch is split into micro-batches of 1, 2, 4 and so on images. The first one of
each size compiles a program for it. For that the trunk is copied with its weights as plain tensors,
since the compiler cannot trace packed ones, and traced whole. The weights become constants, which
are packed while compiling; each product is computed by oneDNN or by a kernel that the compiler
writes for its shape, whichever it measures as faster; what lies between two products becomes one
loop. The program is then compared with the model that is not compiled, in numbers and in time, and
serves where it agrees and is faster.

Compiled code is for a number of threads and a shape of pixels. Nothing of it is saved with a model:
torch keeps kernels in a folder of its own, TORCHINDUCTOR_CACHE_DIR.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable

import torch
from torch import Tensor

from vitlib.errors import ConfigError, count_noun, first_line
from vitlib.fast.inductor import (
    COMPILER_SETTINGS,
    BatchFunction,
    compiler_settings,
    trace_whole,
)
from vitlib.fast.model import FastViT, Method, bind
from vitlib.fast.traced import unpack_weights
from vitlib.system.memory import explain_out_of_memory
from vitlib.system.torch_state import isolate_torch_settings, strict_float32
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")

# Each program takes tens of seconds and a copy of the weights. Photos in shapes of their own would
# compile without end: further shapes run as without compiling.
MAX_PROGRAMS = 16
MAX_FAILURES = 2  # after which nothing more is compiled: most have a cause in the machine
TIMED_RUNS = 9  # of each side; the fastest counts
# Least share of the time that a program has to save, to be worth its memory.
MIN_GAIN = 0.02
# Root mean square difference from the model that is not compiled, over its root mean square.
# float32 sums differ in their order only. In 16 and 8 bits other roundings move a result by as much
# as those of the precision itself; a wrong kernel moves it by its whole size.
MAX_ERROR = {"fp32": 1e-5}
MAX_ERROR_16_BITS = 0.1
# The compiler's settings are the process's, and it times kernels: one program at a time.
_compile_lock = threading.RLock()


class CompiledViT(FastViT):
    """An optimized model on a CPU whose forward is compiled, for each size of micro-batch.

    Args:
        model: The optimized model. Its modules are shared, not copied.
    """

    def __init__(self, model: FastViT) -> None:
        super().__init__(
            model.trunk,
            model.uint8_trunk,
            model.precision,
            model.dtype,
            model.batch_size,
            model.unoptimized_modules,
        )
        self.programs = Programs(model.precision)

    def _run(self, trunk: ViT, method: Method, images: Tensor) -> Tensor:
        """Run a method of a trunk on images (B, C, H, W), in micro-batches that are compiled."""
        is_uint8 = images.dtype == torch.uint8
        pixels = (is_uint8 and trunk is self.uint8_trunk) or images.is_floating_point()
        if self.unoptimized_modules or images.dim() != 4 or not len(images) or not pixels:
            return super()._run(trunk, method, images)
        self.refuse_gradients(images)
        largest = self.batch_size or largest_power_of_two(self.images_at_a_time(images))
        largest_pixel = 255.0 if is_uint8 else 1.0
        with torch.no_grad(), strict_float32(), explain_out_of_memory(images):
            outputs, start = [], 0
            for size in split_batch(len(images), largest):
                part = images[start : start + size].to(self.input_dtype).contiguous()
                outputs.append(self.programs.run(trunk, method, part, largest_pixel))
                start += size
            return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(self.dtype)


def compile_model(model: FastViT) -> FastViT:
    """Have the forward of an optimized model compiled.

    Args:
        model: A model on a CPU.

    Returns:
        The model with compiled programs; with modules of the user's own, the model itself.

    Raises:
        ConfigError: The model is on another device.
    """
    if model.device.type != "cpu":
        raise ConfigError(
            f"compile=True is for CPUs and CUDA, and the model is on {model.device}: leave it out"
        )
    if model.unoptimized_modules:
        names = ", ".join(model.unoptimized_modules[:3])
        logger.warning("not compiled: the model has modules that are not vitlib's (%s)", names)
        return model
    return CompiledViT(model)


def largest_power_of_two(limit: int) -> int:
    """Return the largest power of two that is not above a number.

    Args:
        limit: From 1.
    """
    power: int = 1 << (limit.bit_length() - 1)
    return power


def split_batch(count: int, largest: int) -> list[int]:
    """Split a batch into micro-batches of few sizes, as each size is compiled.

    Args:
        count: Images in the batch.
        largest: Images in the largest micro-batch, from 1.

    Returns:
        The size of each micro-batch: `largest` as often as it fits, then powers of two.
    """
    full, rest = divmod(count, largest)
    powers = [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return [largest] * full + powers


class Programs:
    """The compiled programs of a model, by trunk, method, shape and number of threads.

    Args:
        precision: The model's.
    """

    def __init__(self, precision: str) -> None:
        self.precision = precision
        # None: the model as it is serves, as the program was slower, differed or was not compiled.
        self.functions: dict[Hashable, BatchFunction | None] = {}
        self.plain_trunks: dict[int, ViT] = {}
        self.num_failures = 0
        self.is_closed = False

    def __reduce__(self) -> tuple[type[Programs], tuple[str]]:
        """Copy or pickle without the programs: the copy compiles its own."""
        return Programs, (self.precision,)

    def close(self) -> None:
        """Compile no more programs. Those that there are stay."""
        self.is_closed = True

    def count(self) -> tuple[int, int]:
        """Count the programs.

        Returns:
            Those that are used, as they are faster, and all that were compiled or tried.
        """
        functions = list(self.functions.values())
        return sum(function is not None for function in functions), len(functions)

    def run(self, trunk: ViT, method: Method, pixels: Tensor, largest: float) -> Tensor:
        """Run a micro-batch, and compile its program where there is none yet.

        Args:
            trunk: The trunk.
            method: Its method, or a function of it.
            pixels: (B, C, H, W), contiguous, in the dtype that the trunk computes in.
            largest: The largest pixel: 1, or 255 for a trunk of pixels that are not normalised.

        Returns:
            What the method gives, (B, ...).
        """
        eager = bind(trunk, method)
        key = id(trunk), method, pixels.shape, torch.get_num_threads()
        if key not in self.functions and not self.is_closed:
            with _compile_lock:
                # Another thread may have compiled it meanwhile.
                if key not in self.functions and not self.is_closed:
                    sample = sample_like(pixels, largest)
                    exact = eager(sample)  # raises what is wrong with the caller's pixels
                    self.functions[key] = self._compile_or_decline(trunk, method, sample, exact)
        return (self.functions.get(key) or eager)(pixels)

    def _plain_function(self, trunk: ViT, method: Method) -> BatchFunction:
        """Return a method of the trunk's copy with plain weights."""
        if id(trunk) not in self.plain_trunks:
            self.plain_trunks[id(trunk)] = unpack_weights(trunk, self.precision)
        return bind(self.plain_trunks[id(trunk)], method)

    def _compile_or_decline(
        self, trunk: ViT, method: Method, sample: Tensor, exact: Tensor
    ) -> BatchFunction | None:
        """Compile a program; None where it fails, differs or is no faster."""
        name, start = program_name(sample), time.perf_counter()
        if len(self.functions) + 1 >= MAX_PROGRAMS:
            logger.warning("%s is the last program, of %d: no more shapes are compiled", name,
                           MAX_PROGRAMS)  # fmt: skip
            self.close()
        try:
            program = compile_program(self._plain_function(trunk, method), sample)
            max_error = MAX_ERROR.get(self.precision, MAX_ERROR_16_BITS)
            if not is_near(program(sample), exact, max_error):
                raise ArithmeticError("the compiled program differs from the model")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C++ compiler, or something that cannot be traced
            reason = f"{type(error).__name__}: {first_line(error)}"
            logger.warning("%s is not compiled, and slower: %s", name, reason)
            self.num_failures += 1
            if self.num_failures >= MAX_FAILURES:
                self.close()
            return None
        seconds = time.perf_counter() - start
        gain = measure_gain(program, bind(trunk, method), sample)
        logger.info("%s compiled in %.0f s: %.2fx as fast", name, seconds, gain)
        return program if gain > 1 + MIN_GAIN else None


def compile_program(function: BatchFunction, sample: Tensor) -> BatchFunction:
    """Compile a function for pixels like a sample.

    Args:
        function: A function of a trunk with plain weights.
        sample: Pixels (B, C, H, W).

    Returns:
        The same function. It checks nothing of what it was compiled for, as its caller does.
    """
    function(sample)  # computes what depends on the grid alone, which is not to be traced
    program = trace_whole(function)
    # The caller's default device would be that of the compiler's own tensors.
    with isolate_torch_settings(), compiler_settings(COMPILER_SETTINGS):
        program(sample)
    return program


def program_name(pixels: Tensor) -> str:
    """Describe a program for people, by the shape and the threads that it is for.

    Args:
        pixels: (B, C, H, W).
    """
    return f"{'x'.join(map(str, pixels.shape))} on {count_noun(torch.get_num_threads(), 'thread')}"


def sample_like(pixels: Tensor, largest: float) -> Tensor:
    """Return fixed pixels of a shape and dtype, on which a program is compared.

    The user's own may be all alike, or not finite.

    Args:
        pixels: (B, C, H, W).
        largest: The largest pixel: 1, or above for whole numbers from 0.

    Returns:
        The same shape, from -1 to 1, or from 0 to below `largest`.
    """
    count = pixels.numel()
    waves = torch.sin(torch.arange(count, dtype=torch.float32, device="cpu") * 0.7)
    values = ((waves + 1) * (largest / 2)).floor() if largest > 1 else waves
    return values.view(pixels.shape).to(pixels.dtype)


def is_near(actual: Tensor, exact: Tensor, bound: float) -> bool:
    """Return True if two results agree.

    Args:
        actual: Any shape.
        exact: The same shape.
        bound: The largest root mean square difference, over the root mean square of `exact`.
    """
    if actual.shape != exact.shape:
        return False
    error = torch.linalg.vector_norm(actual.double() - exact.double())
    return bool(error <= bound * torch.linalg.vector_norm(exact.double()))


def measure_gain(program: BatchFunction, eager: BatchFunction, sample: Tensor) -> float:
    """Time a program beside the function that it was compiled from.

    Args:
        program: The program.
        eager: The function.
        sample: Pixels (B, C, H, W) for both.

    Returns:
        The function's least time over the program's. They run in turn, and other load on the
        machine only adds to a time.
    """
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(TIMED_RUNS):
        for function, times in zip((eager, program), seconds, strict=True):
            start = time.perf_counter()
            function(sample)
            times.append(time.perf_counter() - start)
    before, after = map(min, seconds)
    return before / after
