"""Tests of a running `vitlib serve`: answers of every route, and bad images."""

from __future__ import annotations

import base64
import http.client
import http.server
import io
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from fixtures.hostile_requests import GOOD, PHOTOS
from fixtures.server import (
    Server,
    encode_base64,
    encode_form,
    is_close,
)
from vitlib import Predictor, ViT, explain, save


def test_score_answers_azure_request(server: Server, vit: Predictor, scores: Any) -> None:
    texts = [base64.encodebytes(data).decode() for data in PHOTOS[:2]]  # with line breaks
    payload = {"input_data": {"columns": ["image"], "index": [0, 1], "data": texts}}
    answer = server.post("/score", payload)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert [list(entry) for entry in answer.json()] == [["probs", "labels"]] * 2
    assert all(entry["labels"] == list(vit.labels) for entry in answer.json())
    assert is_close([entry["probs"] for entry in answer.json()], scores[:2])
    assert not is_close(scores[0], scores[1])  # the order shows


def test_score_keeps_order_of_many_images(server: Server, scores: Any) -> None:
    order = [i % len(PHOTOS) for i in range(20)]
    payload = {"input_data": [encode_base64(PHOTOS[i]) for i in order]}
    probs = [entry["probs"] for entry in server.post("/score", payload).json()]
    assert is_close(probs, scores[order])


def test_concurrent_clients_get_their_own_rows(server: Server, scores: Any) -> None:
    def send(number: int) -> bool:
        index = number % len(PHOTOS)
        entries = server.post("/score", {"input_data": [encode_base64(PHOTOS[index])]}).json()
        return is_close(entries[0]["probs"], scores[index])

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(send, range(200)))


def test_invocations_answers_mlflow_forms(server: Server, scores: Any) -> None:
    answer = server.post("/invocations", {"instances": [encode_base64(PHOTOS[0])]})
    assert list(answer.json()) == ["predictions"]
    assert is_close(answer.json()["predictions"][0]["probs"], scores[0])
    table = f"image\n{encode_base64(PHOTOS[1])}\n".encode()
    answer = server.request("/invocations", table, "text/csv; charset=utf-8")
    assert is_close(answer.json()["predictions"][0]["probs"], scores[1])
    payload = {"inputs": [encode_base64(PHOTOS[2])], "params": {"format": "mlflow", "top_k": 1}}
    (entry,) = server.post("/invocations", payload).json()["predictions"]
    assert entry["0"]["score"] == pytest.approx(scores[2].max(), abs=1e-5)


def test_score_with_top_k_and_azure_v2(server: Server, vit: Predictor, scores: Any) -> None:
    payload = {
        "input_data": [encode_base64(PHOTOS[0])],
        "params": {"format": "azure-v2", "top_k": 3},
    }
    (entry,) = server.post("/score", payload).json()
    best = np.argsort(-scores[0])[:3]
    assert [prediction["label"] for prediction in entry] == [vit.labels[i] for i in best]


def test_classify_photo_form_and_json(server: Server, vit: Predictor, scores: Any) -> None:
    (entry,) = server.photo("/classify?top_k=2", PHOTOS[0]).json()["predictions"]
    index = int(scores[0].argmax())
    assert len(entry) == 2
    assert (entry[0]["label"], entry[0]["index"]) == (vit.labels[index], index)
    assert entry[0]["score"] == pytest.approx(scores[0].max(), abs=1e-5)
    form = encode_form(*PHOTOS[:3])
    entries = server.request("/classify?threshold=0.99", *form).json()["predictions"]
    assert len(entries) == 3
    for entry, row in zip(entries, scores[:3], strict=True):
        assert len(entry) == (row > 0.99).sum()
    payload = {"input_data": [encode_base64(PHOTOS[4])]}
    (entry,) = server.post("/classify", payload).json()["predictions"]
    assert entry[0]["index"] == int(scores[4].argmax())


def test_embed_as_json_and_npy(server: Server, vit: Predictor) -> None:
    expected = vit.embed(PHOTOS[:2])
    vectors = np.array(server.request("/embed", *encode_form(*PHOTOS[:2])).json()["embeddings"])
    assert np.abs(vectors - expected).max() < 1e-4 * np.abs(expected).max()
    answer = server.photo("/embed?format=npy", PHOTOS[1])
    array = np.load(io.BytesIO(answer.body), allow_pickle=False)
    assert (array.dtype, array.shape) == (np.float32, (1, expected.shape[1]))
    assert np.abs(array[0] - expected[1]).max() < 1e-4 * np.abs(expected).max()


def test_attend_gives_map_and_visible_box(server: Server) -> None:
    answer = server.photo("/attend", PHOTOS[0]).json()
    (grid,), (shown,) = answer["maps"], answer["shown"]
    flat = np.array(grid)
    assert flat.ndim == 2
    assert (flat.min(), flat.max()) == (0, 1)
    assert shown == [0, 0, 1, 1]
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 30)).save(rotated, "JPEG", exif=exif)
    top, left, bottom, right = server.photo("/attend", rotated.getvalue()).json()["shown"][0]
    assert 0 <= top < bottom <= 1
    assert 0 <= left < right <= 1


def test_attend_computes_chosen_method_and_class(server: Server, vit: Predictor) -> None:
    net, pixels = vit.model, vit.image_processor(PHOTOS[0])
    assert isinstance(net, ViT)
    expected = {
        "method=rollout": explain.attention_rollout(net, pixels)[0],
        "method=relevance&class=3": explain.relevance(net, pixels, 3)[0],
        f"class={quote(vit.labels[5])}": explain.relevance(net, pixels, 5)[0],
        "method=relevance": explain.relevance(net, pixels)[0],
        "method=similarity": explain.similarity(net, pixels)[0],
        "method=mask": explain.foreground(net, pixels)[0],
    }
    answered = []
    for query, raw in expected.items():
        answer = server.photo(f"/attend?{query}", PHOTOS[0])
        assert answer.status == 200, answer.body
        (grid,) = answer.json()["maps"]
        low, high = float(raw.min()), float(raw.max())
        assert np.abs(np.array(grid) - (raw - low) / (high - low)).max() < 1e-3, query
        answered.append(grid)
    assert answered[1] != answered[2]
    (grid,) = server.photo("/attend?method=gradient&class=3", PHOTOS[0]).json()["maps"]
    assert np.array(grid).shape == np.array(answered[0]).shape


def test_attend_keeps_methods_of_concurrent_requests_apart(server: Server) -> None:
    queries = ["method=rollout", "class=1", "class=2", "method=mask"]
    alone = [server.photo(f"/attend?{query}", PHOTOS[1]).json()["maps"] for query in queries]

    def send(number: int) -> bool:
        query, expected = queries[number % 4], alone[number % 4]
        grid = server.photo(f"/attend?{query}", PHOTOS[1]).json()["maps"]
        return bool(np.abs(np.array(grid) - expected).max() < 1e-3)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(send, range(32)))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("method=foo", "method='foo': expected one of rollout, relevance, "),
        ("class=99", "no class 99: expected a label, or a number in 0..9"),
        ("class=shirts", "no label 'shirts' among 10: did you mean 'shirt' or "),
        ("class=1&method=mask", "class is for relevance and gradient: leave it out for mask"),
        ("layer=3", "no parameter 'layer': expected method, class, on_error"),
    ],
)
def test_attend_rejects_wrong_method_and_class(server: Server, query: str, message: str) -> None:
    answer = server.photo(f"/attend?{query}", PHOTOS[0])
    assert (answer.status, answer.code) == (400, "bad_request")
    assert answer.json()["error"]["message"].startswith(message)
    assert "\n" not in answer.json()["error"]["message"]


def test_health_ready_version_metrics_and_openapi(server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ping").status == 200
    assert server.get("/ready").json() == {"ready": True}
    about = server.get("/version").json()
    assert (about["model"], about["classes"]) == ("demo", 10)
    server.photo("/classify", PHOTOS[0])
    server.photo("/classify", b"no photo")
    text = server.get("/metrics").body.decode()
    for line in (
        'vitlib_requests_total{route="/classify",status="200"}', "vitlib_queue_images",
        "vitlib_batch_images_bucket", 'vitlib_errors_total{code="bad_image"}',
        'vitlib_request_seconds_count{route="/classify"}', "vitlib_backlog_images 0.0",
    ):  # fmt: skip
        assert line in text
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/score", "/invocations", "/classify", "/embed", "/attend", "/health"} <= set(paths)


def test_docs_list_every_route_without_a_network(server: Server) -> None:
    answer = server.get("/docs")
    assert (answer.status, answer.headers["content-type"][:9]) == (200, "text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = answer.body.decode()
    schema = server.get("/openapi.json").json()
    for route, operations in schema["paths"].items():
        for method, operation in operations.items():
            assert f"<h2>{method.upper()} {route}</h2>" in page
            for parameter in operation.get("parameters", []):
                assert f'<th scope="row">{parameter["name"]}</th>' in page
    home = "http://{}:{}/".format(*server.address)
    assert f"curl --data-binary @cat.jpg {home}classify" in page
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert len(links) == 4
    assert all(link in ("data:,", "page/style.css", "./", "openapi.json") for link in links)
    assert "//" not in page.replace(home, "")  # no other host


def test_page_loads_nothing_from_other_hosts(server: Server) -> None:
    answer = server.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for part in ("page/app.js", "page/style.css"):
        assert part in answer.body.decode()
        assert server.get(f"/{part}").status == 200
    everything = answer.body + server.get("/page/app.js").body + server.get("/page/style.css").body
    assert b"https://" not in everything  # nothing from elsewhere
    assert b"http://" not in everything


def test_head_requests_of_probes(server: Server) -> None:
    for path in ("/health", "/ready"):
        with closing(http.client.HTTPConnection(*server.address)) as client:
            client.request("HEAD", path)
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (200, b"")


# --- bad images -----------------------------------------------------------------------------------


def test_bad_images_are_listed_or_null(server: Server, scores: Any) -> None:
    payload = {
        "input_data": [
            encode_base64(PHOTOS[0]),
            encode_base64(PHOTOS[1][:200]),
            "no!",
            encode_base64(PHOTOS[2]),
        ]
    }
    answer = server.post("/score", payload)
    assert answer.status == 400
    error = answer.json()["error"]
    assert (error["code"], error["index"]) == ("bad_image", 1)
    assert [entry["index"] for entry in error["errors"]] == [1, 2]
    assert "image 1: " in error["message"]
    answer = server.post("/score", {**payload, "params": {"on_error": "null"}})
    assert answer.status == 200
    entries = answer.json()
    assert [("error" in entry) for entry in entries] == [False, True, True, False]
    assert [(entries[i]["error"]["code"], entries[i]["error"]["index"]) for i in (1, 2)] == [
        ("bad_image", 1), ("bad_image", 2),
    ]  # fmt: skip
    assert is_close([entries[0]["probs"], entries[3]["probs"]], scores[[0, 2]])


def test_bad_image_in_classify_embed_and_attend(server: Server, vit: Predictor) -> None:
    payload = {"input_data": [GOOD, "no!"], "params": {"on_error": "null", "top_k": 2}}
    rows = server.post("/classify", payload).json()["predictions"]
    assert (len(rows[0]), rows[1]["error"]["code"]) == (2, "bad_image")
    payload["params"] = {"on_error": "null"}
    rows = server.post("/embed", payload).json()["embeddings"]
    assert (len(rows[0]), rows[1]["error"]["code"]) == (vit.model.num_features, "bad_image")
    form = encode_form(PHOTOS[0], b"no photo")
    array = np.load(io.BytesIO(server.request("/embed?format=npy&on_error=null", *form).body))
    assert np.isfinite(array[0]).all()
    assert np.isnan(array[1]).all()
    maps = server.request("/attend?on_error=null", *form).json()
    assert maps["maps"][1]["error"]["code"] == "bad_image"
    assert maps["shown"][1] is None
    payload["params"] = {"format": "mlflow"}
    assert server.post("/classify", {**payload, "input_data": [GOOD]}).code == "bad_request"


def test_scores_that_are_not_finite_give_500(tmp_path: Path, vit: Predictor) -> None:
    factor = 3e36  # a bright level times it is infinite, black is 0
    rule = replace(vit.image_processor, rescale_factor=factor, image_mean=None, image_std=None)
    save(vit.model, tmp_path, image_processor=rule)
    black = io.BytesIO()
    Image.new("RGB", (32, 32)).save(black, "PNG")
    with Server(model=str(tmp_path)) as server:
        form = encode_form(black.getvalue(), PHOTOS[0])
        answer = server.request("/classify", *form)
        assert (answer.status, answer.code, answer.json()["error"]["index"]) == (
            500,
            "not_finite",
            1,
        )
        first, second = server.request("/classify?on_error=null", *form).json()["predictions"]
        assert (len(first), second["error"]["code"]) == (5, "not_finite")


def test_image_with_too_many_pixels_is_refused_before_decoding(server: Server) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    def bomb(width: int, height: int) -> bytes:
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = (
            chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
        )
        return b"\x89PNG\r\n\x1a\n" + data

    for sides in ((3000, 3000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        answer = server.photo("/classify", bomb(*sides))
        assert (answer.status, answer.code) == (400, "bad_image")
        assert "pixels" in answer.json()["error"]["message"]
