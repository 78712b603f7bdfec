"""The tokens of one forward that become fewer from block to block.

How data flows: a block attends; a token function takes the tokens after attention and gives fewer,
with a map that says which old token is in which new one; the MLP and later blocks compute the new
ones. Three facts of each token follow from the map: how many patches it stands for (the attention
of later blocks counts a key as often, 2210.09461), where each original token is, and which
position it has. Shapes: as in vitlib/vit.py; T tokens before a reduction, U after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.points.forward import Edit, Points


@dataclass(frozen=True)
class BlockTokens:
    """Facts of the tokens that a token function takes.

    Attributes:
        index: Number of the block, from 0.
        depth: Number of blocks of the model.
        num_prefix_tokens: Number of class, distillation and register tokens, which stay.
        queries: Queries of the block's attention, (B, H, T, K), with their norms and rotation.
        keys: Keys, (B, H, T, K), likewise.
        scale: Factor of the products of queries and keys in the scores.
        sizes: Number of original tokens in each token, (B, T).
    """

    index: int
    depth: int
    num_prefix_tokens: int
    queries: Tensor
    keys: Tensor
    scale: float
    sizes: Tensor


# (tokens (B, T, D), facts) -> fewer tokens (B, U, D), and a map (B, T): the new index of each old
# token, or -1 for one that is dropped.
TokenFunction = Callable[[Tensor, BlockTokens], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TokenState:
    """Facts of the tokens between two blocks.

    Attributes:
        sizes: Number of original tokens in each token, (B, T).
        maps: The map of each reduction so far.
        positions: The original token whose position each token has, (B, T).
        total: Number of original tokens.
    """

    sizes: Tensor
    maps: tuple[Tensor, ...]
    positions: Tensor
    total: int

    @classmethod
    def begin(cls, tokens: Tensor) -> TokenState:
        """Make the state before the first block.

        Args:
            tokens: (B, T, D).
        """
        index = number_tokens(tokens)
        return cls(torch.ones_like(index), (), index, tokens.shape[1])

    def reduce(self, new_index: Tensor, count: int) -> TokenState:
        """Compute the state after a reduction.

        Args:
            new_index: The map, (B, T) int64.
            count: Number of new tokens, U.

        Returns:
            The state of the new tokens. A merged token has the position of the first of its tokens.
        """
        # Dropped tokens go to one more column, which is cut off.
        column = torch.where(new_index < 0, count, new_index)
        batch = len(column)
        sizes = self.sizes.new_zeros(batch, count + 1).scatter_add(1, column, self.sizes)
        positions = self.positions.new_full((batch, count + 1), self.total)
        positions = positions.scatter_reduce(1, column, self.positions, "amin")
        maps = (*self.maps, new_index)
        return TokenState(sizes[:, :count], maps, positions[:, :count], self.total)

    @property
    def has_fewer_tokens(self) -> bool:
        """True after a reduction."""
        return self.sizes.shape[1] < self.total

    def source(self) -> Tensor:
        """Find the token that each original token is in, (B, total); -1 where it was dropped."""
        if not self.maps:
            return self.positions
        source = self.maps[0]
        for new_index in self.maps[1:]:
            moved = new_index.gather(1, source.clamp(min=0))
            source = torch.where(source < 0, -1, moved)
        return source


def number_tokens(tokens: Tensor) -> Tensor:
    """Number the tokens of each image, (B, T, ...) -> (B, T) int64.

    Args:
        tokens: Tokens, or a map of them.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.int64)
    return index.expand(tokens.shape[:2])


class Shared:
    """Tensors that the views of one forward's points share.

    Attributes:
        state: Facts of the tokens now; None before the first block.
        queries: Queries of the block that runs, (B, H, T, K).
        keys: Its keys, (B, H, T, K).
        scale: Factor of their products in the scores.
    """

    state: TokenState | None = None
    queries: Tensor
    keys: Tensor
    scale: float


class ReductionPoints(Points):
    """Points of a forward whose tokens become fewer after the attention of a block.

    Args:
        read: As in Points.
        edits: As in Points.
        functions: Token functions of each block.
        num_prefix_tokens: Number of tokens that stay.
        prefix: As in Points.
        shared: Tensors that the views of one forward share; None begins a forward.
    """

    def __init__(
        self,
        read: Iterable[str],
        edits: Mapping[str, Edit],
        functions: tuple[tuple[TokenFunction, ...], ...],
        num_prefix_tokens: int,
        prefix: str = "",
        shared: Shared | None = None,
    ) -> None:
        super().__init__(read, edits, prefix)
        self.functions, self.num_prefix_tokens = functions, num_prefix_tokens
        self.shared = Shared() if shared is None else shared
        self.index = int(prefix.split(".")[1]) if prefix else -1

    def within(self, prefix: str) -> ReductionPoints:
        """Return a view for the points of a block.

        Args:
            prefix: Prefix of its points, "blocks.N.".

        Returns:
            Points that share the tensors read and the state of the tokens.
        """
        view = ReductionPoints(
            self.read, self.edits, self.functions, self.num_prefix_tokens, prefix, self.shared
        )
        view.values = self.values
        return view

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Edit and read a tensor; reduce the tokens after attention.

        Args:
            name: Name of the point, without the prefix.
            x: Its tensor.

        Returns:
            The tensor that the forward goes on with.

        Raises:
            ConfigError: An edit or a token function returned what cannot be.
        """
        shared = self.shared
        if name == "resid_pre" and shared.state is None:
            shared.state = TokenState.begin(x)
        state = shared.state
        # Where the head reads class tokens, the last block computes them alone.
        if name == "resid_mid" and state is not None and x.shape[1] == state.sizes.shape[1]:
            x = self.reduce(x, state)
        x = super().__call__(name, x)
        if name == "attn.q":
            self.record(x, x, x.shape[-1] ** -0.5)
        elif name == "attn.k":
            shared.keys = x
        return x

    def record(self, queries: Tensor, keys: Tensor, scale: float) -> None:
        """Keep the queries and keys of a block for its token functions.

        Args:
            queries: (B, H, T, K).
            keys: (B, H, T, K).
            scale: Factor of their products in the scores.
        """
        shared = self.shared
        shared.queries, shared.keys, shared.scale = queries, keys, scale

    def reduce(self, x: Tensor, state: TokenState) -> Tensor:
        """Apply the token functions of this block.

        Args:
            x: Tokens after attention, (B, T, D).
            state: Facts of them.

        Returns:
            Fewer tokens, (B, U, D).
        """
        queries, keys = self.shared.queries, self.shared.keys
        functions = self.functions[self.index]
        for number, function in enumerate(functions, 1):
            facts = BlockTokens(
                index=self.index,
                depth=len(self.functions),
                num_prefix_tokens=self.num_prefix_tokens,
                queries=queries,
                keys=keys,
                scale=self.shared.scale,
                sizes=state.sizes,
            )
            new_index, x = call_function(function, x, facts)
            state = state.reduce(new_index, x.shape[1])
            if number < len(functions):  # which sees the key of the first of merged tokens
                rows = first_tokens(new_index, x.shape[1])
                queries, keys = gather_rows(queries, rows), gather_rows(keys, rows)
        self.shared.state = state
        return x

    def current_state(self, tokens: Tensor) -> TokenState:
        """Return the facts of the tokens now.

        Args:
            tokens: The tokens, (B, T, D).
        """
        return TokenState.begin(tokens) if self.shared.state is None else self.shared.state

    def positions(self, attn_pos: Tensor | None) -> Tensor | None:
        """Select the positions of the tokens that are left.

        Args:
            attn_pos: Positions of all tokens, as `ViT.attn_positions` gives them.

        Returns:
            A rotary table (2, B, 1 or H, N, K), or a bias (B, H, T, T), of each image.
        """
        state = self.shared.state
        if attn_pos is None or state is None or not state.has_fewer_tokens:
            return attn_pos
        return select_positions(attn_pos, state)

    def bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Add the logarithm of each key's size, so that it counts as often (2210.09461, eq. 1).

        Args:
            bias: Bias of the scores, (1 or B, H, Q, T), or None.
            dtype: Dtype of the queries.

        Returns:
            The bias, (B, 1 or H, 1 or Q, T); None before the first reduction.
        """
        state = self.shared.state
        if state is None or not state.has_fewer_tokens:
            return bias
        sizes = state.sizes[:, None, None, :].to(dtype).log()
        return sizes if bias is None else bias + sizes


def first_tokens(new_index: Tensor, count: int) -> Tensor:
    """Find the first old token in each new one.

    Args:
        new_index: The map, (B, T).
        count: Number of new tokens, U.

    Returns:
        Indices of old tokens, (B, U).
    """
    batch, length = new_index.shape
    column, index = torch.where(new_index < 0, count, new_index), number_tokens(new_index)
    rows = index.new_full((batch, count + 1), length).scatter_reduce(1, column, index, "amin")
    return rows[:, :count]


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Gather tokens of each image, (B, H, T, K) -> (B, H, U, K).

    Args:
        x: Queries or keys, (B, H, T, K).
        rows: Indices of tokens, (B, U).
    """
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def select_positions(attn_pos: Tensor, state: TokenState) -> Tensor:
    """Select the positions of the tokens that are left.

    Args:
        attn_pos: A rotary table (2, N, K) or (2, H, N, K), or a bias (1, H, T, T).
        state: Facts of the tokens.

    Returns:
        The table (2, B, 1 or H, N, K), or the bias (B, H, T, T), of each image.
    """
    rows, total = state.positions, state.total
    if attn_pos.shape[0] == 1 and attn_pos.shape[-1] == total:
        return attn_pos[0][:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)
    table = attn_pos if attn_pos.dim() == 4 else attn_pos[:, None]
    first = total - table.shape[2]  # tokens before it are not rotated
    return table[:, :, rows[:, first:] - first].transpose(1, 2)


def call_function(function: TokenFunction, x: Tensor, facts: BlockTokens) -> tuple[Tensor, Tensor]:
    """Call a token function, and check what it returns.

    Args:
        function: The function.
        x: The tokens that it took, (B, T, D).
        facts: Facts of them.

    Returns:
        The map (B, T) int64, and the new tokens (B, U, D).

    Raises:
        ConfigError: It is no pair of tokens and a map, or the shapes or indices do not fit.
    """
    name, result = f"token function of block {facts.index}", function(x, facts)
    if type(function).__module__ == "vitlib.tokens.functions":
        return result[1], result[0]
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ConfigError(f"{name} returned {type(result).__name__}: expected (tokens, map)")
    tokens, new_index = result
    if not (isinstance(tokens, Tensor) and isinstance(new_index, Tensor)):
        raise ConfigError(f"{name}: expected tensors (tokens, map)")
    (b, t, d), p = x.shape, facts.num_prefix_tokens
    fits = tokens.dim() == 3 and (tokens.shape[0], tokens.shape[2]) == (b, d)
    if not fits or tokens.dtype != x.dtype or not p <= tokens.shape[1] <= t:
        raise ConfigError(
            f"{name} returned tokens {tuple(tokens.shape)} {tokens.dtype}: expected "
            f"({b}, {p} to {t}, {d}) {x.dtype}"
        )
    if new_index.shape != (b, t) or new_index.dtype != torch.int64:
        raise ConfigError(
            f"{name} returned a map {tuple(new_index.shape)} {new_index.dtype}: expected "
            f"({b}, {t}) torch.int64"
        )
    if not torch.compiler.is_compiling():
        check_map(new_index, tokens.shape[1], facts)
    return new_index, tokens


def check_map(new_index: Tensor, count: int, facts: BlockTokens) -> None:
    """Check the indices of a map, which a compiled forward does not.

    Args:
        new_index: The map, (B, T).
        count: Number of new tokens, U.
        facts: Facts of the old ones.

    Raises:
        ConfigError: An index is out of range, a new token has no old one, or a prefix token moved.
    """
    name, p = f"token function of block {facts.index}", facts.num_prefix_tokens
    if new_index.numel() and (int(new_index.min()) < -1 or int(new_index.max()) >= count):
        raise ConfigError(f"{name}: expected a map with numbers from -1 to {count - 1}")
    if not torch.equal(new_index[:, :p], number_tokens(new_index)[:, :p]):
        raise ConfigError(f"{name}: expected the {p} prefix tokens to stay the first ones")
    column = torch.where(new_index < 0, count, new_index)
    filled = new_index.new_zeros(len(new_index), count + 1).scatter(1, column, 1)
    if not bool(filled[:, :count].all()):
        raise ConfigError(f"{name}: expected an old token in the map for each new one")
