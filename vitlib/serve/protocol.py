"""The JSON of requests, and the forms of answers; without HTTP and without the model.

The default form is that of google-vit-base-patch16-224's model card in Azure Machine Learning.
Accepted forms of a request:

    azure-v1       {"input_data": {"columns": ["image"], "index": [0, 1], "data": [A, B]}}
                   or data as [[A], [B]]; index is optional
    azure-v2       {"input_data": [A, B]}
    MLflow         {"dataframe_split": {"columns", "index", "data"}}
                   {"dataframe_records": [{"image": A}, {"image": B}]}
                   {"instances": [A, B]}, or [{"image": A}, {"image": B}]
                   {"inputs": [A, B]}, or {"image": [A, B]}
                   CSV with a column `image`

An image is base64 (also URL-safe, without padding, with line breaks, or as a data: URL) or a URL.
The key "params" beside them can have top_k, threshold, format and on_error.

| format | answer for each image |
|---|---|
| azure-v1 (default) | {"probs": [...], "labels": [...]}: every class in the model's order; for a
                       regression "values" in place of "probs" |
| azure-v2 | [{"label", "score"}, ...], best first |
| mlflow | {"0": {"label", "score"}, "1": ...}, best first; top_k is 5 by default |

For a regression every format has all outputs in the model's order, with their numbers as scores;
top_k and threshold are refused.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vitlib.image.base64_text import parse_base64
from vitlib.scores import Task
from vitlib.serve.errors import RequestError, bad_request
from vitlib.system.csv_rows import iter_csv_rows

Format = Literal["azure-v1", "azure-v2", "mlflow"]
FORMATS = ("azure-v1", "azure-v2", "mlflow")
MAX_VALUES = 200_000  # commas and brackets of a JSON body, counted before it is parsed
MAX_QUOTED = 60  # characters of a client's own text in a message
_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class Params:
    """Options of an answer.

    Attributes:
        top_k: The largest number of labels; None is every class (5 for mlflow and /classify).
        threshold: The lowest score of a label, 0..1; None sets no limit.
        format: The form of the answer.
        on_error: "fail" refuses a request with a bad image; "null" puts the error in its place.
    """

    top_k: int | None = None
    threshold: float | None = None
    format: Format = "azure-v1"
    on_error: Literal["fail", "null"] = "fail"

    @classmethod
    def parse(cls, value: Any) -> Params:
        """Parse the value of "params", or the query of a URL.

        Args:
            value: A mapping of names to values; None is an empty one.

        Returns:
            The options; those that are absent or None have their defaults.

        Raises:
            RequestError: A name is unknown, or a value is of another type or out of range.
        """
        if value is None:
            return cls()
        if not isinstance(value, Mapping):
            raise bad_request("params: expected an object")
        names = [field.name for field in fields(cls)]
        for name in value:
            if name not in names:
                raise bad_request(f"params has no {quote(name)}: expected {', '.join(names)}")
        options = {name: option for name, option in value.items() if option is not None}
        top_k, threshold = options.get("top_k"), options.get("threshold")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise bad_request("params.top_k: expected a whole number, 1 or more")
        if threshold is not None and (
            isinstance(threshold, bool)
            or not isinstance(threshold, int | float)
            or not 0 <= threshold <= 1
        ):
            raise bad_request("params.threshold: expected a number in 0..1")
        if options.get("format", "azure-v1") not in FORMATS:
            raise bad_request(f"params.format: expected one of {', '.join(FORMATS)}")
        if value.get("on_error", "fail") is None:  # JSON's null has the same meaning
            options["on_error"] = "null"
        if options.get("on_error", "fail") not in ("fail", "null"):
            raise bad_request('params.on_error: expected "fail" or "null"')
        return cls(**options)

    def check(self, task: Task) -> None:
        """Check that options of classes are not used with a regression.

        Args:
            task: The model's task.

        Raises:
            RequestError: top_k or threshold is set, and the model is a regression.
        """
        names = [name for name in ("top_k", "threshold") if getattr(self, name) is not None]
        if task == "regression" and names:
            raise bad_request(
                f"{' and '.join(names)}: this model gives numbers (regression), not classes: leave "
                "it out"
            )

    def merge(self, defaults: Params) -> Params:
        """Return these options, with other values in place of those that have their defaults.

        Args:
            defaults: The other options.

        Returns:
            The merged options.
        """
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: value for name, value in own.items() if value != getattr(Params, name)}
        return replace(defaults, **changed)


@dataclass(frozen=True)
class InferenceRequest:
    """A parsed request.

    Attributes:
        images: The images as the client wrote them: base64 text, URLs, or anything else.
        params: Options of the answer.
    """

    images: tuple[Any, ...]
    params: Params


def quote(text: object) -> str:
    """Return a client's text for a message, on one line and of bounded length.

    Args:
        text: Any value of a request.

    Returns:
        A quoted string; for other types the name of the type.
    """
    quoted = repr(text) if isinstance(text, str) else type(text).__name__
    return quoted if len(quoted) <= MAX_QUOTED else quoted[:MAX_QUOTED] + "..."


def parse_json(body: bytes) -> Any:
    """Parse JSON of bounded size.

    Args:
        body: JSON in UTF-8, with or without a byte order mark.

    Returns:
        The value.

    Raises:
        RequestError: The body is not JSON, or has more than MAX_VALUES values.
    """
    from pydantic_core import from_json

    # Python objects take many times the memory of their text: "[" is 1 byte, a list 56.
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise RequestError(413, "too_large", f"the JSON has more than {MAX_VALUES} values")
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise bad_request("the body is text in UTF-16: expected JSON in UTF-8")
    # The byte order mark of editors on Windows.
    body = body.removeprefix(b"\xef\xbb\xbf")
    if not body.strip(_SPACE):
        raise bad_request("the body is empty: expected JSON")
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from None


def parse_request(body: bytes, content_type: str) -> InferenceRequest:
    """Parse a request in any of the accepted forms.

    Args:
        body: JSON or CSV.
        content_type: "text/csv" for CSV, anything else for JSON.

    Returns:
        Images and options.

    Raises:
        RequestError: The body has none of the accepted forms.
    """
    if content_type == "text/csv":
        return InferenceRequest(_parse_csv(body), Params())
    value = parse_json(body)
    if not isinstance(value, dict):
        raise bad_request('expected a JSON object with "input_data"')
    forms = {
        "input_data": _parse_input_data, "dataframe_split": _parse_split,
        "dataframe_records": _parse_list, "instances": _parse_list, "inputs": _parse_list,
    }  # fmt: skip
    present = [name for name in forms if name in value]
    if len(present) != 1:
        keys = " and ".join(present) if present else ", ".join(map(quote, list(value)[:5])) or "{}"
        raise bad_request(f"expected one of {', '.join(forms)} in the JSON object; got {keys}")
    unknown = [name for name in value if name not in (*forms, "params")]
    if unknown:
        raise bad_request(
            f"{quote(unknown[0])} is not understood beside {present[0]}: expected only params"
        )
    (name,) = present
    images = forms[name](value[name], name)
    if not images:
        raise bad_request(f"{name} has no images: expected one or more")
    return InferenceRequest(tuple(images), Params.parse(value.get("params")))


def _parse_input_data(value: Any, name: str) -> list[Any]:
    """Return the images of Azure's two forms: an object as pandas splits it, or a list."""
    return _parse_split(value, name) if isinstance(value, dict) else _parse_list(value, name)


def _parse_split(value: Any, name: str) -> list[Any]:
    """Return the images of pandas' split form: columns, an optional index, data of 1 or 2 axes."""
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise bad_request(f'{name}: expected {{"columns": ["image"], "data": [...]}}')
    data, columns, index = value["data"], value.get("columns", ["image"]), value.get("index")
    unknown = set(value) - {"columns", "index", "data"}
    if unknown:
        raise bad_request(
            f"{name}: {quote(min(unknown))} is not understood: expected columns, index and data"
        )
    if not isinstance(columns, list) or not all(isinstance(c, str) for c in columns):
        raise bad_request(f'{name}.columns: expected ["image"]')
    if index is not None and not (isinstance(index, list) and len(index) == len(data)):
        raise bad_request(f"{name}.index: expected a list as long as data ({len(data)})")
    column = _image_column(columns, f"{name}.columns")
    images: list[Any] = []
    for number, row in enumerate(data):
        if isinstance(row, list):
            if len(row) != len(columns):
                raise bad_request(
                    f"{name}.data[{number}]: expected {len(columns)} values, one a column"
                )
            row = row[column]
        elif len(columns) != 1:
            raise bad_request(
                f"{name}.data[{number}]: expected a list of {len(columns)}, one a column"
            )
        images.append(row)
    return images


def _image_column(columns: Sequence[Any], name: str) -> int:
    """Return the index of the column "image", or of the only column."""
    if columns.count("image") == 1:
        return columns.index("image")
    if len(columns) == 1:
        return 0
    raise bad_request(f'{name}: expected one column "image"')


def _parse_list(value: Any, name: str) -> list[Any]:
    """Return the images of a list of images, of objects or of lists with one; {"image": list}."""
    if isinstance(value, dict):
        column = _image_column(list(value), name)
        return _parse_list(list(value.values())[column], name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise bad_request(f"{name}: expected a list of images")
    images: list[Any] = []
    for row in value:
        if isinstance(row, dict) and row:
            row = list(row.values())[_image_column(list(row), f"{name}[{len(images)}]")]
        elif isinstance(row, list) and len(row) == 1:
            row = row[0]
        images.append(row)
    return images


def _parse_csv(body: bytes) -> tuple[str, ...]:
    """Return the column "image" of a CSV."""
    try:
        text = body.decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text), strict=True)
        # The length of a field is limited only by the text's own, which is bounded by now.
        rows = [row for row in iter_csv_rows(reader, len(text)) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise bad_request(f"the body is not CSV in UTF-8: {error}") from None
    if not rows:
        raise bad_request("the CSV is empty: expected a line of column names, one of them image")
    column = _image_column(rows[0], "the CSV's first line")
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(rows[0]):
            raise bad_request(f"row {number} of the CSV: expected {len(rows[0])} values")
    if len(rows) == 1:
        raise bad_request("the CSV has no images: expected one or more")
    return tuple(row[column] for row in rows[1:])


def is_url(image: Any) -> bool:
    """Return True for a URL of an image; base64 has no colon, and a data: URL no "://".

    Args:
        image: An image of a request.

    Returns:
        True for text with "://" near its start.
    """
    return isinstance(image, str) and "://" in image[:100]


def decode_base64(image: Any) -> bytes:
    """Decode an image of a request.

    Args:
        image: Base64 text, as image.base64_text.parse_base64 reads it.

    Returns:
        The encoded image.

    Raises:
        RequestError: The value is not base64, or is empty.
    """
    if not isinstance(image, str):
        raise RequestError(
            400, "bad_image", f"expected base64 text or a URL, got {_describe_type(image)}"
        )
    try:
        data = parse_base64(image)
    except ValueError as error:
        raise RequestError(400, "bad_image", f"{error}, and not a URL") from None
    if not data:
        raise RequestError(400, "bad_image", "empty: expected an image in base64")
    return data


def _describe_type(value: Any) -> str:
    """Return the name of a JSON type."""
    kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
