"""The plan: all inputs are gone through once before any is computed: counted, and remembered block
by block as a digest of their names, sizes and times. By it a run knows whether what it reads is
what was planned, and a later run whether it is what the run began with.

What is in memory is 8 bytes for each block, whatever the inputs are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vitlib.batch.inputs.items import Item
from vitlib.batch.inputs.source import Source
from vitlib.errors import BatchError
from vitlib.system.atomic import open_atomic
from vitlib.system.progress import progress_bar

BLOCK = 256  # inputs that are compared, and held, at a time
DIGEST = 8  # bytes
MANY_SHARDS = 4096  # with more inputs the shards grow, so that a folder does not hold millions
SHARD = 1024  # inputs


@dataclass(frozen=True)
class Plan:
    """How many inputs there are, and what they are."""

    inputs: int
    digests: bytes  # of the blocks
    ignored: int = 0  # files that are no inputs

    @property
    def digest(self) -> str:
        """Of all inputs."""
        return hashlib.blake2b(self.digests, digest_size=16).hexdigest()

    def write(self, path: Path) -> None:
        """As JSON."""
        said = {"inputs": self.inputs, "ignored": self.ignored, "digests": self.digests.hex()}
        with open_atomic(path) as file:
            file.write(json.dumps(said).encode())

    @classmethod
    def read(cls, path: Path) -> Plan:
        """What write() wrote."""
        said = json.loads(path.read_bytes())
        return cls(said["inputs"], bytes.fromhex(said["digests"]), said["ignored"])

    def block(self, number: int) -> bytes:
        """The digest of a block."""
        return self.digests[number * DIGEST : (number + 1) * DIGEST]

    def check_same(self, begun: Plan, out: Path) -> None:
        """Raises BatchError where these are not the inputs that the run in `out` began with."""
        if (self.inputs, self.digests) == (begun.inputs, begun.digests):
            return
        blocks = range(len(begun.digests) // DIGEST)
        first = next((i for i in blocks if self.block(i) != begun.block(i)), len(blocks))
        raise BatchError(
            f"{out}: the inputs are not those that its run began with ({begun.inputs}, now "
            f"{self.inputs}; {_rows(first, max(self.inputs, begun.inputs))}: a file came, went, "
            "was written to, or the source is spelled otherwise): put them back with their times, "
            "or name another --out"
        )


def plan_of(source: Source, ignored: Path, *, progress: bool) -> Plan:
    """Go through all inputs. ignored: where the files that are no inputs are named.

    Raises BatchError where there is no input, and what Source.items raises.
    """
    digests = bytearray()
    others = 0
    with open_atomic(ignored) as told:

        def ignore(path: str) -> None:
            nonlocal others
            others += 1
            told.write(path.encode("utf-8", "backslashreplace") + b"\n")

        with progress_bar(None, progress, "input") as advance:
            count = 0
            for block in _blocks(source.items(_none, ignore)):
                digests += _digest(block)
                count += len(block)
                advance(len(block))
    if not count:
        names = " ".join(source.names)
        raise BatchError(
            f"{names[:200]}: no images in it ({others} other files): expected image files, or a "
            "list with a row for each"
        )
    return Plan(count, bytes(digests), others)


def planned(source: Source, plan: Plan, needed: Callable[[int], bool]) -> Iterator[Item]:
    """The items again, those that are needed, each after its block was compared with the plan.

    Raises BatchError where they changed.
    """
    count = 0
    for number, block in enumerate(_blocks(source.items(needed, _nothing))):
        count += len(block)
        if _digest(block) != plan.block(number) or count > plan.inputs:
            raise BatchError(
                f"the inputs changed while the run was at work, {_rows(number, plan.inputs)}: put "
                "them back as they were and run it again, or name another --out"
            )
        yield from (item for item in block if needed(item.row))
    if count < plan.inputs:
        raise BatchError(
            f"{count} inputs in place of {plan.inputs}: some went while the run was at work: put "
            "them back and run it again, or name another --out"
        )


@dataclass(frozen=True)
class Shards:
    """How the inputs are divided: shard k is rows k * size and the next ones."""

    inputs: int
    size: int

    @classmethod
    def default(cls, inputs: int) -> Shards:
        """What suits a number of inputs."""
        return cls(inputs, SHARD * -(-inputs // (SHARD * MANY_SHARDS)))

    @property
    def count(self) -> int:
        """Their number."""
        return -(-self.inputs // self.size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The rows of a shard: from, and up to without."""
        return shard * self.size, min((shard + 1) * self.size, self.inputs)

    def name(self, shard: int) -> str:
        """part-00000 and so on; all of one length, so that their names are in order."""
        return f"part-{shard:0{max(5, len(str(self.count - 1)))}d}"


def _blocks(items: Iterator[Item]) -> Iterator[list[Item]]:
    held: list[Item] = []
    for item in items:
        held.append(item)
        if len(held) == BLOCK:
            yield held
            held = []
    if held:
        yield held


def _digest(block: list[Item]) -> bytes:
    whole = hashlib.blake2b(digest_size=DIGEST)
    for item in block:
        told = f"{item.file}\0{item.number}\0{item.place.stamp()}\n"
        try:
            whole.update(told.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:  # JSON can hold surrogates that stand for no byte of a name
            whole.update(told.encode("utf-8", "surrogatepass"))
    return whole.digest()


def _rows(block: int, inputs: int) -> str:
    return f"among rows {block * BLOCK} to {min((block + 1) * BLOCK, inputs) - 1}"


def _none(row: int) -> bool:  # noqa: ARG001
    return False


def _nothing(path: str) -> None:
    pass
