"""HTTP clients of the serving benchmark, with prebuilt requests and persistent connections.

They use only the standard library and little processor time.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple


class Response(NamedTuple):
    """Response to a scheduled request; times count from the start of the load.

    Attributes:
        status: HTTP status; 0 if the connection failed.
        due_seconds: Time at which the request was due.
        done_seconds: Time at which the response was complete.
    """

    status: int
    due_seconds: float
    done_seconds: float


class Connection:
    """Persistent HTTP connection to a local port."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sock: socket.socket | None = None
        self.buffer = b""

    def send(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and return the status and the body.

        The connection is reopened if the server has closed it while it was idle.
        """
        if self.sock is not None:
            try:
                return self._exchange(request)
            except OSError:
                self.close()
        self.sock = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._exchange(request)

    def _exchange(self, request: bytes) -> tuple[int, bytes]:
        assert self.sock is not None
        self.sock.sendall(request)
        while b"\r\n\r\n" not in self.buffer:
            self._receive()
        header, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = header.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        while len(self.buffer) < length:
            self._receive()
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        if b"connection: close" in lines:
            self.close()
        return int(header.split(b" ", 2)[1]), body

    def _receive(self) -> None:
        assert self.sock is not None
        chunk = self.sock.recv(262144)
        if not chunk:
            raise ConnectionError("the server closed the connection")
        self.buffer += chunk

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
        self.sock, self.buffer = None, b""


def post_request(
    body: bytes, path: str = "/score", content_type: str = "application/json"
) -> bytes:
    """Build a POST request."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


class ClosedLoop:
    """Clients that each send the next request as soon as the last one is answered.

    Their connections stay open between measurements.
    """

    def __init__(self, port: int, requests: Sequence[bytes], num_clients: int) -> None:
        self.requests = requests
        self.connections = [Connection(port) for _ in range(num_clients)]

    def measure_rate(self, seconds: float) -> float:
        """Return the responses per second over some seconds.

        Raises:
            RuntimeError: A connection failed, or a status was not 200.
        """
        deadline = time.perf_counter() + seconds
        num_done = [0] * len(self.connections)
        failures: list[object] = []

        def run(client: int) -> None:
            connection = self.connections[client]
            request_index = client
            while time.perf_counter() < deadline:
                try:
                    status, _ = connection.send(self.requests[request_index % len(self.requests)])
                except OSError as error:
                    failures.append(error)
                    return
                request_index += len(self.connections)
                num_done[client] += 1
                if status != 200:
                    failures.append(status)

        start = time.perf_counter()
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(self.connections))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - start
        if failures:
            raise RuntimeError(f"expected only status 200, got {set(map(str, failures))}")
        return sum(num_done) / elapsed


def poisson_load(
    port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0
) -> list[Response]:
    """Send requests at the times of a Poisson process, without waiting for responses.

    Args:
        port: Port of the server.
        requests: Requests, used in turn.
        rate: Mean requests per second.
        seconds: Duration.
        seed: Seed of the arrival times.

    Returns:
        Responses in the order in which they were due.
    """
    rng = random.Random(seed)
    arrivals, arrival = [], 0.0
    while (arrival := arrival + rng.expovariate(rate)) < seconds:
        arrivals.append(arrival)
    responses: list[Response] = []
    idle: list[Connection] = []
    lock = threading.Lock()
    start = time.perf_counter() + 0.1

    def send_request(request_index: int) -> None:
        due = start + arrivals[request_index]
        with lock:
            connection = idle.pop() if idle else Connection(port)
        try:
            status, _ = connection.send(requests[request_index % len(requests)])
        except OSError:
            status = 0
            connection.close()
        done = time.perf_counter()
        with lock:
            idle.append(connection)
            responses.append(Response(status, due - start, done - start))

    threads = []
    for request_index, due in enumerate(arrivals):
        wait = start + due - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        thread = threading.Thread(target=send_request, args=(request_index,))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return sorted(responses, key=lambda response: response.due_seconds)


def ideal_queue(
    arrivals: Sequence[float], services: Sequence[float], max_batch: int
) -> list[float]:
    """Simulate the latencies of a queue whose only cost is service.

    A free server takes all waiting requests, up to max_batch.

    Args:
        arrivals: Seconds at which requests arrive, ascending.
        services: Seconds to serve a batch of 1, 2, ... requests.
        max_batch: Largest batch.

    Returns:
        Latency of each request in seconds.
    """
    latencies: list[float] = []
    free_at, first = 0.0, 0
    while first < len(arrivals):
        start = max(free_at, arrivals[first])
        batch_size = 0
        while (
            first + batch_size < len(arrivals)
            and arrivals[first + batch_size] <= start
            and batch_size < max_batch
        ):
            batch_size += 1
        free_at = start + services[batch_size - 1]
        latencies += [free_at - arrivals[first + i] for i in range(batch_size)]
        first += batch_size
    return latencies
