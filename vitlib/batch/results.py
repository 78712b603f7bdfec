"""Answer: what was found for the inputs of a batch; as bytes, for the journal.

Shapes: n inputs, k labels (all classes where none are chosen), D embedding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """Rows first, first + 1 ... of the source. Where an input failed, `errors` says why and its
    numbers are 0."""

    first: int
    files: list[str]
    numbers: list[int]
    errors: list[str | None]
    keys: npt.NDArray[np.uint64]  # (n,) of the encoded bytes; equal ones are copies
    classes: npt.NDArray[np.int32] | None = None  # (n, k), best first; -1: below its threshold
    scores: Floats | None = None  # (n, k); of every class in its order where classes is None
    vectors: Floats | None = None  # (n, D)

    def __len__(self) -> int:
        return len(self.files)

    def classes_of(self, i: int) -> npt.NDArray[np.int32]:
        """The labels of row i, best first: those that reach their thresholds, (k,) or fewer."""
        assert self.classes is not None
        row: npt.NDArray[np.int32] = self.classes[i]
        return row[row >= 0]

    def scores_of(self, i: int) -> Floats:
        """The scores of row i: of its labels, or of every class where none are chosen."""
        assert self.scores is not None
        row: Floats = self.scores[i]
        return row if self.classes is None else row[self.classes[i] >= 0]

    def pack(self) -> bytes:
        """As bytes, the same for the same answer."""
        from safetensors.numpy import save

        arrays: dict[str, npt.NDArray[Any]] = {"keys": self.keys}
        for name in ("classes", "scores", "vectors"):
            if (array := getattr(self, name)) is not None:
                arrays[name] = np.ascontiguousarray(array)
        said = json.dumps([self.first, self.files, self.numbers, self.errors])
        return save(arrays, {"said": said})

    @classmethod
    def unpack(cls, data: bytes) -> Answer:
        """What pack() gave."""
        from safetensors.numpy import load

        arrays = load(data)
        size = int.from_bytes(data[:8], "little")
        said = json.loads(data[8 : 8 + size])["__metadata__"]["said"]
        first, files, numbers, errors = json.loads(said)
        held: dict[str, Any] = dict(arrays)
        return cls(first, files, numbers, errors, **held)
