"""Find the layers whose rounding to 8 bits moves the embeddings most.

How data flows: the embeddings of a few photos are computed in float32, and with every layer
rounded. If these are further apart than a limit, each layer is rounded alone. What comes before its
block is not computed again, but replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitlib.fast import onednn_ops
from vitlib.fast.block import FastBlock, LastBlock
from vitlib.fast.int8_quantization import QuantParams
from vitlib.fast.linears import FastLinear, apply_activation
from vitlib.vit import ViT

LayerKey = tuple[str, str]  # the path of a block, and a name of SHARED_INPUT


class RoundedLinear(FastLinear):
    """A linear layer that rounds as the 8-bit one does, with inputs and outputs in float32.

    Args:
        name: The layer's name in `params`.
        params: The 8-bit layers of its input.
    """

    def __init__(self, name: str, params: QuantParams) -> None:
        nn.Module.__init__(self)
        self.params, self.dtype = params, torch.float32
        self.layer = params.linears[name]
        self.bias = self.layer.bias
        # The 8-bit kernel needs a quarter of the memory; its sums are exact, as those of float32
        # are not quite.
        self.is_int8 = onednn_ops.has_int8_linear()
        if self.is_int8 and self.layer.packed is None:
            self.layer.packed = onednn_ops.pack_int8(self.layer.weight)
        packed = self.layer.packed
        self.packed = self.layer.dequantize() if packed is None else packed

    def forward(self, x: Tensor) -> Tensor:
        """Round the input and apply the layer.

        Args:
            x: (..., K).

        Returns:
            (..., N) float32.
        """
        levels = self.params.quantize(x)
        scale, zero_point = self.layer.x_scale, self.layer.x_zero_point
        assert scale is not None
        if not self.is_int8:
            x = levels.sub_(zero_point).mul_(scale)
            return nn.functional.linear(x, self.packed, self.bias)
        assert self.layer.scale is not None
        rows = onednn_ops.to_uint8(levels).reshape(-1, x.shape[-1])
        y = onednn_ops.linear_int8(
            rows, scale, zero_point, self.packed, self.layer.scale, self.bias, torch.float32
        )
        return y.view(*x.shape[:-1], -1)

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:  # noqa: ARG002
        """Round the input, and apply the layer and an activation.

        Args:
            x: (..., K).
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: Not used.

        Returns:
            (..., N) float32.
        """
        return apply_activation(self(x), activation)


class ReplayedBlock(nn.Module):
    """A block that gives its output of an earlier forward again, where it is told to.

    Args:
        block: The block.
    """

    def __init__(self, block: FastBlock) -> None:
        super().__init__()
        self.block = block
        self.output: Tensor | None = None
        self.replays = False

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Apply the block, (B, T, D) -> (B, Q, D), or give the output of the first call.

        Args:
            x: Tokens (B, T, D).
            num_queries: Q, the number of first tokens to compute; None for all.
            attn_pos: Position table of the attention.
        """
        if self.replays and self.output is not None:
            return self.output
        y: Tensor = self.block(x, num_queries, attn_pos)
        if self.output is None:
            self.output = y
        return y


def fast_blocks(trunk: nn.Module) -> dict[str, FastBlock]:
    """List the fast blocks of a model.

    Args:
        trunk: A model with fast blocks.

    Returns:
        The block for all tokens at each path of a stock block.
    """
    blocks = {}
    for path, part in trunk.named_modules(remove_duplicate=False):
        if isinstance(part, LastBlock):
            blocks[path] = part.full_block
        elif isinstance(part, FastBlock) and not path.endswith(("full_block", "prefix_block")):
            blocks[path] = part
    return blocks


def find_sensitive_layers(
    assemble: Callable[[], ViT],
    params: dict[LayerKey, QuantParams],
    pixels: Tensor,
    max_error: float,
) -> list[LayerKey]:
    """Find the layers to leave out of 8 bits, so that the embeddings stay near float32.

    Args:
        assemble: Makes the model with fast blocks in float32, whose layers are replaced.
        params: Every layer in 8 bits.
        pixels: Normalised pixels (B, C, H, W).
        max_error: The largest error of the embeddings, as in CalibrationGoal.

    Returns:
        The keys of those layers, the most sensitive for its size first.
    """
    trunk = assemble()
    exact = trunk.embed(pixels).float()
    # Each float layer is freed as its place is taken.
    for key in params:
        round_layers(fast_blocks(trunk), key, params[key])
    total = mean_square_error(trunk.embed(pixels), exact)
    if total <= max_error**2:
        return []
    del trunk
    alone = errors_alone(assemble(), params, pixels)
    size = {
        key: sum(w.weight.numel() for w in group.linears.values()) for key, group in params.items()
    }
    # The errors of single layers do not quite add up to the error of all: they are scaled to it.
    scale = total / max(sum(alone.values()), 1e-30)
    sensitive: list[LayerKey] = []
    for key in sorted(alone, key=lambda k: alone[k] / size[k], reverse=True):
        if total <= max_error**2:
            break
        total -= alone[key] * scale
        sensitive.append(key)
    return sensitive


def errors_alone(
    trunk: ViT, params: dict[LayerKey, QuantParams], pixels: Tensor
) -> dict[LayerKey, float]:
    """Compute the error of the embeddings with each layer rounded alone.

    Args:
        trunk: The model with fast blocks in float32; its blocks are replaced.
        params: The layers in 8 bits.
        pixels: Normalised pixels (B, C, H, W).

    Returns:
        The mean square error by layer, as mean_square_error() gives it.
    """
    blocks, replayed = fast_blocks(trunk), replay_blocks(trunk)
    exact = trunk.embed(pixels).float()  # every replayed block remembers its output of this call
    paths, alone = list(replayed), {}
    for key, group in params.items():
        for position, block in enumerate(replayed.values()):
            block.replays = position < paths.index(key[0])
        before = round_layers(blocks, key, group)
        alone[key] = mean_square_error(trunk.embed(pixels), exact)
        for name, linear in before.items():
            setattr(blocks[key[0]], name, linear)
    return alone


def round_layers(
    blocks: dict[str, FastBlock], key: LayerKey, group: QuantParams
) -> dict[str, FastLinear]:
    """Replace the layers of one input by layers that round.

    Args:
        blocks: The fast blocks of a model, by path.
        key: Where the layers are.
        group: Their 8-bit form.

    Returns:
        The layers that were there, by name.
    """
    block = blocks[key[0]]
    before = {name: getattr(block, name) for name in group.linears}
    for name in before:
        setattr(block, name, RoundedLinear(name, group))
    return before


def mean_square_error(actual: Tensor, exact: Tensor) -> float:
    """Return the mean square of a difference, as a share of the exact numbers' mean square.

    Args:
        actual: Embeddings (B, D).
        exact: Those in float32 (B, D).

    Returns:
        The share.
    """
    error = (actual.float() - exact).square().mean() / exact.square().mean()
    return error.item()


def replay_blocks(trunk: ViT) -> dict[str, ReplayedBlock]:
    """Put a ReplayedBlock around every fast block of a model.

    Args:
        trunk: The model with fast blocks, whose blocks are replaced.

    Returns:
        The new blocks, in order. None for a class of the user's, or for fewer tokens: a forward of
        theirs may call a block twice, or by another method.
    """
    if type(trunk) is not ViT:
        return {}
    replayed = {}
    for path, block in fast_blocks(trunk).items():
        replayed[path] = ReplayedBlock(block)
        parent, _, name = path.rpartition(".")
        trunk.get_submodule(parent)._modules[name] = replayed[path]
    return replayed
