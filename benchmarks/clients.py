"""Clients of the serving benchmark: requests made beforehand, sockets that stay open, little work.

Standard library only.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple


class Told(NamedTuple):
    """An answer's status, and when its request was due and answered, seconds."""

    status: int
    due: float
    answered: float


class Connection:
    """One open socket."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sock: socket.socket | None = None
        self.left = b""

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request, and return status and body.

        Where the server has closed an idle connection, which it may, another is opened.
        """
        if self.sock is not None:
            try:
                return self._asked(request)
            except OSError:
                self.close()
        self.sock = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._asked(request)

    def _asked(self, request: bytes) -> tuple[int, bytes]:
        assert self.sock is not None
        self.sock.sendall(request)
        while b"\r\n\r\n" not in self.left:
            self._more()
        head, _, self.left = self.left.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        while len(self.left) < length:
            self._more()
        body, self.left = self.left[:length], self.left[length:]
        if b"connection: close" in lines:
            self.close()
        return int(head.split(b" ", 2)[1]), body

    def _more(self) -> None:
        assert self.sock is not None
        chunk = self.sock.recv(262144)
        if not chunk:
            raise ConnectionError("the server hung up")
        self.left += chunk

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
        self.sock, self.left = None, b""


def request_of(body: bytes, path: str = "/score", kind: str = "application/json") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


class Crowd:
    """Clients that each ask again as soon as they are answered; their sockets outlive a turn."""

    def __init__(self, port: int, requests: Sequence[bytes], count: int) -> None:
        self.requests = requests
        self.connections = [Connection(port) for _ in range(count)]

    def turn(self, seconds: float) -> float:
        """Requests answered with 200 a second. Raises where another answer came."""
        until = time.perf_counter() + seconds
        done = [0] * len(self.connections)
        wrong: list[object] = []

        def run(which: int) -> None:
            connection = self.connections[which]
            number = which
            while time.perf_counter() < until:
                try:
                    status, _ = connection.ask(self.requests[number % len(self.requests)])
                except OSError as error:
                    wrong.append(error)
                    return
                number += len(self.connections)
                done[which] += 1
                if status != 200:
                    wrong.append(status)

        start = time.perf_counter()
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(self.connections))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - start
        if wrong:
            raise RuntimeError(f"answers other than 200: {set(map(str, wrong))}")
        return sum(done) / took


def poisson(
    port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0
) -> list[Told]:
    """Requests at a rate, each when it is due whatever became of those before it."""
    drawn = random.Random(seed)
    dues, at = [], 0.0
    while (at := at + drawn.expovariate(rate)) < seconds:
        dues.append(at)
    told: list[Told] = []
    free: list[Connection] = []
    lock = threading.Lock()
    start = time.perf_counter() + 0.1

    def ask(number: int) -> None:
        due = start + dues[number]
        with lock:
            connection = free.pop() if free else Connection(port)
        try:
            status, _ = connection.ask(requests[number % len(requests)])
        except OSError:
            status = 0
            connection.close()
        answered = time.perf_counter()
        with lock:
            free.append(connection)
            told.append(Told(status, due - start, answered - start))

    threads = []
    for number, due in enumerate(dues):
        wait = start + due - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        thread = threading.Thread(target=ask, args=(number,))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return sorted(told, key=lambda one: one.due)


def ideal_queue(
    arrivals: Sequence[float], services: Sequence[float], max_batch: int
) -> list[float]:
    """Simulate the latencies of a queue whose only cost is service.

    A free server takes all waiting requests, up to max_batch, and is busy for services[size - 1]
    seconds.
    """
    latencies: list[float] = []
    free, at = 0.0, 0
    while at < len(arrivals):
        begin = max(free, arrivals[at])
        size = 0
        while at + size < len(arrivals) and arrivals[at + size] <= begin and size < max_batch:
            size += 1
        free = begin + services[size - 1]
        latencies += [free - arrivals[at + i] for i in range(size)]
        at += size
    return latencies
