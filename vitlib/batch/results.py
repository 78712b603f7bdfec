"""Results of a batch of inputs, and their bytes in the journal.

Shapes: n inputs, k labels (all classes without top_k), D embedding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Results:
    """Results of consecutive rows; the numbers of a failed input are 0.

    Attributes:
        first: first row, in the source.
        files: name of each input.
        numbers: position of each input in its file.
        errors: error of each input, or None.
        keys: (n,) hashes of the encoded bytes, equal for duplicates.
        classes: (n, k) class numbers, best first; -1 below the class's threshold. None without
            top_k.
        scores: (n, k) scores of `classes`; of every class in its order where `classes` is None.
        vectors: (n, D) embeddings.
    """

    first: int
    files: list[str]
    numbers: list[int]
    errors: list[str | None]
    keys: npt.NDArray[np.uint64]
    classes: npt.NDArray[np.int32] | None = None
    scores: Floats | None = None
    vectors: Floats | None = None

    def __len__(self) -> int:
        return len(self.files)

    def get_classes(self, i: int) -> npt.NDArray[np.int32]:
        """Select the classes of an input that reach their thresholds.

        Args:
            i: index of the input.

        Returns:
            (k,) class numbers or fewer, best first.
        """
        assert self.classes is not None
        row: npt.NDArray[np.int32] = self.classes[i]
        return row[row >= 0]

    def get_scores(self, i: int) -> Floats:
        """Select the scores of an input.

        Args:
            i: index of the input.

        Returns:
            Scores of its classes as get_classes gives them; of every class without top_k.
        """
        assert self.scores is not None
        row: Floats = self.scores[i]
        return row if self.classes is None else row[self.classes[i] >= 0]

    def pack(self) -> bytes:
        """Convert to bytes, equal for equal results."""
        from safetensors.numpy import save

        arrays: dict[str, npt.NDArray[Any]] = {"keys": self.keys}
        for name in ("classes", "scores", "vectors"):
            if (array := getattr(self, name)) is not None:
                arrays[name] = np.ascontiguousarray(array)
        # The key "said" is part of the journal's format.
        header = json.dumps([self.first, self.files, self.numbers, self.errors])
        return save(arrays, {"said": header})

    @classmethod
    def unpack(cls, data: bytes) -> Results:
        """Convert bytes of `pack` back.

        Args:
            data: the bytes.

        Returns:
            The results.
        """
        from safetensors.numpy import load

        arrays = load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])["__metadata__"]["said"]
        first, files, numbers, errors = json.loads(header)
        fields: dict[str, Any] = dict(arrays)
        return cls(first, files, numbers, errors, **fields)
