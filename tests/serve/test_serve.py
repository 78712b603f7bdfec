"""vitlib serve as a process: what it answers, what it refuses, and that it ends in good order."""

from __future__ import annotations

import base64
import functools
import http.client
import http.server
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fixtures.hostile_requests import GOOD, HOSTILE, PHOTOS, request, score
from fixtures.server import SAMPLES, Answer, Server, form_of, status_of, text_of
from vitlib import Predictor, ViT, ViTConfig, save
from vitlib.errors import ServeError
from vitlib.image.processor import ImageProcessor
from vitlib.serve import run

for needed in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "urllib3"):
    pytest.importorskip(needed, reason="serving needs pip install 'vitlib[serve]'")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits = ("--max-body-mib", 2, "--body-timeout", 2, "--max-images", 20,
              "--max-pixels", 5_000_000)  # fmt: skip
    with Server(*limits) as one:
        yield one


@pytest.fixture(scope="module")
def vit() -> Predictor:
    return Predictor.load("demo")


@pytest.fixture(scope="module")
def scores(vit: Predictor) -> Any:
    return vit.probabilities(PHOTOS)


def near(found: Any, expected: Any) -> bool:
    """To the rounding of another batch: 1e-5 of a probability."""
    return bool(np.abs(np.asarray(found, np.float64) - expected).max() < 1e-5)


# --- what it answers ------------------------------------------------------------------------------


def test_the_cards_request(server: Server, vit: Predictor, scores: Any) -> None:
    texts = [base64.encodebytes(data).decode() for data in PHOTOS[:2]]  # with line breaks
    given = {"input_data": {"columns": ["image"], "index": [0, 1], "data": texts}}
    answer = server.post("/score", given)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert [list(one) for one in answer.json()] == [["probs", "labels"]] * 2
    assert all(one["labels"] == list(vit.labels) for one in answer.json())
    assert near([one["probs"] for one in answer.json()], scores[:2])
    assert not near(scores[0], scores[1])  # the order shows


def test_many_images_come_back_in_order(server: Server, scores: Any) -> None:
    order = [i % len(PHOTOS) for i in range(20)]
    given = {"input_data": [text_of(PHOTOS[i]) for i in order]}
    found = [one["probs"] for one in server.post("/score", given).json()]
    assert near(found, scores[order])


def test_many_clients_get_their_own(server: Server, scores: Any) -> None:
    def ask(number: int) -> bool:
        index = number % len(PHOTOS)
        found = server.post("/score", {"input_data": [text_of(PHOTOS[index])]}).json()
        return near(found[0]["probs"], scores[index])

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(200)))


def test_mlflow(server: Server, scores: Any) -> None:
    answer = server.post("/invocations", {"instances": [text_of(PHOTOS[0])]})
    assert list(answer.json()) == ["predictions"]
    assert near(answer.json()["predictions"][0]["probs"], scores[0])
    table = f"image\n{text_of(PHOTOS[1])}\n".encode()
    answer = server.ask("/invocations", table, "text/csv; charset=utf-8")
    assert near(answer.json()["predictions"][0]["probs"], scores[1])
    given = {"inputs": [text_of(PHOTOS[2])], "params": {"format": "mlflow", "top_k": 1}}
    (entry,) = server.post("/invocations", given).json()["predictions"]
    assert entry["0"]["score"] == pytest.approx(scores[2].max(), abs=1e-5)


def test_params(server: Server, vit: Predictor, scores: Any) -> None:
    given = {"input_data": [text_of(PHOTOS[0])], "params": {"format": "azure-v2", "top_k": 3}}
    (entry,) = server.post("/score", given).json()
    best = np.argsort(-scores[0])[:3]
    assert [one["label"] for one in entry] == [vit.labels[i] for i in best]


def test_classify(server: Server, vit: Predictor, scores: Any) -> None:
    (entry,) = server.photo("/classify?top_k=2", PHOTOS[0]).json()["predictions"]
    index = int(scores[0].argmax())
    assert len(entry) == 2
    assert (entry[0]["label"], entry[0]["index"]) == (vit.labels[index], index)
    assert entry[0]["score"] == pytest.approx(scores[0].max(), abs=1e-5)
    form = form_of(*PHOTOS[:3])
    found = server.ask("/classify?threshold=0.99", *form).json()["predictions"]
    assert len(found) == 3
    for entry, row in zip(found, scores[:3], strict=True):
        assert len(entry) == (row > 0.99).sum()
    given = {"input_data": [text_of(PHOTOS[4])]}
    (entry,) = server.post("/classify", given).json()["predictions"]
    assert entry[0]["index"] == int(scores[4].argmax())


def test_embed(server: Server, vit: Predictor) -> None:
    expected = vit.embed(PHOTOS[:2])
    found = np.array(server.ask("/embed", *form_of(*PHOTOS[:2])).json()["embeddings"])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    answer = server.photo("/embed?format=npy", PHOTOS[1])
    array = np.load(io.BytesIO(answer.body), allow_pickle=False)
    assert (array.dtype, array.shape) == (np.float32, (1, expected.shape[1]))
    assert np.abs(array[0] - expected[1]).max() < 1e-4 * np.abs(expected).max()


def test_attend(server: Server) -> None:
    said = server.photo("/attend", PHOTOS[0]).json()
    (grid,), (shown,) = said["maps"], said["shown"]
    flat = np.array(grid)
    assert flat.ndim == 2
    assert (flat.min(), flat.max()) == (0, 1)
    assert shown == [0, 0, 1, 1]
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 30)).save(turned, "JPEG", exif=exif)
    top, left, bottom, right = server.photo("/attend", turned.getvalue()).json()["shown"][0]
    assert 0 <= top < bottom <= 1
    assert 0 <= left < right <= 1


def test_what_it_says_of_itself(server: Server) -> None:
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
    assert server.get("/docs").status == 200


def test_the_page(server: Server) -> None:
    answer = server.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for part in ("page/app.js", "page/style.css"):
        assert part in answer.body.decode()
        assert server.get(f"/{part}").status == 200
    everything = answer.body + server.get("/page/app.js").body + server.get("/page/style.css").body
    assert b"https://" not in everything  # nothing from elsewhere
    assert b"http://" not in everything


# --- bad images -----------------------------------------------------------------------------------


def test_a_bad_image_fails_alone(server: Server, scores: Any) -> None:
    given = {
        "input_data": [text_of(PHOTOS[0]), text_of(PHOTOS[1][:200]), "no!", text_of(PHOTOS[2])]
    }
    answer = server.post("/score", given)
    assert answer.status == 400
    said = answer.json()["error"]
    assert (said["code"], said["index"]) == ("bad_image", 1)
    assert [one["index"] for one in said["errors"]] == [1, 2]
    assert "image 1: " in said["message"]
    answer = server.post("/score", {**given, "params": {"on_error": "null"}})
    assert answer.status == 200
    found = answer.json()
    assert [("error" in one) for one in found] == [False, True, True, False]
    assert [(found[i]["error"]["code"], found[i]["error"]["index"]) for i in (1, 2)] == [
        ("bad_image", 1), ("bad_image", 2),
    ]  # fmt: skip
    assert near([found[0]["probs"], found[3]["probs"]], scores[[0, 2]])


def test_a_bad_image_in_its_place(server: Server, vit: Predictor) -> None:
    given = {"input_data": [GOOD, "no!"], "params": {"on_error": "null", "top_k": 2}}
    found = server.post("/classify", given).json()["predictions"]
    assert (len(found[0]), found[1]["error"]["code"]) == (2, "bad_image")
    given["params"] = {"on_error": "null"}
    found = server.post("/embed", given).json()["embeddings"]
    assert (len(found[0]), found[1]["error"]["code"]) == (vit.model.num_features, "bad_image")
    form = form_of(PHOTOS[0], b"no photo")
    array = np.load(io.BytesIO(server.ask("/embed?format=npy&on_error=null", *form).body))
    assert np.isfinite(array[0]).all()
    assert np.isnan(array[1]).all()
    said = server.ask("/attend?on_error=null", *form).json()
    assert said["maps"][1]["error"]["code"] == "bad_image"
    assert said["shown"][1] is None
    given["params"] = {"format": "mlflow"}
    assert server.post("/classify", {**given, "input_data": [GOOD]}).code == "bad_request"


def test_an_answer_that_is_not_finite_is_an_error(tmp_path: Path, vit: Predictor) -> None:
    factor = 3e36  # a bright level times it is infinite, black is 0
    rule = replace(vit.image_processor, rescale_factor=factor, image_mean=None, image_std=None)
    save(vit.model, tmp_path, image_processor=rule)
    black = io.BytesIO()
    Image.new("RGB", (32, 32)).save(black, "PNG")
    with Server(model=str(tmp_path)) as server:
        form = form_of(black.getvalue(), PHOTOS[0])
        answer = server.ask("/classify", *form)
        assert (answer.status, answer.code, answer.json()["error"]["index"]) == (
            500,
            "not_finite",
            1,
        )
        first, second = server.ask("/classify?on_error=null", *form).json()["predictions"]
        assert (len(first), second["error"]["code"]) == (5, "not_finite")


def test_pixels_are_counted_before_they_are_decoded(server: Server) -> None:
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


# --- hostile requests -----------------------------------------------------------------------------


def test_hostile_requests(server: Server, scores: Any) -> None:
    """1,000 of over 25 kinds: each is refused as it should be; good ones beside them are right."""
    assert len(HOSTILE) >= 25
    drawn = random.Random(0)
    kinds = list(HOSTILE)
    jobs = [(kinds[i % len(kinds)], drawn.randrange(2**32)) for i in range(1000)]
    stop = threading.Event()
    good: list[bool] = []

    def beside() -> None:
        while not stop.is_set():
            answer = server.post("/score", {"input_data": [GOOD]})
            good.append(answer.status == 200 and near(answer.json()[0]["probs"], scores[0]))

    def ask(job: tuple[str, int]) -> str | None:
        name, seed = job
        draw, expected = HOSTILE[name]
        raw = server.raw(draw(random.Random(seed)))
        status = status_of(raw)
        if status not in expected:
            return f"{name}: {raw[:300]!r}"
        _, _, body = raw.partition(b"\r\n\r\n")
        if status != 200 and not {"code", "message", "index"} <= set(json.loads(body)["error"]):
            return f"{name}: {body[:300]!r}"
        return None

    thread = threading.Thread(target=beside)
    thread.start()
    with ThreadPoolExecutor(8) as pool:
        wrong = [one for one in pool.map(ask, jobs) if one]
    stop.set()
    thread.join()
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"
    assert good
    assert all(good)
    assert server.process.poll() is None


def test_slow_bodies_and_heads(server: Server) -> None:
    """One that trickles is ended after --body-timeout (2 s); others are not held up."""
    start = time.monotonic()
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(server.raw, head, b"{", 1.0, b"x", 1.5, b"x") for _ in range(20)]
        assert server.photo("/classify", PHOTOS[0]).status == 200
        assert time.monotonic() - start < 1.5
        for one in slow:
            assert status_of(one.result()) == 408
    assert time.monotonic() - start < 10


def test_bodies_are_counted_together() -> None:
    """Each is within its limit, and all are not: what comes too much is told so at once."""
    with Server("--max-pending-mib", 1, "--max-body-mib", 1) as server:
        half = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 700000\r\n\r\n" + b"x" * 600_000
        with socket.create_connection(server.address) as held:
            held.sendall(half)
            time.sleep(0.3)
            assert status_of(server.raw(half)) == 429
            assert server.photo("/classify", PHOTOS[0]).status == 200  # there is room for this
            held.sendall(b"x" * 100_000)
            assert status_of(held.recv(1000)) == 400  # it is no JSON
        assert server.photo("/classify", b"x" * 900_000).status == 400  # all was given back


def test_a_client_that_goes_away(server: Server) -> None:
    body = json.dumps({"input_data": [GOOD] * 20}).encode()
    for cut in (len(body) // 2, len(body)):
        for _ in range(20):
            with socket.create_connection(server.address) as sock:
                sock.sendall(request("/score", body)[: -len(body)] + body[:cut])
    until = time.monotonic() + 10
    while "vitlib_backlog_images 0.0" not in server.get("/metrics").body.decode():
        server.photo("/classify", PHOTOS[0])  # a batch brings the gauge up to date
        assert time.monotonic() < until


@pytest.mark.parametrize("mebibytes", [33, 60])
def test_a_body_that_is_too_long_is_told_to_any_client(server: Server, mebibytes: int) -> None:
    """Also to one that sends all of it before it reads."""
    answer = server.ask("/score", b"A" * (mebibytes << 20), "application/json")
    assert (answer.status, answer.code) == (413, "too_large")
    assert server.photo("/classify", PHOTOS[0]).status == 200


def test_a_form_that_is_cut_off_loses_nothing_silently(server: Server) -> None:
    body, kind = form_of(*PHOTOS[:2])
    assert len(server.ask("/classify", body, kind).json()["predictions"]) == 2
    for cut in (len(body) - 3, len(body) - 60, len(body) // 2, 100):
        answer = server.ask("/classify", body[:cut], kind)
        assert (answer.status, answer.code) == (400, "bad_request")


def test_more_images_than_may_wait() -> None:
    with Server("--max-queue", 3) as server:
        for answer in (
            server.post("/score", {"input_data": [GOOD] * 4}),
            server.ask("/classify", *form_of(*PHOTOS[:4])),
        ):
            assert (answer.status, answer.code) == (413, "too_many_images")
        assert server.post("/score", {"input_data": [GOOD] * 3}).status == 200


def test_workers_that_end_take_no_more() -> None:
    """What was accepted is answered, what comes later is refused and does not hang."""
    server = Server("--workers", 2)
    try:
        body = json.dumps({"input_data": [GOOD]}).encode()
        with socket.create_connection(server.address) as sock:
            sock.sendall(request("/score", body)[:-10])
            time.sleep(0.3)
            server.process.terminate()
            time.sleep(1)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(server.address, timeout=5)
            sock.sendall(body[-10:])
            assert b" 200 " in sock.recv(1000)
    finally:
        assert server.end() == 0


def test_too_many_connections() -> None:
    with Server("--max-connections", 3) as server:
        held = [socket.create_connection(server.address) for _ in range(3)]
        time.sleep(0.2)
        answer = server.photo("/classify", PHOTOS[0])
        assert (answer.status, answer.code) == (429, "overloaded")
        for sock in held:
            sock.close()
        time.sleep(0.2)
        assert server.photo("/classify", PHOTOS[0]).status == 200


def test_many_requests_on_one_connection(server: Server) -> None:
    """Pipelined, a refused one among them, and one whose body is not read."""
    one = score({"input_data": [GOOD]}).replace(b"Connection: close\r\n", b"")
    bad = score({"input_data": []}).replace(b"Connection: close\r\n", b"")
    raw = server.raw(one, bad, one, score({"input_data": [GOOD]}))
    assert [int(x[:3]) for x in raw.split(b"HTTP/1.1 ")[1:]] == [200, 400, 200, 200]


# --- keys, load, the end --------------------------------------------------------------------------


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst-key\nsecond-key \n")
    with Server("--api-key-file", file) as one:
        for path in ("/", "/page/app.js", "/health", "/ready", "/version"):
            assert one.get(path).status == 200
        for headers in (
            {}, {"Authorization": "Bearer no"}, {"Authorization": "first-key"},
            {"X-API-Key": "first-ke"}, {"X-API-Key": ""}, {"Authorization": "Basic first-key"},
            {"X-API-Key": "# ours"},
        ):  # fmt: skip
            answer = one.ask("/classify", PHOTOS[0], "image/png", **headers)
            assert (answer.status, answer.code) == (401, "unauthorized"), headers
            assert answer.headers["www-authenticate"] == "Bearer"
        assert one.get("/metrics").status == 401
        for headers in (
            {"Authorization": "Bearer first-key"}, {"Authorization": "bearer second-key"},
            {"X-API-Key": "second-key"},
        ):  # fmt: skip
            assert one.ask("/classify", PHOTOS[0], "image/png", **headers).status == 200
        api = one.get("/openapi.json", **{"X-API-Key": "first-key"}).json()
        assert api["components"]["securitySchemes"] == {
            "HTTPBearer": {"type": "http", "scheme": "bearer"}
        }
        assert "security" in api["paths"]["/classify"]["post"]


def test_a_key_of_any_script(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("clé-ключ\n", encoding="utf-8")
    with Server("--api-key-file", tmp_path / "keys") as one:
        for key, status in (("clé-ключ", 200), ("clé", 401)):
            headers = {"X-API-Key": key.encode("utf-8").decode("latin-1")}  # bytes as they are sent
            assert one.ask("/classify", PHOTOS[0], "image/png", **headers).status == status


def test_a_balancer_may_ask_by_head(server: Server) -> None:
    for path in ("/health", "/ready"):
        with closing(http.client.HTTPConnection(*server.address)) as client:
            client.request("HEAD", path)
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (200, b"")


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes some 50 ms an image."""
    folder = tmp_path_factory.mktemp("slow")
    cfg = ViTConfig(
        image_size=224, patch_size=8, embed_dim=192, depth=10, num_heads=3, num_classes=3
    )
    half = (0.5,) * 3
    rule = ImageProcessor(shortest_edge=224, crop_size=(224, 224), image_mean=half, image_std=half)
    save(ViT(cfg), folder, image_processor=rule)
    return folder


def test_overload_is_told_and_the_end_loses_nothing(slow_model: Path) -> None:
    """More than it can do: each gets 200 or 429; after SIGTERM what was accepted is answered."""
    server = Server("--max-backlog-ms", 1000, "--max-batch", 4, model=str(slow_model))
    answers: list[Answer | OSError] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        while not stop.is_set():
            try:
                answers.append(server.photo("/classify", PHOTOS[number % 10]))
            except OSError as error:  # not accepted: it is ending
                answers.append(error)
                return

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    before = len(answers)
    start = time.monotonic()
    assert server.end() == 0
    took = time.monotonic() - start
    stop.set()
    for thread in threads:
        thread.join()
    came = [one for one in answers if isinstance(one, Answer)]
    assert {one.status for one in came} == {200, 429}
    assert all(isinstance(one, Answer) for one in answers[:before])
    late = next(one for one in came if one.status == 429)
    assert late.code == "overloaded"
    assert int(late.headers["retry-after"]) >= 1
    assert took < 20  # the drain ends by itself, before its 30 s
    assert "Traceback" not in server.last_words


def test_an_accepted_request_is_answered_after_sigterm(slow_model: Path) -> None:
    with Server("--max-batch", 2, model=str(slow_model)) as server:
        found: list[Answer] = []
        given = {"input_data": [GOOD] * 16}
        thread = threading.Thread(target=lambda: found.append(server.post("/score", given)))
        thread.start()
        time.sleep(0.5)
        server.process.terminate()
        thread.join()
        assert found[0].status == 200
        assert len(found[0].json()) == 16
        with pytest.raises(urllib.error.URLError):
            server.get("/health")


def test_workers() -> None:
    with Server("--workers", 2) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: server.photo("/classify", PHOTOS[i % 10]), range(40)))
        assert {one.status for one in answers} == {200}
        text = server.get("/metrics").body.decode()
        (line,) = (x for x in text.splitlines() if x.startswith("vitlib_images_total"))
        assert float(line.split()[-1]) >= 40  # of both together


# --- what cannot start ----------------------------------------------------------------------------


def started(*options: Any) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "vitlib", "serve", *map(str, options)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_port_in_use() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        status, said = started("--model", "demo", "--port", port)
    assert status == 1
    assert said.count("\n") == 1
    assert f"127.0.0.1:{port}" in said
    assert "in use" in said


def test_a_port_taken_while_the_model_was_loaded() -> None:
    with run.bind("127.0.0.1", 0) as ours, run.bind(*ours.getsockname()) as theirs:
        theirs.listen()
        with pytest.raises(ServeError, match="in use"):
            run._listen(ours)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--api-key-file", "absent"], 1, "'absent' cannot be read: No such file"),
        (["--model", "absent"], 1, "absent"),
        (["--model", "absent", "--workers", 2], 1, "absent"),
        (["--host", "no.such.host.invalid"], 1, "cannot listen on no.such.host.invalid"),
        (["--allow-urls", "http://a/b"], 1, "expected a host"),
        (["--allow-urls", "a.com:99999"], 1, "expected a host"),
        (["--allow-urls", "*.*.com"], 1, "expected a host"),
        (["--max-batch", 0], 2, "0 is not in the range"),
        (["--device", "cuda:0", "--workers", 2], 1, "several workers are for a CPU"),
        (["--precision", "auto"], 2, "--calibrate"),
    ],
)
def test_what_cannot_start(options: list[Any], status: int, words: str) -> None:
    given = options if "--model" in options else ["--model", "demo", *options]
    code, said = started("--port", 0, *given)
    assert (code, words in said) == (status, True), said
    assert "Traceback" not in said
    if code == 1:
        assert said.count("\n") == 1


def test_an_empty_key_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    code, said = started("--model", "demo", "--port", 0, "--api-key-file", tmp_path / "keys")
    assert code == 1
    assert "holds no key" in said


# --- photos by URL --------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[str]:
    """A web server of the samples; /slow/ takes two seconds."""

    class Store(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/slow/"):
                time.sleep(2)
                self.path = self.path[5:]
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    handler = functools.partial(Store, directory=str(SAMPLES[0].parent))
    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=one.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{one.server_address[1]}"
    one.shutdown()
    thread.join()
    one.server_close()


def test_photos_by_url(store: str, scores: Any) -> None:
    urls = [f"http://{store}/{path.name}" for path in SAMPLES[:2]]
    given = {"input_data": {"columns": ["image"], "index": [0, 1, 2], "data": [*urls, GOOD]}}
    with Server("--allow-urls", f"a.example,{store}", "--allow-private-urls") as server:
        found = [one["probs"] for one in server.post("/score", given).json()]
        assert near(found, scores[[0, 1, 0]])
        bad = {"input_data": [GOOD, f"http://{store}/absent.png", "http://b.example/x.png"]}
        said = server.post("/score", bad).json()["error"]
        assert [one["index"] for one in said["errors"]] == [1, 2]
        assert said["code"] == "bad_url"
        # Who waits for another server holds nobody up.
        slow = {"input_data": [f"http://{store}/slow/{SAMPLES[1].name}"]}
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, "/score", slow)
            time.sleep(0.3)
            for _ in range(5):
                assert server.photo("/classify", PHOTOS[0]).status == 200
            assert not waiting.done()
            assert near(waiting.result().json()[0]["probs"], scores[1])


def test_a_private_address_is_refused_though_its_name_is_allowed(store: str) -> None:
    with Server("--allow-urls", store) as server:
        answer = server.post("/score", {"input_data": [f"http://{store}/x.png"]})
    assert (answer.status, answer.code) == (400, "bad_url")
    assert "private network" in answer.json()["error"]["message"]
