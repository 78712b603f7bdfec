"""Plan of a run: the number of inputs, and digests of their names, sizes and times by block.

All inputs are listed once before any is computed. The digests show a run that its inputs changed
meanwhile, and a resumed run that they are not those of the first one. They take 8 bytes of memory
for each block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vitlib.batch.inputs.items import Item
from vitlib.batch.inputs.source import Source
from vitlib.errors import BatchError
from vitlib.system.atomic import open_atomic
from vitlib.system.progress import progress_bar

BLOCK = 256  # inputs of a digest
DIGEST = 8  # bytes
MANY_SHARDS = 4096  # with more inputs the shards grow, so that a folder does not hold millions
SHARD = 1024  # inputs


@dataclass(frozen=True)
class InputPlan:
    """Number and digests of the inputs of a run.

    Attributes:
        inputs: number of inputs.
        digests: digests of the blocks, 8 bytes each.
        ignored: number of files that are not inputs.
    """

    inputs: int
    digests: bytes
    ignored: int = 0

    @property
    def digest(self) -> str:
        """Digest of all inputs, 32 hexadecimal digits."""
        return hashlib.blake2b(self.digests, digest_size=16).hexdigest()

    def write(self, path: Path) -> None:
        """Write the plan as JSON.

        Args:
            path: the file.
        """
        fields = {"inputs": self.inputs, "ignored": self.ignored, "digests": self.digests.hex()}
        with open_atomic(path) as file:
            file.write(json.dumps(fields).encode())

    @classmethod
    def read(cls, path: Path) -> InputPlan:
        """Read a plan that `write` wrote.

        Args:
            path: the file.

        Returns:
            The plan.
        """
        fields = json.loads(path.read_bytes())
        return cls(fields["inputs"], bytes.fromhex(fields["digests"]), fields["ignored"])

    def block(self, number: int) -> bytes:
        """Return the digest of a block.

        Args:
            number: of the block, from 0.
        """
        return self.digests[number * DIGEST : (number + 1) * DIGEST]

    def check_same(self, earlier: InputPlan, out: Path) -> None:
        """Check that the inputs are those of an earlier plan.

        Args:
            earlier: plan of the run in `out`.
            out: folder of the run.

        Raises:
            BatchError: where they differ.
        """
        if (self.inputs, self.digests) == (earlier.inputs, earlier.digests):
            return
        blocks = range(len(earlier.digests) // DIGEST)
        first = next((i for i in blocks if self.block(i) != earlier.block(i)), len(blocks))
        raise BatchError(
            f"{out}: the inputs are not those that its run began with ({earlier.inputs}, now "
            f"{self.inputs}; {_describe_rows(first, max(self.inputs, earlier.inputs))}: a file was "
            "added, removed or written to, or the source is spelled otherwise): restore them with "
            "their times, or name another --out"
        )


def make_plan(source: Source, ignored: Path, *, progress: bool) -> InputPlan:
    """List all inputs of a source.

    Args:
        source: the source.
        ignored: file to write the names of files that are not inputs to.
        progress: show a progress bar on stderr.

    Returns:
        The plan.

    Raises:
        BatchError: for a source without inputs.
        SourceError: as Source.iter_items does.
    """
    digests = bytearray()
    count_ignored = 0
    with open_atomic(ignored) as file:

        def ignore(path: str) -> None:
            nonlocal count_ignored
            count_ignored += 1
            file.write(path.encode("utf-8", "backslashreplace") + b"\n")

        with progress_bar(None, progress, "input") as advance:
            count = 0
            for block in _iter_blocks(source.iter_items(_never, ignore)):
                digests += _digest(block)
                count += len(block)
                advance(len(block))
    if not count:
        names = " ".join(source.names)
        raise BatchError(
            f"{names[:200]}: no images in it ({count_ignored} other files): expected image "
            "files, or a "
            "list with a row for each"
        )
    return InputPlan(count, bytes(digests), count_ignored)


def iter_planned(
    source: Source, plan: InputPlan, is_needed: Callable[[int], bool]
) -> Iterator[Item]:
    """Yield the needed items, each block after its comparison with the plan.

    Args:
        source: the source.
        plan: the plan of this source.
        is_needed: function of a row, True if it will be computed.

    Yields:
        The items.

    Raises:
        BatchError: where the inputs changed since the plan.
    """
    count = 0
    for number, block in enumerate(_iter_blocks(source.iter_items(is_needed, _ignore))):
        count += len(block)
        if _digest(block) != plan.block(number) or count > plan.inputs:
            raise BatchError(
                f"the inputs changed during the run, {_describe_rows(number, plan.inputs)}: "
                "restore "
                "them and run it again, or name another --out"
            )
        yield from (item for item in block if is_needed(item.row))
    if count < plan.inputs:
        raise BatchError(
            f"{count} inputs in place of {plan.inputs}: some were removed during the run: restore "
            "them and run it again, or name another --out"
        )


@dataclass(frozen=True)
class Shards:
    """Division of the inputs into shards: shard k begins at row k * size.

    Attributes:
        inputs: number of inputs.
        size: inputs of a shard.
    """

    inputs: int
    size: int

    @classmethod
    def default(cls, inputs: int) -> Shards:
        """Choose a size of shards.

        Args:
            inputs: number of inputs.

        Returns:
            Shards of 1,024 inputs, or larger ones so that there are at most 4,096.
        """
        return cls(inputs, SHARD * -(-inputs // (SHARD * MANY_SHARDS)))

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.inputs // self.size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard, and the row after its last.

        Args:
            shard: number of the shard, from 0.
        """
        return shard * self.size, min((shard + 1) * self.size, self.inputs)

    def name(self, shard: int) -> str:
        """Name a shard part-00000 and so on; the names of a run have one length.

        Args:
            shard: number of the shard, from 0.
        """
        return f"part-{shard:0{max(5, len(str(self.count - 1)))}d}"


def _iter_blocks(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Divide items into blocks."""
    iterator = iter(items)
    while block := list(islice(iterator, BLOCK)):
        yield block


def _digest(block: list[Item]) -> bytes:
    """Hash the names and fingerprints of a block."""
    hasher = hashlib.blake2b(digest_size=DIGEST)
    for item in block:
        line = f"{item.file}\0{item.number}\0{item.ref.fingerprint()}\n"
        try:
            hasher.update(line.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:  # JSON can hold surrogates that stand for no byte of a name
            hasher.update(line.encode("utf-8", "surrogatepass"))
    return hasher.digest()


def _describe_rows(block: int, inputs: int) -> str:
    """Describe the rows of a block for a message."""
    return f"among rows {block * BLOCK} to {min((block + 1) * BLOCK, inputs) - 1}"


def _never(row: int) -> bool:  # noqa: ARG001
    """Need no bytes."""
    return False


def _ignore(path: str) -> None:
    """Drop the names of files that are not inputs, which the plan has counted."""
