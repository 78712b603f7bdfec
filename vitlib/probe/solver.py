"""Solver of regularised logistic regression, for many penalties on the same features.

The objective is scikit-learn's: the sum of the losses, and the squared weights over 2C; biases are
free. Features of a ViT have a few directions of large variance, where L-BFGS takes hundreds of
steps. So features are centred and rotated to their principal axes, which changes neither objective
nor penalty. There the curvature at the start is diagonal, and each axis is scaled by it: some ten
steps reach the minimum, whatever the penalty.

Shapes: N photos, D features, A axes, K logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.metrics import import_sklearn_metrics
from vitlib.system.torch_state import isolate_torch_settings, num_threads

Array = npt.NDArray[Any]
MAX_ITER = 1000
SMALL = 2**21  # multiplications of a product that one thread computes


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let numpy and scipy compute on one thread in a block.

    OpenBLAS and torch have threads of their own, which spin after each product and so take the
    cores from each other: between torch's products, a fit takes three times as long.
    """
    libraries = [(library, library.num_threads) for library in _find_openblas()]
    for library, _ in libraries:
        library.set_num_threads(1)
    try:
        yield
    finally:
        for library, count in libraries:
            library.set_num_threads(count)


@contextmanager
def choose_threads(multiplications: int) -> Iterator[None]:
    """Fit in a block with the threads that pay: torch's, or one where products are small.

    Args:
        multiplications: Those of one product of the features and the weights.
    """
    with one_blas_thread(), num_threads(1 if multiplications < SMALL else None):
        yield


@functools.cache
def _find_openblas() -> tuple[Any, ...]:
    """Find the OpenBLAS of numpy and of scipy, but not the one that torch itself may use."""
    try:
        import scipy.optimize  # noqa: F401  # loads its library, which is then found
        from threadpoolctl import ThreadpoolController  # which scikit-learn brings
    except ImportError:  # neighbours and linear heads need neither
        return ()
    return tuple(
        library
        for library in ThreadpoolController().lib_controllers
        if library.internal_api == "openblas" and "torch" not in library.filepath
    )


class Solution(NamedTuple):
    """Weights and biases of logits, float64.

    Attributes:
        weight: (K, D).
        bias: (K,).
    """

    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]


class Solver:
    """Fits logits to one set of features and labels.

    Args:
        features: (N, D).
        labels: (N,) class numbers 0..K-1 of a softmax, every one of which occurs; or (N, K) of 1,
            0 and NaN (unknown) for K sigmoids.
        num_logits: K.
        dtype: torch.float64, or torch.float32 for a solution good to four digits in half the time.
    """

    def __init__(
        self, features: Array, labels: Array, num_logits: int, dtype: torch.dtype = torch.float64
    ) -> None:
        x = torch.from_numpy(np.ascontiguousarray(features)).to(dtype)
        self.mean = x.mean(dim=0)
        self.rotated, self.axes, self.variance = _rotate(x - self.mean)
        self.num_logits, self.dtype = num_logits, dtype
        self.is_softmax = labels.ndim == 1
        self.labels = torch.from_numpy(np.asarray(labels))
        if not self.is_softmax:
            self.labelled = ~torch.isnan(self.labels)
            self.labels = self.labels.nan_to_num().to(dtype)
        self._start: tuple[Tensor, Tensor] | None = None

    @isolate_torch_settings()
    def solve(self, c: float, *, search: bool = False) -> Solution:
        """Minimise the objective.

        Args:
            c: Inverse strength of the penalty, above 0.
            search: True starts from the last solution and stops where labels change no more; False
                starts from zero and stops at the minimum.

        Returns:
            The weights and biases.

        Raises:
            ConfigError: scikit-learn is not installed.
        """
        import_sklearn_metrics()  # says which extra is missing; scikit-learn brings scipy
        from scipy.optimize import minimize

        count, k = len(self.rotated), self.num_logits
        share = 1 / k if self.is_softmax else 0.5
        curvature = share * (1 - share)  # of a logit's loss, where all scores are equal
        scale = (curvature * self.variance + 1 / c).rsqrt()
        bias_scale = 1 / math.sqrt(curvature * count)
        weight = torch.zeros(k, len(scale), dtype=self.dtype)
        bias = torch.zeros(k, dtype=self.dtype)
        if search and self._start is not None:
            weight, bias = self._start

        def objective(flat: Array) -> tuple[float, Array]:
            values = torch.from_numpy(flat).to(self.dtype)
            w = values[:-k].reshape(k, -1) * scale
            loss, grad, grad_bias = self._loss(w, values[-k:] * bias_scale, c)
            grads = torch.cat([(grad * scale).flatten(), grad_bias * bias_scale])
            return loss / count, (grads.double() / count).numpy()

        is_exact = not search and self.dtype == torch.float64
        # scipy computes its steps in float64, whatever the products are computed in.
        start = torch.cat([(weight / scale).flatten(), bias / bias_scale]).double().numpy()
        options: dict[str, Any] = {
            "maxiter": MAX_ITER, "maxls": 50,
            "gtol": 1e-8 if is_exact else 1e-5, "ftol": 1e-13 if is_exact else 1e-7,
        }  # fmt: skip
        # The mean and not the sum of the losses: the tolerances then fit any number of photos.
        with choose_threads(self.rotated.numel() * k):
            result = minimize(objective, start, method="L-BFGS-B", jac=True, options=options)
        values = torch.from_numpy(result.x).to(self.dtype)
        weight, bias = values[:-k].reshape(k, -1) * scale, values[-k:] * bias_scale
        self._start = weight, bias
        weight = weight @ self.axes.T
        return Solution(
            weight.double().numpy(), (bias.double() - weight.double() @ self.mean.double()).numpy()
        )

    def _loss(self, weight: Tensor, bias: Tensor, c: float) -> tuple[float, Tensor, Tensor]:
        """Compute objective and gradients of weights (K, A) and biases (K,)."""
        logits = torch.addmm(bias, self.rotated, weight.T)
        if self.is_softmax:
            # One buffer is log-softmax, softmax and then the gradient: (N, K) may be large.
            scores = logits.log_softmax(dim=1)
            picked = self.labels[:, None]
            loss = -scores.gather(1, picked).sum()
            error = scores.exp_()
            error.scatter_add_(1, picked, -torch.ones_like(picked, dtype=self.dtype))
        else:
            loss = ((F.softplus(logits) - self.labels * logits) * self.labelled).sum()
            error = (logits.sigmoid() - self.labels) * self.labelled
        total = loss + weight.square().sum() / (2 * c)
        return float(total), error.T @ self.rotated + weight / c, error.sum(dim=0)


def _rotate(centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate features to their principal axes.

    Returns the features (N, A), the axes as columns (D, A), and the sum of squares on each (A,).
    """
    if len(centred) >= centred.shape[1]:
        # In float64: the axes of a float32 matrix of products are not orthogonal enough.
        values, axes = torch.linalg.eigh((centred.T @ centred).double())
        axes = axes.to(centred.dtype)
        return centred @ axes, axes, values.clamp(min=0).to(centred.dtype)
    # An orthonormal basis of the photos, turned to their axes: cheaper than singular vectors.
    basis, coordinates = torch.linalg.qr(centred.T)
    values, turn = torch.linalg.eigh((coordinates @ coordinates.T).double())
    turn = turn.to(centred.dtype)
    return coordinates.T @ turn, basis @ turn, values.clamp(min=0).to(centred.dtype)
