"""The map that POST /attend computes: a method of vitlib.explain, and for some a class.

Methods that take many forwards an image are not here (occlusion), nor those that give more than
one number a patch (heads, pca): `vitlib attend` has these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vitlib import explain
from vitlib.errors import ConfigError
from vitlib.explain.attribution import check_best
from vitlib.explain.maps import Array
from vitlib.serve.errors import bad_request
from vitlib.vit import ViT

METHODS = ("rollout", "relevance", "gradient", "similarity", "mask")
CLASS_METHODS = ("relevance", "gradient")  # of a class, by gradients
GRADIENT_SAMPLES = 4  # noisy copies of an image, each a forward and a backward


@dataclass(frozen=True)
class Explanation:
    """A method, and the class that it explains.

    Attributes:
        method: One of METHODS.
        target: The class; None is the best one of each image.
    """

    method: str = "rollout"
    target: int | None = None

    @classmethod
    def parse(
        cls, model: ViT, labels: Sequence[str], method: str | None, class_name: str | None
    ) -> Explanation:
        """Parse the parameters of a URL.

        Args:
            model: The model.
            labels: Its labels.
            method: The name of a method; None is "rollout", or "relevance" where a class is given.
            class_name: The label or the number of a class; None is the best one.

        Returns:
            The explanation.

        Raises:
            RequestError: The method or the class does not exist, they do not fit together, or the
                model has no classes.
        """
        if method is None:
            method = "rollout" if class_name is None else "relevance"
        if method not in METHODS:
            raise bad_request(f"method={method[:40]!r}: expected one of {', '.join(METHODS)}")
        if method not in CLASS_METHODS:
            if class_name is not None:
                raise bad_request(
                    f"class is for {' and '.join(CLASS_METHODS)}: leave it out for {method}"
                )
            return cls(method)
        if not model.num_classes:
            raise bad_request(f"method={method}: this model has no classes: expected rollout")
        try:
            if class_name is None:
                check_best(model)
                return cls(method)
            return cls(method, explain.class_named(labels, class_name[:200]))
        except ConfigError as error:
            hint = "target= or --class"  # the names that the library and the command line have
            raise bad_request(str(error).replace(hint, "class=")) from None

    def compute(self, model: ViT, pixels: Tensor) -> Array:
        """Compute the map of each image.

        Args:
            model: The model.
            pixels: (B, C, H, W), on the model's device.

        Returns:
            (B, h, w) float32, each map scaled to 0..1.
        """
        maps = self._compute_raw(model, pixels)
        low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
        scaled: Array = ((maps - low) / np.maximum(high - low, 1e-12)).astype(np.float32)
        return scaled

    def _compute_raw(self, model: ViT, pixels: Tensor) -> Array:
        """Compute the maps in the method's own units, (B, h, w)."""
        if self.method == "relevance":
            return explain.relevance(model, pixels, self.target)
        if self.method == "gradient":
            slopes = explain.gradient(model, pixels, self.target, samples=GRADIENT_SAMPLES)
            return _average_patches(model, pixels, slopes)
        if self.method == "similarity":
            return explain.similarity(model, pixels)
        if self.method == "mask":
            return explain.foreground(model, pixels).astype(np.float32)
        return explain.attention_rollout(model, pixels)


def _average_patches(model: ViT, pixels: Tensor, values: Array) -> Array:
    """Average the values of pixels (B, H, W) over each patch, (B, h, w)."""
    (h, w), (p, q) = model.patch_grid(pixels), model.config.patch_size
    blocks = values[:, : h * p, : w * q].reshape(-1, h, p, w, q)
    mean: Array = blocks.mean(axis=(2, 4))
    return mean
