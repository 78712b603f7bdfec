"""FastViT: a ViT for inference only, with the same call, the same shapes and the same numbers.

How data flows: optimize() puts fast parts where the model's stock parts stood (parts.py), and the
model's own forward runs on them. A large batch goes through in passes that stay in the caches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.errors import ConfigError, ImageError
from vitlib.fast.cpu import Precision
from vitlib.fast.write_folder import write
from vitlib.image.processor import ImageProcessor
from vitlib.system.torch_state import strict_float32
from vitlib.vit import ViT

# Tokens in one pass: the linears are at their full rate, and what lies between them is small.
PASS_TOKENS = 1600


class FastViT(nn.Module):
    """What optimize() gives. It holds no gradients and does not train."""

    def __init__(
        self,
        trunk: ViT,
        on_levels: ViT | None,
        precision: Precision,
        dtype: torch.dtype,
        batch_size: int | None = None,
        as_they_are: tuple[str, ...] = (),
    ) -> None:
        """trunk: the model with fast parts; on_levels: the same, its patch projection for levels.

        dtype: of what it gives; batch_size: images a pass; as_they_are: what is the user's own.
        """
        super().__init__()
        self.trunk, self.on_levels = trunk, on_levels
        self.config: ViTConfig = trunk.config
        self.precision, self.dtype = precision, dtype
        self.batch_size, self.as_they_are = batch_size, as_they_are
        # float32, but where parts of the user's own made the model stay as it is.
        self.takes = next((p.dtype for p in trunk.parameters()), torch.float32)
        super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised pixels -> what the model's forward gives, (B, num_classes)."""
        return self._run(self.trunk, "forward", images)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised pixels -> what the model's gives, every token (B, T, D)."""
        return self._run(self.trunk, "forward_features", images)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """The tokens of forward_features (B, T, D) -> what forward gives, (B, num_classes)."""
        self._refuse_gradients(tokens)
        with torch.no_grad(), strict_float32():
            return self.trunk.forward_head(tokens.to(self.takes)).to(self.dtype)

    def forward_pooler(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised pixels -> what the model's gives, (B, pooler_dim)."""
        return self._run(self.trunk, "forward_pooler", images)

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised pixels -> what the model's embed gives, (B, num_features)."""
        return self._run(self.trunk, "embed", images)

    def forward_levels(self, levels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 levels, not normalised -> what forward gives, (B, num_classes).

        Raises ConfigError where the model came without a rule that normalises levels.
        """
        return self._run(self._of_levels(levels), "forward", levels)

    def embed_levels(self, levels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 levels, not normalised -> what embed gives, (B, num_features)."""
        return self._run(self._of_levels(levels), "embed", levels)

    def save(
        self, folder: str | os.PathLike[str], *, image_processor: ImageProcessor | None = None
    ) -> None:
        """Write one file that vitlib.fast.load opens: weights as they are held, config, labels and
        preprocessing (image_processor; None: its own); int8 takes a quarter of float32's size.

        Raises ConfigError where parts of it are not vitlib's own, SourceError where the folder
        cannot be written.
        """
        if self.as_they_are:
            raise ConfigError(
                f"{', '.join(self.as_they_are[:3])}: not vitlib's own, so no file can say what it "
                "does: write the weights of the model it was made from with "
                "torch.save(model.state_dict(), ...)"
            )
        dtype = str(self.dtype).removeprefix("torch.")
        write(
            self.trunk,
            folder,
            image_processor or self.image_processor,
            {"precision": self.precision, "dtype": dtype, "batch_size": self.batch_size},
        )

    def upload(self, images: Tensor) -> Tensor:
        """Begin to copy images (B, C, H, W) that no one writes to any more to where it runs.

        Where that is a CPU, and for images in memory that is not pinned, they are left where they
        are.
        """
        return images

    def _of_levels(self, levels: Tensor) -> ViT:
        if levels.dtype != torch.uint8:
            raise ImageError(f"levels are {levels.dtype}: expected uint8, as images hold them")
        if self.on_levels is None:
            raise ConfigError(
                "this model has no preprocessing that normalises levels, or a patch_embed of its "
                "own: give normalised pixels to forward(), or set image_processor before optimize()"
            )
        return self.on_levels

    def _run(self, trunk: ViT, method: str, images: Tensor) -> Tensor:
        """(B, C, H, W) through a method of a trunk -> (B, ...), in passes that fit the caches."""
        self._refuse_gradients(images)
        through = trunk if method == "forward" else getattr(trunk, method)  # a hook sees a call
        with torch.no_grad(), strict_float32(), naming_memory(images):
            # Anything else is PatchEmbed's to refuse.
            fits = images.is_floating_point() or trunk is self.on_levels
            passes, dtype = self._passes(images), self.takes if fits else images.dtype
            if passes == 1:
                return through(images.to(dtype)).to(self.dtype)  # type: ignore[no-any-return]
            if passes == 0:  # no images: the shapes of what one would give
                one = images.new_zeros(1, *images.shape[1:]).to(dtype)
                return through(one)[:0].to(self.dtype)  # type: ignore[no-any-return]
            parts = images.tensor_split(passes)
            return torch.cat([through(part.to(dtype)) for part in parts]).to(self.dtype)

    def _refuse_gradients(self, given: Tensor) -> None:
        if given.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "an optimized model has no gradients: use the model it was made from, or detach() "
                "what is given to it"
            )

    def _passes(self, images: Tensor) -> int:
        """How many passes a batch is cut into; one where the user's own parts would see the cut."""
        if self.as_they_are or images.dim() != 4:
            return 1
        (p, q), (height, width) = self.config.patch_size, images.shape[2:]
        tokens = (height // p) * (width // q) + self.config.num_prefix_tokens
        size = self.batch_size or max(1, PASS_TOKENS // max(tokens, 1))
        return -(-len(images) // size)

    def train(self, mode: bool = True) -> FastViT:
        """eval() is what it is; train() raises ConfigError."""
        if mode:
            raise ConfigError(
                "an optimized model is for inference only: train the model it was made from, then "
                "optimize it again"
            )
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:  # noqa: ARG002
        """Refuse to(), half(), cpu() and the like: they would move a part of what it holds."""
        raise ConfigError(
            "an optimized model stays where it is and as it is: move or cast the model it was "
            "made from, then optimize it again"
        )

    @property
    def image_processor(self) -> ImageProcessor | None:
        """The preprocessing that came with the model."""
        processor = self.trunk.image_processor
        return processor if isinstance(processor, ImageProcessor) else None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(t.device for t in (*self.trunk.parameters(), *self.trunk.buffers()))

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens: the patches start after them."""
        return self.config.num_prefix_tokens

    @property
    def embed_dim(self) -> int:
        """D, the width of a token."""
        return self.config.embed_dim

    @property
    def num_features(self) -> int:
        """Width of the vector that the head reads."""
        return self.config.num_features

    @property
    def num_classes(self) -> int:
        """Width of the logits; 0 where there is no head."""
        return self.config.num_classes


@contextmanager
def naming_memory(images: Tensor) -> Iterator[None]:
    """Turn the allocator's words into what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        too_large(images, error)
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "allocate memory" not in str(error):
            raise
        too_large(images, error)


def too_large(images: Tensor, error: Exception) -> NoReturn:
    """Raise ImageError for a batch that memory cannot hold."""
    count, *shape = images.shape
    size = "x".join(map(str, shape))
    raise ImageError(
        f"{count} images of {size} do not fit in memory: give fewer at a time, or a smaller "
        "batch_size= to optimize()"
    ) from error
