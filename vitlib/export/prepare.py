"""Prepare a model for export: its graph, example input, metadata and reference.

How data flows: a checkpoint or a model in memory -> a float32 model with its preprocessing -> the
graph that a file computes (graph.py), and the reference that the file is compared with: the
methods of the model itself, on normalised pixels.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import vitlib
from vitlib.errors import ConfigError
from vitlib.export.dynamic_grid import MAX_PATCHES, resize_in_graph
from vitlib.export.graph import (
    ExportGraph,
    Output,
    bake_grid,
    check_outputs,
    check_stock,
    copy_for_export,
    find_center,
)
from vitlib.fast import FastViT
from vitlib.image.processor import ImageProcessor, uint8_affine
from vitlib.predict.exported_info import ExportInfo, describe_fields
from vitlib.predict.predictor import Predictor
from vitlib.system.hashing import hash_tensors
from vitlib.vit import ViT

Input = Literal["uint8", "float"]
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class ExportSettings:
    """Choices of an export.

    Attributes:
        outputs: Names of the outputs; empty: logits, or the embedding of a model without a head.
        input: "uint8" levels, or "float" for normalised pixels; None: levels where the
            preprocessing resizes 8-bit images.
        image_size: Pixels of the input, one side or (height, width); None: the preprocessing's.
        dynamic_size: Height and width of the input may vary.
        precision: Arithmetic of the file.
        opset: Version of ONNX's operators.
    """

    outputs: tuple[str, ...] = ()
    input: Input | None = None
    image_size: tuple[int, int] | None = None
    dynamic_size: bool = False
    precision: Precision = "fp32"
    opset: int = 20


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready to be written.

    Attributes:
        model: The model in float32, in eval mode.
        processor: Preprocessing of the file's input.
        graph: What the file computes.
        info: Facts about the file.
        settings: The caller's choices.
        image_size: Pixels (height, width) of the example input.
    """

    model: ViT
    processor: ImageProcessor
    graph: ExportGraph
    info: ExportInfo
    settings: ExportSettings
    image_size: tuple[int, int]

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Names of the outputs, in order."""
        return self.graph.outputs

    def example(self) -> Tensor:
        """Return an input of two images: torch takes a size of 1 for a constant.

        Where the size may vary, it is not the learned one, and its sides differ: torch takes equal
        sizes for the same one.
        """
        shape = (2, self.model.config.in_channels, *self._example_size())
        return torch.zeros(shape, dtype=torch.uint8 if self.graph.takes_uint8 else torch.float32)

    def _example_size(self) -> tuple[int, int]:
        """Return the pixels (height, width) of the example input."""
        if not self.settings.dynamic_size:
            return self.image_size
        (p, q), (h, w) = self.model.config.patch_size, self.model.config.grid_size
        return (h + 2) * p, (w + 2 + (p * (h + 2) == q * (w + 2))) * q

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Return the sizes of the input that may vary, for torch.export: from two patches a side.

        Torch's exporter takes a side of one patch for a constant.
        """
        sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
        if self.settings.dynamic_size:
            names = zip(("height", "width"), self.model.config.patch_size, strict=True)
            height, width = (
                torch.export.Dim(name, min=2 * step, max=MAX_PATCHES * step) for name, step in names
            )
            sizes |= {2: height, 3: width}
        return (sizes,)

    @torch.inference_mode()
    def compute_reference(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the outputs by the methods of the model.

        Args:
            images: Normalised pixels, (B, C, H, W) float32.

        Returns:
            Outputs by name.
        """
        methods: dict[str, Callable[[Tensor], Tensor]] = {
            "logits": self.model,
            "embedding": self.model.embed,
            "tokens": self.model.forward_features,
            "attention": partial(_attend, self.model),
        }
        return {name: methods[name](images) for name in self.outputs}


def _attend(model: ViT, images: Tensor) -> Tensor:
    """Return the attention of the class token in the last block, (B, num_heads, T)."""
    return model.attention(images, [-1], rows="prefix")[0][:, :, 0]


def open_model(
    source: ViT | Predictor | str | os.PathLike[str],
    image_processor: ImageProcessor | None = None,
    **reading: Any,
) -> tuple[ViT, ImageProcessor, str]:
    """Return a model with its preprocessing, loaded where the caller names a checkpoint.

    Args:
        source: A model, a Predictor, a hub id, a folder or a weights file.
        image_processor: The preprocessing; None is the model's own.
        **reading: Options of Predictor.load for a checkpoint.

    Returns:
        The model on the CPU, its preprocessing, and the checkpoint's name; "" in memory.

    Raises:
        VitlibError: As Predictor.load.
        ConfigError: The model is an optimized one.
    """
    if isinstance(source, str | os.PathLike):
        source = Predictor.load(
            source, image_processor=image_processor, device="cpu", calibrated=False, **reading
        )
    predictor = source if isinstance(source, Predictor) else Predictor(source, image_processor)
    model = predictor.model
    if not isinstance(model, ViT):
        kind = "optimized for one machine" if isinstance(model, FastViT) else "an exported file"
        raise ConfigError(f"this model is {kind}: export the checkpoint that it was made from")
    if model.device.type != "cpu":
        raise ConfigError(f"this model is on {model.device}: move it to the CPU, model.to('cpu')")
    return model, image_processor or predictor.image_processor, predictor.source


def prepare(
    model: ViT, processor: ImageProcessor, settings: ExportSettings, source: str = ""
) -> PreparedModel:
    """Prepare a model for export.

    Args:
        model: The model, which is only read.
        processor: Its preprocessing.
        settings: The caller's choices.
        source: The checkpoint's name, for the metadata.

    Returns:
        The prepared model.

    Raises:
        ConfigError: The model has parts of the caller's own, or a choice does not suit it.
    """
    check_stock(model)
    cfg, outputs = model.config, check_outputs(model, settings.outputs)
    if settings.precision not in PRECISIONS:
        raise ConfigError(
            f"precision={settings.precision!r}: expected one of {', '.join(PRECISIONS)}"
        )
    size = _choose_size(cfg.patch_size, processor, settings)
    if settings.image_size is not None:
        processor = processor.with_image_size(size, cfg.patch_size)
    affine = uint8_affine(processor)
    if settings.input == "uint8" and affine is None:
        raise ConfigError(
            "this preprocessing resizes floats (DINOv3's), so that there are no 8-bit levels to "
            "take: expected input='float' (--input float)"
        )
    takes_uint8 = affine is not None and settings.input != "float"
    grid = size[0] // cfg.patch_size[0], size[1] // cfg.patch_size[1]
    if settings.dynamic_size and not all(2 <= side <= MAX_PATCHES for side in grid):
        raise ConfigError(
            f"images of {size[0]}x{size[1]} have {grid[0]}x{grid[1]} patches: a file for any size "
            f"takes 2 to {MAX_PATCHES} a side: export one size (image_size=, --image-size)"
        )
    convert = resize_in_graph if settings.dynamic_size else partial(bake_grid, grid=grid)
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    folded = affine if takes_uint8 else None
    center = None if folded is None else find_center(folded)
    graph = ExportGraph(copy_for_export(exact, folded, convert), outputs, center)
    info = ExportInfo(
        version=vitlib.__version__, source=source, weights_sha256=hash_tensors(model.state_dict()),
        family=cfg.family, precision=settings.precision,
        input="uint8" if takes_uint8 else "float32",
        image_size=None if settings.dynamic_size else size, patch_size=cfg.patch_size,
        in_channels=cfg.in_channels, num_prefix_tokens=model.num_prefix_tokens,
        num_features=model.num_features, num_classes=model.num_classes, outputs=outputs,
        labels=cfg.labels, problem_type=cfg.problem_type,
        image_processor=describe_fields(processor),
    )  # fmt: skip
    return PreparedModel(exact, processor, graph, info, settings, size)


def _choose_size(
    patch_size: tuple[int, int], processor: ImageProcessor, settings: ExportSettings
) -> tuple[int, int]:
    """Return the pixels (height, width) of the example input; raise ConfigError if none fit."""
    size = settings.image_size or processor.crop_size or processor.size
    if size is None:
        raise ConfigError(
            "the preprocessing gives images of any size: state one with image_size= (--image-size)"
        )
    p, q = patch_size
    if settings.image_size is not None and (size[0] % p or size[1] % q):
        fit = tuple(
            max(round(side / step), 1) * step for side, step in zip(size, (p, q), strict=True)
        )
        raise ConfigError(
            f"image_size {size[0]}x{size[1]} is not whole patches of {p}x{q}: expected a size such "
            f"as {fit[0]}x{fit[1]}"
        )
    return size


def list_sizes(prepared: PreparedModel) -> Sequence[tuple[int, int]]:
    """List the sizes at which a file is checked: its own, and two more where it takes any.

    One of these is taller and narrower than the file's own size, the other shorter and wider.

    Args:
        prepared: The prepared model.

    Returns:
        Pixels (height, width).
    """
    if not prepared.settings.dynamic_size:
        return [prepared.image_size]
    p, q = prepared.model.config.patch_size
    h, w = (side // step for side, step in zip(prepared.image_size, (p, q), strict=True))
    taller = min(h + 2, MAX_PATCHES), max(w - 3, 2)
    wider = max(h // 2, 2), min(w + 3, MAX_PATCHES)
    return [prepared.image_size, *((rows * p, columns * q) for rows, columns in (taller, wider))]
