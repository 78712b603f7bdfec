"""Methods of ViT that scripts written for timm call, with timm's names and arguments.

What differs from timm 1.0 is said where it does: `forward_intermediates` returns a list alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, nn

from vitlib.errors import ConfigError, resolve_block_indices

if TYPE_CHECKING:
    from vitlib.vit import ViT


class TimmMethods(nn.Module):
    """Methods of a ViT under timm's names."""

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        reshape: bool | None = None,
        return_prefix_tokens: bool = False,
        output_fmt: Literal["NCHW", "NLC"] | None = None,
        intermediates_only: bool | None = None,
        stop_early: bool = True,  # noqa: ARG002
    ) -> list[Any]:
        """Compute the patch tokens after several blocks, (B, C, H, W) -> list of (B, N, D).

        Blocks after the last chosen one are not computed. The last three arguments are timm's. A
        call with `intermediates_only=True` gives what timm gives, maps unless output_fmt="NLC".

        Args:
            images: Normalised pixels, (B, C, H, W).
            indices: Blocks, as in timm: None means all, a number the last so many, a list their
                indices from 0, negative ones from the end.
            norm: Apply the final norm to the tokens.
            reshape: Return maps (B, D, h, w) in place of tokens (B, N, D).
            return_prefix_tokens: Return pairs of patch tokens and prefix tokens (B, P, D).
            output_fmt: "NCHW" is reshape=True, "NLC" reshape=False.
            intermediates_only: None or True; False, a pair with the final tokens, is refused.
            stop_early: Nothing depends on it.

        Returns:
            A tensor, or a pair, for each chosen block, in their order.

        Raises:
            ConfigError: An index is out of range, or the output is none of those.
        """
        model = cast("ViT", self)
        if intermediates_only is not None and not intermediates_only:
            raise ConfigError(
                "intermediates_only=False: expected True, as a list is all that "
                "forward_intermediates returns; forward_features gives the final tokens"
            )
        if reshape is None:
            reshape = _choose_maps(output_fmt, intermediates_only)
        chosen = resolve_block_indices(indices, len(model.blocks), "indices")
        grid, first, features = model.patch_grid(images), model.num_prefix_tokens, list[Any]()
        for tokens in self.tokens_after_blocks(images, chosen, norm=norm):
            patches = tokens[:, first:]
            if reshape:
                patches = patches.transpose(1, 2).reshape(*patches.shape[::2], *grid).contiguous()
            features.append((patches, tokens[:, :first]) if return_prefix_tokens else patches)
        return features

    def tokens_after_blocks(self, images: Tensor, chosen: set[int], *, norm: bool) -> list[Tensor]:
        """Compute every token after some blocks, (B, C, H, W) -> list of (B, T, D).

        Args:
            images: Normalised pixels, (B, C, H, W).
            chosen: Indices of the blocks.
            norm: Apply the final norm to the tokens.

        Returns:
            The tokens of each block, (B, T, D), in the order of the blocks.
        """
        model = cast("ViT", self)
        norm = norm and model.config.final_norm != "none"
        states = model.iter_hidden_states(images, max(chosen, default=-1) + 1)
        next(states)  # the tokens before the blocks
        return [model.norm(x) if norm else x for i, x in enumerate(states) if i in chosen]

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        *,
        return_class_token: bool = False,
    ) -> list[Any]:
        """Compute the patch tokens after several blocks, under the name of DINO and timm.

        Args:
            images: Normalised pixels, (B, C, H, W).
            n: Blocks, as `indices` of `forward_intermediates`.
            reshape: Return maps (B, D, h, w) in place of tokens (B, N, D).
            return_prefix_tokens: Return pairs of patch tokens and prefix tokens (B, P, D).
            norm: Apply the final norm. The default is timm's; the code of DINOv2 has True.
            return_class_token: Return pairs of patch tokens and the class token (B, D), as DINOv2.

        Returns:
            A tensor, or a pair, for each chosen block, in their order.

        Raises:
            ConfigError: An index is out of range, both kinds of pairs are wanted, or the model has
                no class token to return.
        """
        if not return_class_token:
            return self.forward_intermediates(
                images, n, norm=norm, reshape=reshape, return_prefix_tokens=return_prefix_tokens
            )
        if return_prefix_tokens:
            raise ConfigError("return_class_token goes without return_prefix_tokens: choose one")
        if not cast("ViT", self).config.tokens.cls:
            raise ConfigError("this model has no class token: expected return_class_token=False")
        pairs = self.forward_intermediates(
            images, n, norm=norm, reshape=reshape, return_prefix_tokens=True
        )
        return [(patches, prefix[:, 0]) for patches, prefix in pairs]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last chosen one, in place.

        Args:
            indices: Blocks, as in `forward_intermediates`.
            prune_norm: Remove the final norm.
            prune_head: Remove the head.

        Returns:
            The indices of the chosen blocks.

        Raises:
            ConfigError: An index is out of range.
        """
        model = cast("ViT", self)
        chosen = sorted(resolve_block_indices(indices, len(model.blocks), "indices"))
        del model.blocks[max(chosen, default=-1) + 1 :]
        if prune_norm:
            model.norm = cast("Any", nn.Identity())
        if prune_head:
            model.reset_classifier(0)
        return chosen

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Make another image size the learned one, in place: positions become those of its grid.

        `forward` takes other sizes as they are, and resizes positions by the same rule in each
        call. Here the positions that train, and that a file holds, are those of the new grid. Call
        it before an optimizer is made: the parameters are new.

        Args:
            img_size: Pixels (height, width), or an int for a square; None: as it is.
            patch_size: Pixels (height, width) of a patch; the kernel is resized by the
                pseudo-inverse of FlexiViT (2212.08013). None: as it is.

        Raises:
            ConfigError: No ViT has such sizes, or positions are not those of the config.
        """
        from vitlib.checkpoint.input_size import set_input_size

        set_input_size(cast("ViT", self), img_size, patch_size)

    def no_weight_decay(self) -> set[str]:
        """Return the names of matrices that weight decay leaves out: tokens, positions, tables.

        Biases, norms and LayerScale have one axis and are left out by it.

        Returns:
            Names of parameters, as in `named_parameters()`.
        """
        from vitlib.param_groups import has_weight_decay

        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim > 1 and not has_weight_decay(name, parameter)
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """Return timm's patterns of the layers of parameters, for its `layer_decay`.

        As in timm, the final norm of all tokens is in the group of the last block. In
        `vitlib.parameter_groups` it is in that of the head, as in the code of BEiT and MAE.

        Args:
            coarse: Unused, as in timm.

        Returns:
            Regular expressions of names by group.
        """
        config = cast("ViT", self).config
        blocks: list[tuple[str, tuple[int] | None]] = [(r"^blocks\.(\d+)", None)]
        stem = r"^patch_embed|^norm_pre|^attn_position"
        if config.positions.relative == "block":
            stem = stem.replace("|^attn_position", "")
            blocks.append((r"^attn_position\.tables\.(\d+)", None))
        if config.final_norm == "tokens":
            blocks.append((r"^norm\.", (99999,)))  # timm's mark of the group before
        return {"stem": stem, "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training (1604.06174).

        Args:
            enable: Store only each block's input, and compute the rest again in the backward pass.
        """
        cast("ViT", self).gradient_checkpointing = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the head; both heads of a distilled model.

        Returns:
            The head, or a pair, those of the class token and of the distillation token.
        """
        model = cast("ViT", self)
        return model.head if model.head_dist is None else (model.head, model.head_dist)

    @property
    def head_hidden_size(self) -> int:
        """Width of the vector that the head reads."""
        return cast("ViT", self).config.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Module, channels and stride in pixels of each block's output, as timm lists them."""
        model = cast("ViT", self)
        stride = max(model.config.patch_size)
        return [
            {"module": f"blocks.{index}", "num_chs": model.config.embed_dim, "reduction": stride}
            for index in range(len(model.blocks))
        ]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Preprocessing and names of the ends in timm's words, for timm.data.

        Where the preprocessing is not known, timm's functions take their defaults; a step that
        timm does not do is not in it (ImageProcessor.unsupported_fields lists these).
        """
        model = cast("ViT", self)
        config = model.config
        values: dict[str, Any] = {"input_size": (config.in_channels, *config.image_size)}
        if model.image_processor is not None:
            rule = model.image_processor.to_timm()
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in rule.items()}
        return values | {
            "num_classes": model.num_classes,
            "pool_size": None,
            "fixed_input_size": False,
            "first_conv": "patch_embed.proj",
            "classifier": "head" if model.head_dist is None else ("head", "head_dist"),
        }

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The same as `pretrained_cfg`, under its older name."""
        return self.pretrained_cfg


def _choose_maps(output_fmt: str | None, intermediates_only: bool | None) -> bool:
    """Return True if timm's arguments ask for maps, its default."""
    if output_fmt not in (None, "NCHW", "NLC"):
        raise ConfigError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NLC'")
    return output_fmt == "NCHW" or (output_fmt is None and bool(intermediates_only))
