"""A stock transformer block for inference, as fused linear layers.

Why it has a forward of its own: fused products and packed weights need another order of
operations than encoder.Block's, and have no gradients.

How data flows: the residual stream x is float32. norm1 -> q, k and v in one product -> attention ->
out, which adds x -> norm2 -> up with its activation -> down, which adds again. Some models norm
queries and keys, the attended values before out, or the hidden layer before down; and some have
norm1 and norm2 after out and down instead. A block's input is never overwritten, so that a caller
may keep the output of the block before it.

Shapes: as in vitlib/encoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitlib.encoder import Block, LayerScale, RotaryAttention, SwiGLU
from vitlib.fast.attention import ATTENTION_KERNELS, AbsorbedAttention
from vitlib.fast.cpu import KernelPlan
from vitlib.fast.int8_linears import make_linear
from vitlib.fast.linears import LinearWeights, own_copy
from vitlib.fast.norms import NormWeights, norm_weights, normalize
from vitlib.positions import apply_rope
from vitlib.variants import PostNormBlock

# x * sigmoid(1.702 x) is silu(1.702 x) / 1.702 (1606.08415): the factors go into the weights.
QUICK_GELU_SCALE = 1.702
LINEARS = ("qkv", "out", "gate", "up", "down")
SUB_NORMS = ("q", "k", "attn", "mlp")


@dataclass
class BlockWeights:
    """The numbers of a block; LayerScale and factors of the activation are in the others.

    Attributes:
        norms: norm1 and norm2.
        linears: By LINEARS; "gate" only for SwiGLU.
        num_heads: H.
        activation: "gelu", "gelu_tanh" or "silu".
        rotary: Queries and keys are rotated by position.
        sub_norms: The norms within the branches, by SUB_NORMS: of queries and keys (of each head
            or of the whole width), of the attended values, and of the hidden layer.
        post: norm1 and norm2 norm the outputs of the branches, not their inputs.
    """

    norms: tuple[NormWeights, NormWeights]
    linears: dict[str, LinearWeights]
    num_heads: int
    activation: str
    rotary: bool
    sub_norms: dict[str, NormWeights] = field(default_factory=dict)
    post: bool = False


def extract_weights(block: Block) -> BlockWeights:
    """Read the numbers of a block and fuse what can be fused.

    Args:
        block: A stock block, which is only read.

    Returns:
        Its numbers in float32.
    """
    attn, mlp = block.attn, block.mlp
    sub_norms = extract_sub_norms(block)
    q = linear_weights(attn.q)
    if "q" not in sub_norms:
        q = scale_outputs(q, attn.head_dim**-0.5)
    linears = {
        "qkv": concat_outputs(q, linear_weights(attn.k), linear_weights(attn.v)),
        "out": linear_weights(attn.proj),
    }
    activation = "silu"
    if isinstance(mlp, SwiGLU):
        both = linear_weights(mlp.fc1)
        biases = (None, None) if both.bias is None else split_bias(both.bias, 2)
        for name, weight, bias in zip(("gate", "up"), both.weight.chunk(2), biases, strict=True):
            linears[name] = LinearWeights(weight, bias)
    else:
        linears["up"], activation = linear_weights(mlp.fc1), mlp.activation
    down = linear_weights(mlp.fc2)
    if activation == "quick_gelu":
        activation = "silu"
        linears["up"] = scale_outputs(linears["up"], QUICK_GELU_SCALE)
        if "mlp" not in sub_norms:  # a norm divides by the factor itself, see hidden_norm_eps
            down.weight = down.weight / QUICK_GELU_SCALE
    linears["down"] = down
    norms = [norm_weights(block.norm1), norm_weights(block.norm2)]
    post = isinstance(block, PostNormBlock)
    for index, (name, layer_scale) in enumerate((("out", block.ls1), ("down", block.ls2))):
        gamma = layer_scale_gamma(layer_scale)
        if gamma is not None and post:
            norms[index] = norms[index].scale(gamma.detach().float())
        else:
            linears[name] = scale_outputs(linears[name], gamma)
    return BlockWeights(
        norms=(norms[0], norms[1]),
        linears=linears,
        num_heads=attn.num_heads,
        activation=activation,
        rotary=isinstance(attn, RotaryAttention),
        sub_norms=sub_norms,
        post=post,
    )


def extract_sub_norms(block: Block) -> dict[str, NormWeights]:
    """Read the norms within the branches of a block.

    Args:
        block: A stock block, which is only read.

    Returns:
        The norms that it has, by SUB_NORMS. The one of queries scales them by 1 / sqrt(K).
    """
    attn, mlp = block.attn, block.mlp
    modules = {"q": attn.q_norm, "k": attn.k_norm, "attn": attn.sub_norm, "mlp": mlp.sub_norm}
    norms = {name: norm_weights(norm) for name, norm in modules.items() if norm is not None}
    if "q" in norms:
        norms["q"] = norms["q"].scale(attn.head_dim**-0.5)
    if "mlp" in norms:
        activation = "swiglu" if isinstance(mlp, SwiGLU) else mlp.activation
        norms["mlp"] = norms["mlp"]._replace(eps=hidden_norm_eps(norms["mlp"].eps, activation))
    return norms


def hidden_norm_eps(eps: float, activation: str) -> float:
    """Return the eps of the norm of the hidden layer, as a fast block computes that layer.

    Args:
        eps: The model's.
        activation: The model's. For "quick_gelu" the hidden layer is QUICK_GELU_SCALE times as
            large, and its variance the square of that.

    Returns:
        The eps.
    """
    return eps * QUICK_GELU_SCALE**2 if activation == "quick_gelu" else eps


def layer_scale_gamma(layer_scale: LayerScale | None) -> Tensor | None:
    """Return the gamma of a LayerScale.

    Args:
        layer_scale: The LayerScale of a branch, or None where the block has none.

    Returns:
        Gamma (D,), or None.
    """
    return None if layer_scale is None else layer_scale.gamma


def split_bias(bias: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split a bias into equal parts.

    Args:
        bias: (N,).
        count: The number of parts.

    Returns:
        The parts, each in memory of its own.
    """
    return tuple(part.clone() for part in bias.chunk(count))


def linear_weights(linear: nn.Linear | nn.Conv2d) -> LinearWeights:
    """Read the numbers of a linear layer or a convolution.

    Args:
        linear: The layer.

    Returns:
        Its numbers in float32. A float32 weight is not copied.
    """
    bias = None if linear.bias is None else own_copy(linear.bias)
    return LinearWeights(linear.weight.detach().float(), bias)


def concat_outputs(*layers: LinearWeights) -> LinearWeights:
    """Join linear layers of the same input into one layer.

    Args:
        *layers: The layers, weights (N, K) each.

    Returns:
        The layer of all outputs, (N + N + ..., K). A missing bias is zeros beside another's.
    """
    weight = torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return LinearWeights(weight)
    biases = [
        layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        for layer in layers
    ]
    return LinearWeights(weight, torch.cat(biases))


def scale_outputs(layer: LinearWeights, scale: Tensor | float | None) -> LinearWeights:
    """Multiply the outputs of a linear layer, by scaling its weight and bias.

    Args:
        layer: The layer.
        scale: One number for each output (N,), one for all, or None for 1.

    Returns:
        The scaled layer.
    """
    if scale is None:
        return layer
    # A Python number stays one: as a tensor it would lie on the CPU, and the weights may not.
    factor: Tensor | float = scale
    rows: Tensor | float = scale
    if isinstance(scale, Tensor):
        factor = scale.detach().float()
        rows = factor.view(-1, 1)
    bias = None if layer.bias is None else layer.bias * factor
    return LinearWeights(layer.weight * rows, bias)


class FastBlock(nn.Module):
    """A transformer block for inference, called as Block is.

    Args:
        weights: The numbers of the block.
        plan: The kernels of this machine.
        absorbs_kv: Compute only the first tokens without K and V, where the head reads only those.
    """

    def __init__(self, weights: BlockWeights, plan: KernelPlan, absorbs_kv: bool) -> None:
        super().__init__()
        self.num_heads, self.activation = weights.num_heads, weights.activation
        self.rotary, self.plan = weights.rotary, plan
        self.norm1, self.norm2 = weights.norms
        self.sub_norms, self.post = weights.sub_norms, weights.post
        linears = {name: make_linear(layer, plan) for name, layer in weights.linears.items()}
        self.qkv, self.out = linears["qkv"], linears["out"]
        self.up, self.down = linears["up"], linears["down"]
        self.gate = linears.get("gate")
        self.sdpa = ATTENTION_KERNELS[plan.attention]
        self.absorbed = absorb_kv(weights) if absorbs_kv else None

    def weights(self) -> BlockWeights:
        """Return the numbers that the block was made of, for save()."""
        layers = ((name, getattr(self, name)) for name in LINEARS)
        linears = {name: layer.weights() for name, layer in layers if layer is not None}
        norms = (self.norm1, self.norm2)
        return BlockWeights(
            norms, linears, self.num_heads, self.activation, self.rotary, self.sub_norms, self.post
        )

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Apply the block.

        Args:
            x: Tokens (B, T, D).
            num_queries: Q, the number of first tokens to compute; None for all.
            attn_pos: Position table of the attention, see vitlib/positions.py.

        Returns:
            (B, Q, D) float32.
        """
        x = x.float()
        y = x if self.post else normalize(x, self.norm1)
        if num_queries is not None and self.absorbed is not None and num_queries < x.shape[1]:
            bias = None if attn_pos is None else attn_pos[:, :, :num_queries]
            y = self.absorbed(y, num_queries, bias)
        else:
            y = self.attend(self.qkv(y), num_queries, attn_pos)
        return self.add_branches(x[:, :num_queries], y)

    def add_branches(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the attended values, projected, and the MLP, (B, Q, D) -> (B, Q, D).

        Args:
            x: Tokens before the block (B, Q, D), float32.
            y: Attended values (B, Q, D).
        """
        if "attn" in self.sub_norms:
            y = normalize(y, self.sub_norms["attn"])
        if self.post:
            x = x + normalize(self.out(y), self.norm1)
            return x + normalize(self.down(self.hidden(x)), self.norm2)
        x = self.out.add(y, x)
        return self.down.add_(self.hidden(normalize(x, self.norm2)), x)

    def attend(self, qkv: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> Tensor:
        """Attend, without the output projection.

        Args:
            qkv: Queries, keys and values (B, T, 3 D).
            num_queries: Q, the number of first tokens that are queries; None for all.
            attn_pos: Position table of the attention.

        Returns:
            (B, Q, D).
        """
        return self.sdpa(*self._split_qkv(qkv, num_queries, attn_pos))

    def _split_qkv(
        self, qkv: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the arguments of the attention kernel."""
        b, t, _ = qkv.shape
        q, k, v = qkv.view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if "q" in self.sub_norms:
            q, k = self.normalize_heads(q, "q"), self.normalize_heads(k, "k")
        bias = None
        if self.rotary:
            assert attn_pos is not None
            first = t - attn_pos.shape[-2]
            q, k = apply_rope(q, first, attn_pos), apply_rope(k, first, attn_pos)
        elif attn_pos is not None:
            bias = attn_pos[:, :, :num_queries]
        return q[:, :, :num_queries], k, v, bias

    def normalize_heads(self, x: Tensor, name: str) -> Tensor:
        """Normalize queries or keys (2302.05442).

        Args:
            x: Queries or keys (B, H, T, K).
            name: Name of the norm, "q" or "k". Its width is that of a head, or of all heads.

        Returns:
            (B, H, T, K) in the dtype of x.
        """
        norm = self.sub_norms[name]
        tokens = x.transpose(1, 2)  # (B, T, H, K)
        y = normalize(tokens.reshape(*tokens.shape[:2], -1, len(norm.weight)), norm)
        return y.to(x.dtype).view(tokens.shape).transpose(1, 2)

    def hidden(self, y: Tensor) -> Tensor:
        """Compute the hidden layer of the MLP.

        Args:
            y: Normed tokens (B, Q, D).

        Returns:
            (B, Q, M), as `down` takes it.
        """
        norm = self.sub_norms.get("mlp")
        if self.gate is None:
            # A layer in 8 bits would quantize its outputs for `down`, which a norm cannot take.
            h = self.up.activate(y, self.activation, self.down if norm is None else None)
        else:
            h = self.up.multiply(y, self.gate.activate(y, self.activation, None))
        return h if norm is None else normalize(h, norm)


class LastBlock(nn.Module):
    """The last block of a model whose head reads class tokens, beside narrower blocks.

    Args:
        prefix_block: Serves calls for the first tokens alone, in float32 and without K and V.
        full_block: Serves calls for all tokens.
    """

    def __init__(self, prefix_block: FastBlock, full_block: FastBlock) -> None:
        super().__init__()
        self.prefix_block, self.full_block = prefix_block, full_block

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Apply the block, (B, T, D) -> (B, Q, D) float32.

        Args:
            x: Tokens (B, T, D).
            num_queries: Q, the number of first tokens to compute; None for all.
            attn_pos: Position table of the attention.
        """
        block = self.full_block if num_queries is None else self.prefix_block
        y: Tensor = block(x, num_queries, attn_pos)
        return y


def absorb_kv(weights: BlockWeights) -> AbsorbedAttention:
    """Make the attention of a block's first tokens without K and V.

    Args:
        weights: The numbers of the block, not rotary and without norms of queries and keys.

    Returns:
        The attention, in float32.
    """
    qkv = weights.linears["qkv"]
    # Copies: MKL's sums depend on the alignment of the weights in memory, and a spawned process
    # takes no two tensors of one storage.
    q, k, v = (part.clone() for part in qkv.dequantize().chunk(3))
    q_bias, _, v_bias = (None,) * 3 if qkv.bias is None else split_bias(qkv.bias, 3)
    return AbsorbedAttention(q, k, v, (q_bias, v_bias), weights.num_heads)
