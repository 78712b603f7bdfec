"""8-bit products in an exported graph, as pairs of QuantizeLinear and DequantizeLinear.

How data flows: optimize()'s calibration (fast/calibration.py) finds the layers that go into 8 bits,
with their scales. A layer rounds its input to uint8 and back, and holds an int8 weight with a scale
for each output. A runtime fuses such a layer into one product of integers. Smoothing factors are
folded into what makes the input.

Shapes: as in vitlib/encoder.py; (..., K) inputs to (..., N) outputs.
Sources: Jacob et al. 1712.05877; ONNX operators QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitlib.encoder import Block
from vitlib.errors import ConfigError
from vitlib.fast.block import LINEARS, BlockWeights, FastBlock, linear_weights
from vitlib.fast.calibration import CalibrationGoal
from vitlib.fast.int8_quantization import QuantParams, quantize_block
from vitlib.fast.linears import FastLinear, LinearWeights, apply_activation
from vitlib.fast.module_swap import swap_stock_modules
from vitlib.fast.norms import normalize
from vitlib.fast.optimization import FALLBACK_PLAN, search_params
from vitlib.fast.stock_blocks import StockBlocks
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.vit import ViT

# Layers that stay out of 8 bits are computed in float32 here, in optimize() in bfloat16. So a file
# goes further from float32, but it may smooth the hidden layers, whose errors are the largest.
GOAL = CalibrationGoal(max_error=0.04, smooths_hidden=True)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend by two products around a softmax: torch's fused kernel becomes more nodes than these.

    Args:
        q: Scaled queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Bias of the scores (1, H, Q, T), or None.

    Returns:
        (B, Q, D).
    """
    return (attend_probs(q, k, bias) @ v).transpose(1, 2).flatten(2)


def attend_probs(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Compute attention probabilities.

    Args:
        q: As in `attend`.
        k: As in `attend`.
        bias: As in `attend`.

    Returns:
        (B, H, Q, T).
    """
    scores = q @ k.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(dim=-1)


class QuantizedLinear(FastLinear):
    """A linear layer of a uint8 input and an int8 weight, as an exported graph has it.

    Args:
        weights: The numbers of the layer in 8 bits, calibrated.
        smoothing: What each input channel is divided by, (K,), where no other part does that.
    """

    columns: Tensor
    scale: Tensor
    zero_points: Tensor
    shift: Tensor | None
    inverse_smoothing: Tensor | None

    def __init__(self, weights: LinearWeights, smoothing: Tensor | None) -> None:
        nn.Module.__init__(self)
        assert weights.scale is not None
        assert weights.x_scale is not None
        self.out_features, self.in_features = weights.weight.shape
        self.dtype, self.x_scale, self.x_zero_point = (
            torch.float32, weights.x_scale, weights.x_zero_point
        )  # fmt: skip
        # (K, N): runtimes fuse a product with a weight that needs no transpose.
        self.register_buffer("columns", weights.weight.t().contiguous())
        self.register_buffer("scale", weights.scale)
        self.register_buffer("zero_points", torch.zeros(self.out_features, dtype=torch.int8))
        self.register_buffer("shift", weights.bias)
        self.register_buffer("inverse_smoothing", None if smoothing is None else 1 / smoothing)

    def forward(self, x: Tensor) -> Tensor:
        """Round the input and apply the layer.

        Args:
            x: (..., K) float32.

        Returns:
            (..., N) float32.
        """
        ops = torch.ops.quantized_decomposed
        if self.inverse_smoothing is not None:
            x = x * self.inverse_smoothing
        x_range = self.x_scale, self.x_zero_point, 0, 255, torch.uint8
        x = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *x_range), *x_range)
        weight = ops.dequantize_per_channel(
            self.columns, self.scale, self.zero_points, 1, -128, 127, torch.int8
        )
        y = torch.matmul(x, weight)
        return y if self.shift is None else y + self.shift

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:  # noqa: ARG002
        """Round the input, and apply the layer and an activation.

        Args:
            x: (..., K).
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: Not used: the next layer rounds its input itself.

        Returns:
            (..., N) float32.
        """
        return apply_activation(self(x), activation)


class HalfWeightLinear(FastLinear):
    """A linear layer in float32 whose weight is stored in float16: half the bytes of the file.

    Args:
        weights: The numbers of the layer in float32.
    """

    columns: Tensor
    shift: Tensor | None

    def __init__(self, weights: LinearWeights) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weights.weight.shape
        self.dtype = torch.float32
        self.register_buffer("columns", weights.weight.t().contiguous().half())
        self.register_buffer("shift", weights.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., K) float32.

        Returns:
            (..., N) float32.
        """
        y = torch.matmul(x, self.columns.float())
        return y if self.shift is None else y + self.shift


class QuantizedBlock(FastBlock):
    """A block some of whose layers are in 8 bits.

    Args:
        block: The numbers of the block in float32.
        params: The layers that go into 8 bits, by SHARED_INPUT.
    """

    def __init__(self, block: BlockWeights, params: Mapping[str, QuantParams]) -> None:
        # A smoothing that nothing before the layer can take over is a product of its own: of hidden
        # layers, and of inputs that no norm makes. The scales of inputs are stated by the graph.
        folded = quantize_block(replace(block, post=False), params)
        norms = block.norms
        if not block.post:
            norm1, norm2 = (
                norm.scale(1 / params[name].smoothing) if name in params else norm
                for norm, name in zip(norms, ("qkv", "up"), strict=True)
            )
            norms = norm1, norm2
        super().__init__(
            replace(folded, norms=norms, post=block.post), FALLBACK_PLAN, absorbs_kv=False
        )
        self.sdpa = attend
        for group, param in params.items():
            is_folded = group == "out" or (
                "mlp" in block.sub_norms if group == "down" else not block.post
            )
            smoothing = None if is_folded or (param.smoothing == 1).all() else param.smoothing
            for name in param.linears:
                setattr(self, name, QuantizedLinear(folded.linears[name], smoothing))
        for name in LINEARS:
            if type(getattr(self, name)) is FastLinear:
                setattr(self, name, HalfWeightLinear(getattr(self, name).weights()))

    def attention(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Compute the attention probabilities of `forward`, (B, T, D) -> (B, H, Q, T).

        Args:
            x: The tokens that `forward` takes, (B, T, D).
            num_queries: As in `forward`.
            attn_pos: As in `forward`.

        Returns:
            Probabilities (B, H, Q, T) in float32.
        """
        qkv: Tensor = self.qkv(x if self.post else normalize(x, self.norm1))
        q, k, _, bias = self._split_qkv(qkv, num_queries, attn_pos)
        return attend_probs(q, k, bias)


def quantize_products(
    model: ViT, graph_model: ViT, photos: Iterable[ImageLike] | Tensor, processor: ImageProcessor
) -> ViT:
    """Replace the blocks of a graph by those in 8 bits, calibrated on photos.

    Args:
        model: The model in float32, which is only read.
        graph_model: Its copy for export, which is only read.
        photos: Photos, 32 or more, or normalised pixels (B, C, H, W).
        processor: The preprocessing.

    Returns:
        A copy of the copy, with blocks in 8 bits.

    Raises:
        ConfigError: There are no photos.
        ImageError: A photo cannot be read.
    """
    # Importing this registers the operators.
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    blocks = dict(StockBlocks(model))
    params = search_params(model, blocks, photos, processor, GOAL)
    if not any(params.values()):
        raise ConfigError(
            "every layer of this model needs more than 8 bits to stay near float32 on these "
            "photos: use precision='fp16' (--precision fp16)"
        )

    def convert(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Linear):  # the head, and what few families have beside the blocks
            return HalfWeightLinear(linear_weights(module))
        if not isinstance(module, Block):
            return None
        return QuantizedBlock(blocks.pop(path), params[path])

    quantized = swap_stock_modules(graph_model, convert)
    assert isinstance(quantized, ViT)
    return quantized
