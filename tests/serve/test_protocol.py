"""Tests of the JSON of requests and answers: accepted forms, options and errors."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic_core", reason="serving needs pip install 'vitlib[serve]'")

from vitlib.scores import predict_labels
from vitlib.serve.errors import MAX_LISTED, RequestError, bad_images
from vitlib.serve.protocol import MAX_VALUES, Params, decode_base64, is_url, parse_request
from vitlib.serve.writer import Writer

A, B = base64.b64encode(b"a" * 100).decode(), base64.b64encode(b"b" * 100).decode()
JSON = "application/json"
LABELS = ("can", "carton")
SCORES = np.array([0.25, 0.75], np.float32)


def images(payload: Any, content: str = JSON) -> tuple[Any, ...]:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return parse_request(body, content).images


# --- requests: R1 to R3 of Azure, R4 of MLflow ----------------------------------------------------


FORMS: dict[str, Any] = {
    "R1": {"input_data": {"columns": ["image"], "index": [0, 1], "data": [A, B]}},
    "R1 with an odd index": {
        "input_data": {"columns": ["image"], "index": ["x", 7], "data": [A, B]}
    },
    "R1 without an index": {"input_data": {"columns": ["image"], "data": [A, B]}},
    "R2": {"input_data": {"columns": ["image"], "index": [0, 1], "data": [[A], [B]]}},
    "R2 without an index": {"input_data": {"columns": ["image"], "data": [[A], [B]]}},
    "R2, a column more": {
        "input_data": {"columns": ["id", "image"], "data": [[1, A], [2, B]]}
    },
    "R2, a column of another name": {"input_data": {"columns": ["photo"], "data": [[A], [B]]}},
    "R3": {"input_data": [A, B]},
    "R3 in rows": {"input_data": [[A], [B]]},
    "R4 dataframe_split": {"dataframe_split": {"columns": ["image"], "data": [[A], [B]]}},
    "R4 dataframe_split 1-D": {"dataframe_split": {"columns": ["image"], "data": [A, B]}},
    "R4 dataframe_records": {"dataframe_records": [{"image": A}, {"image": B}]},
    "R4 instances": {"instances": [A, B]},
    "R4 instances as objects": {"instances": [{"image": A}, {"image": B}]},
    "R4 instances of TensorFlow": {"instances": [{"b64": A}, {"b64": B}]},
    "R4 inputs": {"inputs": [A, B]},
    "R4 inputs by column": {"inputs": {"image": [A, B]}},
    "params beside": {"input_data": [A, B], "params": {"top_k": 1}},
    "params beside MLflow's": {"instances": [A, B], "params": {}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_parse_request_accepts_form(form: str) -> None:
    assert images(FORMS[form]) == (A, B)


def test_inputs_with_one_image() -> None:
    assert images({"inputs": A}) == (A,)
    assert images({"inputs": {"image": A}}) == (A,)


def test_index_does_not_change_the_order() -> None:
    many = [str(i) for i in range(50)]
    split = {"columns": ["image"], "index": many[::-1], "data": many}
    assert images({"input_data": split}) == tuple(many)


@pytest.mark.parametrize(
    "text", [f"image\n{A}\n{B}\n", f'id,image\r\n1,"{A}"\r\n2,{B}\r\n', f"\ufeffimage\n\n{A}\n{B}"]
)
def test_parse_request_accepts_csv(text: str) -> None:
    assert images(text.encode(), "text/csv") == (A, B)


def test_csv_field_of_any_length() -> None:
    long = "A" * 400_000  # csv's own limit is 131,072
    assert images(f"image\n{long}\n".encode(), "text/csv") == (long,)


REJECTED: dict[str, tuple[Any, str]] = {
    "empty": (b"", "empty"),
    "blank": (b" \n", "empty"),
    "no JSON": (b"{", "is not JSON"),
    "no UTF-8": (b'{"input_data": "\xff"}', "is not JSON"),
    "NaN": (b'{"input_data": [NaN]}', "is not JSON"),
    "a list": ([A], "expected a JSON object"),
    "a number": (7, "expected a JSON object"),
    "null": (None, "expected a JSON object"),
    "nothing in it": ({}, "got {}"),
    "a name that is none": ({"input": [A]}, "got 'input'"),
    "two at once": ({"inputs": [A], "instances": [B]}, "got instances and inputs"),
    "a word beside": ({"input_data": [A], "param": {}}, "'param' is not understood"),
    "no image": ({"input_data": []}, "has no images"),
    "no rows": ({"input_data": {"columns": ["image"], "data": []}}, "has no images"),
    "a number as data": ({"input_data": {"columns": ["image"], "data": 3}}, "expected {"),
    "text as input_data": ({"instances": 3}, "a list of images"),
    "columns as text": ({"input_data": {"columns": "image", "data": [A]}}, "columns"),
    "columns of numbers": ({"input_data": {"columns": [1], "data": [A]}}, "columns"),
    "two columns, no image": (
        {"input_data": {"columns": ["a", "b"], "data": [[A, B]]}}, 'one column "image"',
    ),
    "two columns, image twice": (
        {"input_data": {"columns": ["image", "image"], "data": [[A, B]]}}, 'one column "image"',
    ),
    "a short row": ({"input_data": {"columns": ["a", "image"], "data": [[A]]}}, "data[0]"),
    "a flat row of two columns": (
        {"input_data": {"columns": ["a", "image"], "data": [A]}}, "data[0]",
    ),
    "a short index": (
        {"input_data": {"columns": ["image"], "index": [0], "data": [A, B]}}, "index",
    ),
    "an index that is none": (
        {"input_data": {"columns": ["image"], "index": 3, "data": [A]}}, "index",
    ),
    "a word in the split": ({"input_data": {"columns": ["image"], "data": [A], "dat": 1}}, "'dat'"),
    "records without image": ({"dataframe_records": [{"a": A, "b": B}]}, 'one column "image"'),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_parse_request_rejects_body(case: str) -> None:
    payload, message = REJECTED[case]
    with pytest.raises(RequestError) as caught:
        images(payload)
    assert caught.value.status == 400
    assert caught.value.code == "bad_request"
    assert message in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "text", ["", "image\n", "a,b\n1,2\n", "image,b\nx\n", 'image\n"x\n', "\xff"]
)
def test_parse_request_rejects_csv(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        images(text.encode("latin-1"), "text/csv")
    assert caught.value.status == 400


def test_json_with_too_many_values_is_refused() -> None:
    for body in (b"[" + b"[]," * MAX_VALUES, b"[" * MAX_VALUES, b'{"a":' * (MAX_VALUES + 1)):
        with pytest.raises(RequestError) as caught:
            parse_request(body, JSON)
        assert caught.value.status in (400, 413)
    with pytest.raises(RequestError, match="is not JSON"):
        parse_request(b"[" * 10_000, JSON)  # deep, but short: the parser's own limit


# --- images ---------------------------------------------------------------------------------------


def test_decode_base64_accepts_its_variants() -> None:
    data = bytes(range(256)) * 3
    unbroken = base64.b64encode(data).decode()
    broken = base64.encodebytes(data).decode()
    assert "\n" in broken
    forms = (unbroken, broken, broken.replace("\n", "\r\n"), f"data:image/jpeg;base64,{unbroken}")
    for text in forms:
        assert decode_base64(text) == data
        assert not is_url(text)


@pytest.mark.parametrize(
    "image",
    ["", "A", "A===", "!!!!", "ä" * 4, "AAAA\0AAAA", "data:image/png,AAAA", "data:", None, 3, True,
     1.5, {}, []],
)  # fmt: skip
def test_decode_base64_rejects_other_values(image: Any) -> None:
    with pytest.raises(RequestError) as caught:
        decode_base64(image)
    assert (caught.value.status, caught.value.code) == (400, "bad_image")


def test_is_url() -> None:
    for text in ("http://a.b/c.jpg", "HTTPS://a.b/c", "file:///etc/passwd", "ftp://x"):
        assert is_url(text)
    for text in (A, "data:image/png;base64,AAAA", "", None, 3):
        assert not is_url(text)


# --- answers --------------------------------------------------------------------------------------


def answer(**params: Any) -> Any:
    return json.loads(Writer(LABELS).answer([SCORES, SCORES], Params.parse(params)))


def test_azure_v1_is_the_default() -> None:
    assert answer() == [{"probs": [0.25, 0.75], "labels": ["can", "carton"]}] * 2


def test_azure_v1_scores_keep_every_digit() -> None:
    scores = np.random.default_rng(0).random(1000).astype(np.float32) ** 9
    entries = json.loads(Writer([str(i) for i in range(1000)]).answer([scores], Params()))
    assert np.array_equal(np.array(entries[0]["probs"], np.float32), scores)


def test_azure_v1_with_top_k_and_threshold() -> None:
    assert answer(top_k=1) == [{"probs": [0.75], "labels": ["carton"]}] * 2
    assert answer(threshold=0.5) == [{"probs": [0.75], "labels": ["carton"]}] * 2
    assert answer(threshold=0.9) == [{"probs": [], "labels": []}] * 2


def test_azure_v2_is_sorted() -> None:
    both = [{"label": "carton", "score": 0.75}, {"label": "can", "score": 0.25}]
    assert answer(format="azure-v2") == [both] * 2
    assert answer(format="azure-v2", top_k=1) == [both[:1]] * 2


def test_mlflow_is_numbered() -> None:
    entry = {"0": {"label": "carton", "score": 0.75}, "1": {"label": "can", "score": 0.25}}
    assert answer(format="mlflow") == [entry] * 2
    many = np.linspace(0, 1, 10, dtype=np.float32)
    entries = Writer([str(i) for i in range(10)]).answer([many], Params.parse({"format": "mlflow"}))
    assert [item["label"] for item in json.loads(entries)[0].values()] == ["9", "8", "7", "6", "5"]


def test_writer_puts_errors_in_the_list() -> None:
    wrong = RequestError(400, "bad_image", "no image", 1)
    entries = json.loads(Writer(LABELS).answer([SCORES, wrong], Params()))
    assert entries[0]["labels"] == ["can", "carton"]
    assert entries[1] == {"error": {"code": "bad_image", "message": "no image", "index": 1}}


def test_predict_labels_orders_ties_by_class() -> None:
    tied, task = np.array([0.5, 0.5, 0.1], np.float32), "single_label_classification"
    assert predict_labels(tied, task, 2, None) == [(0, 0.5), (1, 0.5)]
    assert predict_labels(tied, task, 9, 0.5) == [(0, 0.5), (1, 0.5)]
    assert predict_labels(tied, task, None, np.array([0.6, 0.5, 0.1])) == [
        (1, 0.5),
        (2, pytest.approx(0.1)),
    ]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("azure-v1", {"values": [-3.5, 120.0], "labels": ["age", "height"]}),
        ("azure-v2", [{"label": "age", "score": -3.5}, {"label": "height", "score": 120.0}]),
        (
            "mlflow",
            {"0": {"label": "age", "score": -3.5}, "1": {"label": "height", "score": 120.0}},
        ),
    ],
)
def test_regression_in_every_format(form: str, expected: Any) -> None:
    writer = Writer(["age", "height"], "regression")
    row = np.array([-3.5, 120.0], np.float32)
    assert json.loads(writer.answer([row], Params.parse({"format": form}))) == [expected]
    for choice in ({"top_k": 1}, {"threshold": 0.5}):
        with pytest.raises(RequestError, match="this model gives numbers"):
            Params.parse(choice).check("regression")


@pytest.mark.parametrize(
    "value",
    [[], 3, "x", {"topk": 1}, {"top_k": 0}, {"top_k": 1.5}, {"top_k": True}, {"top_k": "3"},
     {"threshold": 2}, {"threshold": -1}, {"threshold": "a"}, {"threshold": True},
     {"format": "xml"}, {"format": 3}, {"format": []}, {"on_error": "skip"}, {"on_error": {}}],
)  # fmt: skip
def test_params_rejects_value(value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        Params.parse(value)
    assert caught.value.status == 400
    assert "params" in caught.value.message


def test_params_defaults() -> None:
    assert Params.parse(None) == Params() == Params.parse({})
    assert Params.parse({"top_k": None, "threshold": 0}) == Params(threshold=0)
    assert (
        Params.parse({"on_error": None}).on_error
        == Params.parse({"on_error": "null"}).on_error
        == "null"
    )


# --- errors of bad images -------------------------------------------------------------------------


def test_bad_images_lists_every_error() -> None:
    wrong = [(i, RequestError(400, "bad_image", f"reason {i}")) for i in (1, 3)]
    error = json.loads(bad_images(5, wrong).body())["error"]
    assert error["index"] == 1
    assert error["message"] == "image 1: reason 1; image 3: reason 3"
    assert error["errors"] == [
        {"index": i, "code": "bad_image", "message": f"reason {i}"} for i in (1, 3)
    ]
    alone = json.loads(bad_images(1, [(0, RequestError(400, "bad_image", "why"))]).body())["error"]
    assert alone == {"code": "bad_image", "message": "why", "index": 0}
    many = [(i, RequestError(400, "bad_image", "why")) for i in range(MAX_LISTED + 5)]
    assert bad_images(200, many).message.endswith("; and 5 more")
