"""Write answers as JSON; protocol.py describes their forms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.scores import Task, predict_labels
from vitlib.serve.errors import RequestError
from vitlib.serve.protocol import Params
from vitlib.system.terminal import escape_surrogates

MLFLOW_TOP_K = 5  # labels of an image in the form "mlflow", as MLflow's pipelines give


class Writer:
    """Writes answers as JSON, for one model's labels and task."""

    def __init__(self, labels: Sequence[str], task: Task = "single_label_classification") -> None:
        """Encode what all answers have in common.

        Args:
            labels: The name of each class or output.
            task: The model's task.
        """
        from pydantic_core import to_json

        self._json = partial(to_json, inf_nan_mode="null")
        self.labels, self.task = [escape_surrogates(label) for label in labels], task
        self._key = "values" if task == "regression" else "probs"
        self._all_labels = to_json(self.labels)

    def answer(self, rows: Sequence[Any], params: Params) -> bytes:
        """Write the answer of a request.

        Args:
            rows: Scores (num_classes,) of each image, or its RequestError.
            params: The options of the answer.

        Returns:
            A JSON list with an entry for each image; {"error": ...} for a bad one.
        """
        parts = [
            self._json({"error": row.as_dict()})
            if isinstance(row, RequestError)
            else self._entry(row, params)
            for row in rows
        ]
        return b"[" + b",".join(parts) + b"]"

    def _entry(self, scores: npt.NDArray[np.float32], params: Params) -> bytes:
        """Write the entry of one image."""
        if params.format == "azure-v1" and params.top_k is None and params.threshold is None:
            # The common case: the list of all labels, often thousands, is encoded only once.
            start = b'{"%b":' % self._key.encode()
            return start + self._json(scores.tolist()) + b',"labels":%b}' % self._all_labels
        top_k = params.top_k or (MLFLOW_TOP_K if params.format == "mlflow" else None)
        pairs = predict_labels(scores, self.task, top_k, params.threshold)
        if params.format == "azure-v1":
            numbers, names = [s for _, s in pairs], [self.labels[i] for i, _ in pairs]
            return self._json({self._key: numbers, "labels": names})
        entries = [{"label": self.labels[i], "score": score} for i, score in pairs]
        if params.format == "azure-v2":
            return self._json(entries)
        return self._json({str(i): entry for i, entry in enumerate(entries)})
