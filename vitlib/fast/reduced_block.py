"""A fast block whose tokens become fewer between attention and MLP (vitlib/tokens).

Shapes: as in vitlib/encoder.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitlib.fast.block import BlockWeights, FastBlock
from vitlib.fast.cpu import KernelPlan
from vitlib.fast.norms import normalize
from vitlib.tokens.reduction import ReductionPoints


class ReducedBlock(FastBlock):
    """A fast block with the points that token functions need.

    Args:
        weights: The numbers of the block.
        plan: The kernels of this machine.
        absorbs_kv: As in FastBlock.
    """

    def __init__(self, weights: BlockWeights, plan: KernelPlan, absorbs_kv: bool) -> None:
        if plan.attention == "graph":
            # oneDNN Graph compiles a kernel for each number of tokens, and every block has its own.
            is_narrow = plan.attention_dtype == torch.bfloat16
            plan = plan._replace(attention="bmm" if is_narrow else "fused")
        super().__init__(weights, plan, absorbs_kv)

    def forward_with_points(
        self, x: Tensor, num_queries: int | None, attn_pos: Tensor | None, at: ReductionPoints
    ) -> Tensor:
        """Apply the block, as FastBlock.forward does, to tokens that become fewer.

        Args:
            x: Tokens (B, T, D).
            num_queries: Q, the number of first tokens to compute; None for all.
            attn_pos: Position table of the attention, of all original tokens.
            at: The points of this block.

        Returns:
            (B, Q, D) float32, or fewer tokens.
        """
        x, attn_pos = at("resid_pre", x.float()), at.positions(attn_pos)
        y = x if self.post else normalize(x, self.norm1)
        if num_queries is not None and self.absorbed is not None and num_queries < x.shape[1]:
            bias = None if attn_pos is None else attn_pos[:, :, :num_queries]
            y = self.absorbed(y, num_queries, at.bias(bias, torch.float32))
        else:
            q, k, v, bias = self._split_qkv(self.qkv(y), num_queries, attn_pos)
            at.record(q, k, scale=1.0)  # the queries are scaled already
            y = self.sdpa(q, k, v, at.bias(bias, torch.float32))
        if "attn" in self.sub_norms:
            y = normalize(y, self.sub_norms["attn"])
        if self.post:
            x = at("resid_mid", x[:, :num_queries] + normalize(self.out(y), self.norm1))
            return x + normalize(self.down(self.hidden(x)), self.norm2)
        x = at("resid_mid", self.out.add(y, x[:, :num_queries]))
        return self.down.add_(self.hidden(normalize(x, self.norm2)), x)
