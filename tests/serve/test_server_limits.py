"""Tests of a running `vitlib serve`: hostile and slow requests, limits, and keys."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fixtures.hostile_requests import GOOD, HOSTILE, PHOTOS, request, score
from fixtures.server import (
    Server,
    encode_form,
    is_close,
    parse_status,
)


def test_hostile_requests_are_refused_beside_good_ones(server: Server, scores: Any) -> None:
    """1,000 requests of over 25 kinds get their status; good ones meanwhile get their scores."""
    assert len(HOSTILE) >= 25
    rng = random.Random(0)
    kinds = list(HOSTILE)
    jobs = [(kinds[i % len(kinds)], rng.randrange(2**32)) for i in range(1000)]
    stop = threading.Event()
    good: list[bool] = []

    def post_good_images() -> None:
        while not stop.is_set():
            answer = server.post("/score", {"input_data": [GOOD]})
            good.append(answer.status == 200 and is_close(answer.json()[0]["probs"], scores[0]))

    def send(job: tuple[str, int]) -> str | None:
        name, seed = job
        draw, expected = HOSTILE[name]
        raw = server.raw(draw(random.Random(seed)))
        status = parse_status(raw)
        if status not in expected:
            return f"{name}: {raw[:300]!r}"
        _, _, body = raw.partition(b"\r\n\r\n")
        if status != 200 and not {"code", "message", "index"} <= set(json.loads(body)["error"]):
            return f"{name}: {body[:300]!r}"
        return None

    thread = threading.Thread(target=post_good_images)
    thread.start()
    with ThreadPoolExecutor(8) as pool:
        wrong = [failure for failure in pool.map(send, jobs) if failure]
    stop.set()
    thread.join()
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"
    assert good
    assert all(good)
    assert server.process.poll() is None


def test_slow_body_gets_408(server: Server) -> None:
    """A slow body is ended after --body-timeout (2 s), and delays no other request."""
    start = time.monotonic()
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(server.raw, head, b"{", 1.0, b"x", 1.5, b"x") for _ in range(20)]
        assert server.photo("/classify", PHOTOS[0]).status == 200
        assert time.monotonic() - start < 1.5
        for future in slow:
            assert parse_status(future.result()) == 408
    assert time.monotonic() - start < 10


def test_bodies_beyond_max_pending_get_429() -> None:
    """Each body is within its limit, and both together are not."""
    with Server("--max-pending-mib", 1, "--max-body-mib", 1) as server:
        half = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 700000\r\n\r\n" + b"x" * 600_000
        with socket.create_connection(server.address) as sock:
            sock.sendall(half)
            time.sleep(0.3)
            assert parse_status(server.raw(half)) == 429
            assert server.photo("/classify", PHOTOS[0]).status == 200
            sock.sendall(b"x" * 100_000)
            assert parse_status(sock.recv(1000)) == 400  # the body is not JSON
        assert server.photo("/classify", b"x" * 900_000).status == 400  # all bytes are released


def test_disconnected_clients_leave_no_backlog(server: Server) -> None:
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
def test_too_long_body_gets_413_before_the_connection_closes(
    server: Server, mebibytes: int
) -> None:
    """A client that sends all of it before it reads gets the answer too."""
    answer = server.request("/score", b"A" * (mebibytes << 20), "application/json")
    assert (answer.status, answer.code) == (413, "too_large")
    assert server.photo("/classify", PHOTOS[0]).status == 200


def test_truncated_form_gets_400(server: Server) -> None:
    body, kind = encode_form(*PHOTOS[:2])
    assert len(server.request("/classify", body, kind).json()["predictions"]) == 2
    for cut in (len(body) - 3, len(body) - 60, len(body) // 2, 100):
        answer = server.request("/classify", body[:cut], kind)
        assert (answer.status, answer.code) == (400, "bad_request")


def test_more_images_than_the_queue_holds_get_413() -> None:
    with Server("--max-queue", 3) as server:
        for answer in (
            server.post("/score", {"input_data": [GOOD] * 4}),
            server.request("/classify", *encode_form(*PHOTOS[:4])),
        ):
            assert (answer.status, answer.code) == (413, "too_many_images")
        assert server.post("/score", {"input_data": [GOOD] * 3}).status == 200


def test_connection_beyond_limit_gets_429() -> None:
    with Server("--max-connections", 3) as server:
        sockets = [socket.create_connection(server.address) for _ in range(3)]
        time.sleep(0.2)
        answer = server.photo("/classify", PHOTOS[0])
        assert (answer.status, answer.code) == (429, "overloaded")
        for sock in sockets:
            sock.close()
        time.sleep(0.2)
        assert server.photo("/classify", PHOTOS[0]).status == 200


def test_pipelined_requests_get_their_statuses(server: Server) -> None:
    """Several requests in a single write; the second is refused."""
    good = score({"input_data": [GOOD]}).replace(b"Connection: close\r\n", b"")
    bad = score({"input_data": []}).replace(b"Connection: close\r\n", b"")
    raw = server.raw(good, bad, good, score({"input_data": [GOOD]}))
    assert [int(x[:3]) for x in raw.split(b"HTTP/1.1 ")[1:]] == [200, 400, 200, 200]


# --- API keys -------------------------------------------------------------------------------------


def test_requests_without_valid_key_get_401(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# comment\n\nfirst-key\nsecond-key \n")
    with Server("--api-key-file", file) as server:
        for path in ("/", "/page/app.js", "/health", "/ready", "/version"):
            assert server.get(path).status == 200
        for headers in (
            {}, {"Authorization": "Bearer no"}, {"Authorization": "first-key"},
            {"X-API-Key": "first-ke"}, {"X-API-Key": ""}, {"Authorization": "Basic first-key"},
            {"X-API-Key": "# comment"},
        ):  # fmt: skip
            answer = server.request("/classify", PHOTOS[0], "image/png", **headers)
            assert (answer.status, answer.code) == (401, "unauthorized"), headers
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.get("/metrics").status == 401
        for headers in (
            {"Authorization": "Bearer first-key"}, {"Authorization": "bearer second-key"},
            {"X-API-Key": "second-key"},
        ):  # fmt: skip
            assert server.request("/classify", PHOTOS[0], "image/png", **headers).status == 200
        api = server.get("/openapi.json", **{"X-API-Key": "first-key"}).json()
        assert api["components"]["securitySchemes"] == {
            "HTTPBearer": {"type": "http", "scheme": "bearer"}
        }
        assert "security" in api["paths"]["/classify"]["post"]


def test_key_in_utf8(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("clé-ключ\n", encoding="utf-8")
    with Server("--api-key-file", tmp_path / "keys") as server:
        for key, status in (("clé-ключ", 200), ("clé", 401)):
            headers = {"X-API-Key": key.encode("utf-8").decode("latin-1")}  # bytes as they are sent
            assert server.request("/classify", PHOTOS[0], "image/png", **headers).status == status
