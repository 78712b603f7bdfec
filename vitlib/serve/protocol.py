"""What requests say and what answers look like: JSON both ways, no HTTP and no model.

The first form of each is the model card's own. Accepted beside it:

    the card's     {"input_data": {"columns": ["image"], "index": [0, 1], "data": [A, B]}}
                   or data as [[A], [B]]; index may be absent
    its newer one  {"input_data": [A, B]}
    MLflow's       {"dataframe_split": {"columns", "index", "data"}}
                   {"dataframe_records": [{"image": A}, {"image": B}]}
                   {"instances": [A, B]}, or [{"image": A}, {"image": B}]
                   {"inputs": [A, B]}, or {"image": [A, B]}
                   CSV with a column `image`

An image is base64 (also URL-safe, without padding, with line breaks, or as a data: URL) or a URL.
"params" beside them may hold top_k, threshold, format and on_error.

| format | answer, one for each image |
|---|---|
| azure-v1 (default) | {"probs": [...], "labels": [...]}: every class, in the model's order; of a
                       regression "values" in place of "probs" |
| azure-v2 | [{"label", "score"}, ...], best first |
| mlflow | {"0": {"label", "score"}, "1": ...}, best first; the best 5 unless top_k says otherwise |

Of a regression every format has all outputs in the model's order, their numbers as scores; top_k
and threshold are refused.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vitlib.image.base64_text import parse_base64
from vitlib.scores import Task, predict_labels
from vitlib.serve.errors import RequestError
from vitlib.system.atomic import iter_csv_rows
from vitlib.system.terminal import escape_surrogates

Format = Literal["azure-v1", "azure-v2", "mlflow"]
FORMATS = ("azure-v1", "azure-v2", "mlflow")
MLFLOW_TOP_K = 5
MOST_VALUES = 200_000  # commas and brackets of a JSON body, counted before it is parsed
SHOWN = 60  # characters of a client's own text in a message
_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class Params:
    """How an answer is wanted."""

    top_k: int | None = None
    threshold: float | None = None
    format: Format = "azure-v1"
    on_error: Literal["fail", "null"] = "fail"

    @classmethod
    def of(cls, given: Any) -> Params:
        """Raises RequestError for what there is not, or is of another kind."""
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise bad_request("params: expected an object")
        names = [one.name for one in fields(cls)]
        for name in given:
            if name not in names:
                raise bad_request(f"params has no {shown(name)}: expected {', '.join(names)}")
        found = {name: value for name, value in given.items() if value is not None}
        top_k, threshold = found.get("top_k"), found.get("threshold")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise bad_request("params.top_k: expected a whole number, 1 or more")
        if threshold is not None and (
            isinstance(threshold, bool)
            or not isinstance(threshold, int | float)
            or not 0 <= threshold <= 1
        ):
            raise bad_request("params.threshold: expected a number in 0..1")
        if found.get("format", "azure-v1") not in FORMATS:
            raise bad_request(f"params.format: expected one of {', '.join(FORMATS)}")
        if given.get("on_error", "fail") is None:  # JSON's own null says the same
            found["on_error"] = "null"
        if found.get("on_error", "fail") not in ("fail", "null"):
            raise bad_request('params.on_error: expected "fail" or "null"')
        return cls(**found)

    def check(self, task: Task) -> None:
        """Raise RequestError for a choice among classes where the model gives numbers."""
        given = [name for name in ("top_k", "threshold") if getattr(self, name) is not None]
        if task == "regression" and given:
            raise bad_request(
                f"{' and '.join(given)}: this model gives numbers (regression), not classes: leave "
                "it out"
            )

    def over(self, other: Params) -> Params:
        """What is said here before what `other` says."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(other, **{k: v for k, v in mine.items() if v != getattr(Params, k)})


@dataclass(frozen=True)
class InferenceRequest:
    """A request: its images as the client wrote them, and how the answer is wanted."""

    images: tuple[Any, ...]
    params: Params


def bad_request(message: str) -> RequestError:
    """A request that is not understood."""
    return RequestError(400, "bad_request", message)


def shown(text: object) -> str:
    """A client's own words, short and on one line."""
    said = repr(text) if isinstance(text, str) else type(text).__name__
    return said if len(said) <= SHOWN else said[:SHOWN] + "..."


def parse_json(body: bytes) -> Any:
    """JSON -> Python. Raises RequestError for what is none, or would take much more memory."""
    from pydantic_core import from_json

    if body.count(b",") + body.count(b"[") + body.count(b"{") > MOST_VALUES:
        raise RequestError(413, "too_large", f"the JSON holds more than {MOST_VALUES} values")
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise bad_request("the body is text in UTF-16: expected JSON in UTF-8")
    body = body.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as Windows' editors write it
    if not body.strip(_SPACE):
        raise bad_request("the body is empty: expected JSON")
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is no JSON: {error}") from None


def parse_request(body: bytes, content_type: str) -> InferenceRequest:
    """A body -> its images and params, whichever form it has. Raises RequestError."""
    if content_type == "text/csv":
        return InferenceRequest(_of_csv(body), Params())
    given = parse_json(body)
    if not isinstance(given, dict):
        raise bad_request('expected a JSON object with "input_data"')
    forms = {
        "input_data": _of_input, "dataframe_split": _of_split, "dataframe_records": _of_list,
        "instances": _of_list, "inputs": _of_list,
    }  # fmt: skip
    present = [name for name in forms if name in given]
    if len(present) != 1:
        came = " and ".join(present) if present else ", ".join(map(shown, list(given)[:5])) or "{}"
        raise bad_request(f"expected one of {', '.join(forms)} in the JSON object; got {came}")
    strange = [name for name in given if name not in (*forms, "params")]
    if strange:
        raise bad_request(
            f"{shown(strange[0])} is not understood beside {present[0]}: only params is"
        )
    (name,) = present
    images = forms[name](given[name], name)
    if not images:
        raise bad_request(f"{name} holds no image")
    return InferenceRequest(tuple(images), Params.of(given.get("params")))


def _of_input(given: Any, name: str) -> list[Any]:
    return _of_split(given, name) if isinstance(given, dict) else _of_list(given, name)


def _of_split(given: Any, name: str) -> list[Any]:
    """pandas' split form: columns, perhaps an index, and data of one axis or two."""
    if not isinstance(given, dict) or not isinstance(given.get("data"), list):
        raise bad_request(f'{name}: expected {{"columns": ["image"], "data": [...]}}')
    data, columns, index = given["data"], given.get("columns", ["image"]), given.get("index")
    strange = set(given) - {"columns", "index", "data"}
    if strange:
        raise bad_request(
            f"{name}: {shown(min(strange))} is not understood: columns, index and data are"
        )
    if not isinstance(columns, list) or not all(isinstance(c, str) for c in columns):
        raise bad_request(f'{name}.columns: expected ["image"]')
    if index is not None and not (isinstance(index, list) and len(index) == len(data)):
        raise bad_request(f"{name}.index: expected a list as long as data ({len(data)})")
    place = _column(columns, f"{name}.columns")
    found: list[Any] = []
    for number, row in enumerate(data):
        if isinstance(row, list):
            if len(row) != len(columns):
                raise bad_request(
                    f"{name}.data[{number}]: expected {len(columns)} values, one a column"
                )
            row = row[place]
        elif len(columns) != 1:
            raise bad_request(
                f"{name}.data[{number}]: expected a list of {len(columns)}, one a column"
            )
        found.append(row)
    return found


def _column(columns: Sequence[Any], name: str) -> int:
    """Which column holds the images: `image`, or the only one."""
    if columns.count("image") == 1:
        return columns.index("image")
    if len(columns) == 1:
        return 0
    raise bad_request(f'{name}: expected one column "image"')


def _of_list(given: Any, name: str) -> list[Any]:
    """Images, or objects or lists that hold one each; {"image": images}."""
    if isinstance(given, dict):
        place = _column(list(given), name)
        return _of_list(list(given.values())[place], name)
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise bad_request(f"{name}: expected a list of images")
    found: list[Any] = []
    for row in given:
        if isinstance(row, dict) and row:
            row = list(row.values())[_column(list(row), f"{name}[{len(found)}]")]
        elif isinstance(row, list) and len(row) == 1:
            row = row[0]
        found.append(row)
    return found


def _of_csv(body: bytes) -> tuple[str, ...]:
    try:
        text = body.decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text), strict=True)
        # No limit but the text's own length: the body was bounded before.
        rows = [row for row in iter_csv_rows(reader, len(text)) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise bad_request(f"the body is no CSV in UTF-8: {error}") from None
    if not rows:
        raise bad_request("the CSV is empty: expected a line of column names, one of them image")
    place = _column(rows[0], "the CSV's first line")
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(rows[0]):
            raise bad_request(f"row {number} of the CSV: expected {len(rows[0])} values")
    if len(rows) == 1:
        raise bad_request("the CSV holds no image")
    return tuple(row[place] for row in rows[1:])


def is_url(image: Any) -> bool:
    """Whether it names a photo elsewhere. Base64 has no colon, a data: prefix no slashes first."""
    return isinstance(image, str) and "://" in image[:100]


def decode_base64(image: Any) -> bytes:
    """A text as from_base64() reads it -> bytes. Raises RequestError."""
    if not isinstance(image, str):
        raise RequestError(400, "bad_image", f"expected base64 text or a URL, got {_named(image)}")
    try:
        found = parse_base64(image)
    except ValueError as error:
        raise RequestError(400, "bad_image", f"{error}, and no URL") from None
    if not found:
        raise RequestError(400, "bad_image", "empty: expected an image in base64")
    return found


def _named(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


class Writer:
    """Scores -> an answer's bytes, for one model's labels and task."""

    def __init__(self, labels: Sequence[str], task: Task = "single_label_classification") -> None:
        from pydantic_core import to_json

        self._json = partial(to_json, inf_nan_mode="null")
        self.labels, self.task = [escape_surrogates(label) for label in labels], task
        self._key = "values" if task == "regression" else "probs"
        self._all_labels = to_json(self.labels)

    def answer(self, rows: Sequence[Any], params: Params) -> bytes:
        """One entry a row: (num_classes,) scores, or RequestError, which becomes {"error": ...}."""
        parts = [
            self._json({"error": row.as_dict()})
            if isinstance(row, RequestError)
            else self._entry(row, params)
            for row in rows
        ]
        return b"[" + b",".join(parts) + b"]"

    def _entry(self, scores: npt.NDArray[np.float32], params: Params) -> bytes:
        if params.format == "azure-v1" and params.top_k is None and params.threshold is None:
            head = b'{"%b":' % self._key.encode()
            return head + self._json(scores.tolist()) + b',"labels":%b}' % self._all_labels
        top_k = params.top_k or (MLFLOW_TOP_K if params.format == "mlflow" else None)
        pairs = predict_labels(scores, self.task, top_k, params.threshold)
        if params.format == "azure-v1":
            numbers, names = [s for _, s in pairs], [self.labels[i] for i, _ in pairs]
            return self._json({self._key: numbers, "labels": names})
        found = [{"label": self.labels[i], "score": score} for i, score in pairs]
        if params.format == "azure-v2":
            return self._json(found)
        return self._json({str(i): one for i, one in enumerate(found)})
