"""FastViT: a ViT for inference only, with the same calls, the same shapes and the same numbers.

How data flows: optimize() puts fast modules where the model's stock modules stood, and the model's
own forward runs on them. A large batch is split into micro-batches that stay in the caches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.errors import ConfigError, ImageError
from vitlib.fast.cpu import Precision, tokens_at_a_time
from vitlib.image.processor import ImageProcessor
from vitlib.methods.research import ResearchMethods
from vitlib.system.memory import explain_out_of_memory
from vitlib.system.torch_state import strict_float32
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.parts.packed import Packed


class UnoptimizedMethodError(ConfigError, AttributeError):
    """The model that an optimized one was made from has a method, and the optimized one has not."""


# A method's name, or a function (trunk, pixels (B, C, H, W)) -> (B, ...) that works row by row.
# Functions are hashable, and equal where they compute the same.
Method = str | Callable[[ViT, Tensor], Tensor]


def bind(trunk: ViT, method: Method) -> Callable[[Tensor], Tensor]:
    """Return a method as a function of pixels.

    Args:
        trunk: The trunk.
        method: The method.
    """
    if not isinstance(method, str):
        return partial(method, trunk)
    # A user's hook is called by a call of the module alone, not by a call of its method.
    function: Callable[[Tensor], Tensor] = trunk if method == "forward" else getattr(trunk, method)
    return function


class FastViT(nn.Module):
    """The result of optimize(). It computes no gradients and does not train.

    Args:
        trunk: The model with fast modules.
        uint8_trunk: The same with a patch projection for uint8 pixels; None where there is none.
        precision: The precision that the user asked for.
        dtype: Dtype of the outputs.
        batch_size: Images of a micro-batch; None for as many as the caches hold.
        unoptimized_modules: Paths of the modules that run as the user made them.
    """

    def __init__(
        self,
        trunk: ViT,
        uint8_trunk: ViT | None,
        precision: Precision,
        dtype: torch.dtype,
        batch_size: int | None = None,
        unoptimized_modules: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.trunk, self.uint8_trunk = trunk, uint8_trunk
        self.config: ViTConfig = trunk.config
        self.precision, self.dtype = precision, dtype
        self.batch_size, self.unoptimized_modules = batch_size, unoptimized_modules
        # float32, unless modules of the user's own made optimize() leave the model as it is.
        self.input_dtype = next((p.dtype for p in trunk.parameters()), torch.float32)
        super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute what the model's forward does.

        Args:
            images: Normalised pixels (B, C, H, W).

        Returns:
            Logits (B, num_classes); without a head, what embed gives.

        Raises:
            ConfigError: Gradients are wanted.
            ImageError: The images do not fit the model, or memory.
        """
        return self._run(self.trunk, "forward", images)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute every token after the final norm, as the model does.

        Args:
            images: Normalised pixels (B, C, H, W).

        Returns:
            Tokens (B, T, D), prefix tokens first.
        """
        return self._run(self.trunk, "forward_features", images)

    def forward_head(self, tokens: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Compute the head on tokens, as the model does.

        Args:
            tokens: The tokens of forward_features (B, T, D).
            pre_logits: Return the vector that the head reads.

        Returns:
            What forward gives, (B, num_classes); with `pre_logits` what embed gives.
        """
        self.refuse_gradients(tokens)
        with torch.no_grad(), strict_float32():
            tokens, kwargs = tokens.to(self.input_dtype), {"pre_logits": True} if pre_logits else {}
            return self.trunk.forward_head(tokens, **kwargs).to(self.dtype)

    def forward_pooler(self, images: Tensor) -> Tensor:
        """Compute the pooler's output, as the model does.

        Args:
            images: Normalised pixels (B, C, H, W).

        Returns:
            (B, pooler_dim).
        """
        return self._run(self.trunk, "forward_pooler", images)

    def embed(self, images: Tensor) -> Tensor:
        """Compute the vector that the head reads, as the model does.

        Args:
            images: Normalised pixels (B, C, H, W).

        Returns:
            (B, num_features).
        """
        return self._run(self.trunk, "embed", images)

    def compute(self, function: Method, images: Tensor) -> Tensor:
        """Compute a function of the trunk, such as vectors of several blocks.

        Args:
            function: The function; see Method.
            images: Pixels (B, C, H, W), normalised or uint8.

        Returns:
            What the function gives, (B, ...).
        """
        is_uint8 = images.dtype == torch.uint8
        trunk = self._require_uint8_trunk(images) if is_uint8 else self.trunk
        return self._run(trunk, function, images)

    def attention(
        self,
        images: Tensor,  # noqa: ARG002
        layers: int | Sequence[int] | None = None,  # noqa: ARG002
        rows: Literal["all", "prefix"] = "all",  # noqa: ARG002
    ) -> NoReturn:
        """Refuse attention maps, which fused kernels do not compute.

        Args:
            images: As in ViT.attention.
            layers: As in ViT.attention.
            rows: As in ViT.attention.

        Raises:
            ConfigError: Always; the message says what to call.
        """
        call = "call attention() of the model that it was made from"
        raise ConfigError(f"an optimized model computes no attention maps: {call}")

    def packed(self, images: Iterable[Tensor], *, tokens: bool = True) -> Packed:
        """Compute images of different shapes in one forward, as the model does.

        Args:
            images: Normalised pixels of each image, (C, H, W).
            tokens: False gives logits alone.

        Returns:
            Logits, tokens, lengths and grids; see ViT.packed, which also has the errors.
        """
        from vitlib.fast.packed import packed  # few programs need it

        limit = None if self.device.type == "cuda" else tokens_at_a_time(torch.get_num_threads())
        return packed(self, images, tokens=tokens, max_tokens=limit)

    def forward_uint8(self, images: Tensor) -> Tensor:
        """Compute forward on uint8 pixels, which are normalised in the patch projection.

        Args:
            images: (B, C, H, W) uint8, not normalised.

        Returns:
            What forward gives, (B, num_classes).

        Raises:
            ConfigError: The model came without preprocessing that normalises uint8 pixels.
            ImageError: The pixels are not uint8.
        """
        return self._run(self._require_uint8_trunk(images), "forward", images)

    def embed_uint8(self, images: Tensor) -> Tensor:
        """Compute embed on uint8 pixels, which are normalised in the patch projection.

        Args:
            images: (B, C, H, W) uint8, not normalised.

        Returns:
            What embed gives, (B, num_features).

        Raises:
            ConfigError: The model came without preprocessing that normalises uint8 pixels.
            ImageError: The pixels are not uint8.
        """
        return self._run(self._require_uint8_trunk(images), "embed", images)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        image_processor: ImageProcessor | None = None,
        packed: bool = True,
    ) -> None:
        """Write the optimized model into a folder, which vitlib.fast.load opens.

        One file holds the weights in their precision, the config, the labels and the preprocessing;
        int8 takes a quarter of float32's size. A second file of that size holds the weights as this
        machine has packed them: where they are packed alike, load maps them and packs nothing.

        Args:
            folder: The folder to write into.
            image_processor: The preprocessing to write; None for the model's own.
            packed: False leaves the second file out.

        Raises:
            ConfigError: Modules of it are not vitlib's own.
            SourceError: The folder cannot be written.
        """
        from vitlib.fast.serialize import check_saveable, write_model  # few programs write one

        check_saveable(self.trunk, self.unoptimized_modules)
        dtype = str(self.dtype).removeprefix("torch.")
        settings = {"precision": self.precision, "dtype": dtype, "batch_size": self.batch_size}
        processor = image_processor or self.image_processor
        write_model(self.trunk, folder, processor, settings, packed)

    def upload(self, images: Tensor) -> Tensor:
        """Begin to copy images to the device, while it computes something else.

        Args:
            images: (B, C, H, W) in pinned memory that is not written to any more.

        Returns:
            The images on the device. On a CPU, and for memory that is not pinned, `images` itself.
        """
        return images

    def _require_uint8_trunk(self, images: Tensor) -> ViT:
        """Return the trunk for uint8 pixels, or raise."""
        if images.dtype != torch.uint8:
            raise ImageError(f"the pixels are {images.dtype}: expected uint8, not normalised")
        if self.uint8_trunk is None:
            raise ConfigError(
                "this model has no preprocessing that normalises uint8 pixels, or a patch_embed "
                "that is not vitlib's: give normalised pixels to forward(), or set "
                "image_processor before optimize()"
            )
        return self.uint8_trunk

    def _run(self, trunk: ViT, method: Method, images: Tensor) -> Tensor:
        """Run a method of a trunk on images (B, C, H, W), in micro-batches that fit the caches."""
        self.refuse_gradients(images)
        run = bind(trunk, method)
        with torch.no_grad(), strict_float32(), explain_out_of_memory(images):
            # Pixels of any other dtype are left to PatchEmbed, which refuses them.
            is_known_dtype = images.is_floating_point() or trunk is self.uint8_trunk
            dtype = self.input_dtype if is_known_dtype else images.dtype
            count = self._count_micro_batches(images)
            if count == 1:
                return run(images.to(dtype)).to(self.dtype)
            if count == 0:  # no images: the shape of what one image would give, without its row
                image = images.new_zeros(1, *images.shape[1:]).to(dtype)
                return run(image)[:0].to(self.dtype)
            parts = images.tensor_split(count)
            return torch.cat([run(part.to(dtype)) for part in parts]).to(self.dtype)

    def refuse_gradients(self, tensor: Tensor) -> None:
        """Raise ConfigError where the caller wants gradients.

        Args:
            tensor: An input.
        """
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "an optimized model has no gradients: use the model it was made from, or detach() "
                "what is given to it"
            )

    def _count_micro_batches(self, images: Tensor) -> int:
        """Count the micro-batches of a batch; one where the user's modules would see the split."""
        if self.unoptimized_modules or images.dim() != 4:
            return 1
        return -(-len(images) // (self.batch_size or self.images_at_a_time(images)))

    def images_at_a_time(self, images: Tensor) -> int:
        """Return the number of images whose tokens the caches hold.

        Args:
            images: Pixels (B, C, H, W).

        Returns:
            The number, from 1.
        """
        (p, q), (height, width) = self.config.patch_size, images.shape[2:]
        tokens = (height // p) * (width // q) + self.num_prefix_tokens
        return max(1, tokens_at_a_time(torch.get_num_threads()) // max(tokens, 1))

    def __repr__(self) -> str:
        """Describe the model in one line; the repr of its trunk lists the modules."""
        cfg = self.config
        size, patch = ("x".join(map(str, pair)) for pair in (cfg.image_size, cfg.patch_size))
        return (
            f"FastViT({cfg.family!r}, precision={self.precision!r}, device={str(self.device)!r}, "
            f"image_size={size}, patch_size={patch}, embed_dim={cfg.embed_dim}, "
            f"depth={cfg.depth}, num_classes={cfg.num_classes})"
        )

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Return a module, or explain that the model alone has a method for research."""
        if callable(vars(ResearchMethods).get(name)):
            call = f"call {name}() of the model that it was made from"
            raise UnoptimizedMethodError(f"an optimized model has no {name}: {call}")
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> FastViT:
        """Refuse training.

        Args:
            mode: True to train; False, as eval() gives it, changes nothing.

        Returns:
            The model.

        Raises:
            ConfigError: The mode is True.
        """
        if mode:
            raise ConfigError(
                "an optimized model is for inference only: train the model it was made from, then "
                "optimize it again"
            )
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:  # noqa: ARG002
        """Refuse to(), half(), cpu() and the like: packed weights would stay behind."""
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
        """The device that it runs on."""
        return next(t.device for t in (*self.trunk.parameters(), *self.trunk.buffers()))

    @property
    def num_prefix_tokens(self) -> int:
        """The number of class, distillation, register and prompt tokens before the patches."""
        return self.trunk.num_prefix_tokens

    @property
    def embed_dim(self) -> int:
        """D, the width of a token."""
        return self.config.embed_dim

    @property
    def num_features(self) -> int:
        """The width of the vector that the head reads."""
        return self.config.num_features

    @property
    def num_classes(self) -> int:
        """The width of the logits; 0 without a head."""
        return self.config.num_classes
