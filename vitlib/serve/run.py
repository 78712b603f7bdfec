"""A server from the first moment to the last: socket, model, processes, signals.

What can be wrong is found before it listens: the port, the keys, the model. With several workers
each is a process with its own model and its share of the cores, and the socket is theirs together.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlib.errors import ServeError, VitlibError
from vitlib.system.terminal import escape_record

if TYPE_CHECKING:
    from fastapi import FastAPI

    from vitlib.predict.predictor import Predictor
    from vitlib.serve.settings import Settings

logger = logging.getLogger("vitlib")
BACKLOG = 2048  # connections that the system holds until they are taken
KEEP_ALIVE = 75  # seconds that an idle connection stays open
SPARE = 5  # seconds for the answers of a drain that has run out of time
MOST_KEYS_BYTES = 2**20
Load = Callable[[str | None], "Predictor"]  # a device -> the model, ready to be made fast


def read_keys(path: Path) -> tuple[str, ...]:
    """A key a line; empty lines and those that start with # are none. Raises ServeError."""
    try:
        if path.stat().st_size > MOST_KEYS_BYTES:
            raise ServeError(f"{path}: expected a key a line, at most {MOST_KEYS_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text in UTF-8"
        raise ServeError(f"the keys' file {str(path)!r} cannot be read: {why}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ServeError(f"{path} holds no key: expected one a line")
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A socket that is ours, not yet listening. Raises ServeError where the port is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.set_inheritable(True)
    except OSError as error:
        why = error.strerror or str(error)
        raise ServeError(f"cannot listen on {host}:{port}: {why}") from error
    return sock


def _listen(sock: socket.socket) -> None:
    """Raises ServeError where another process has taken the port while the model was loaded."""
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def build(load: Load, devices: Sequence[str | None], settings: Settings, name: str) -> FastAPI:
    """The model, once for each device, and the app around it. Raises what loading raises."""
    from vitlib.serve.app import create_app
    from vitlib.serve.core import Core
    from vitlib.serve.dispatcher import Dispatcher
    from vitlib.serve.metrics import ServerMetrics

    def make(device: str | None) -> Core:
        return Core(load(device), max_pixels=settings.limits.max_pixels)

    makers = [partial(make, device) for device in devices]
    return create_app(Dispatcher(makers, settings, ServerMetrics()), settings, name)


def serve(
    make: Callable[[], FastAPI],
    sock: socket.socket,
    settings: Settings,
    *,
    workers: int = 1,
    check: Callable[[], object] | None = None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer all that was accepted.

    make: builds the app, in this process or in each worker. check: with several workers, raises
    before any starts what `make` would raise in each. started: called when it listens.
    """
    if workers > 1:
        if check is not None:
            check()
        _several(make, sock, settings, workers, started)
        return
    app = make()
    _listen(sock)
    gc.collect()
    gc.freeze()
    _one(app, sock, settings, started)


def count_gpus() -> int:
    """Return how many GPUs there are, without taking hold of one: workers are forked later."""
    import torch

    return torch.cuda.device_count()


def check_model(load: Callable[[], object]) -> None:
    """Load the model in a process of its own and forget it: the workers are forked from this one,
    which must not have made threads. Raises ServeError with what was wrong."""
    import multiprocessing

    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = os.fork()
    if not process:
        try:
            load()
            theirs.send("")
        except VitlibError as error:
            theirs.send(str(error))
        finally:
            theirs.close()
            os._exit(0)
    theirs.close()
    try:
        wrong = ours.recv()
    except EOFError:
        wrong = "the process that tried to load the model was killed: is there enough memory?"
    os.waitpid(process, 0)
    if wrong:
        raise ServeError(wrong)


def _one(app: Any, sock: socket.socket, settings: Settings, started: Callable[[], None]) -> None:
    import uvicorn

    from vitlib.serve.guard import HardenedProtocol

    class Bounded(HardenedProtocol):
        max_connections = settings.limits.max_connections
        head_seconds = min(HardenedProtocol.head_seconds, settings.limits.body_timeout)
        origins = settings.allow_origins

    config = uvicorn.Config(
        app,
        http=Bounded,
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=settings.limits.drain_timeout + SPARE,
    )

    logging.getLogger("uvicorn.error").addFilter(escape_record)  # its tracebacks quote requests

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            draining = getattr(getattr(app, "state", None), "draining", None)
            if draining is not None:
                draining(settings.limits.drain_timeout)
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.should_exit and sig == signal.SIGINT:  # asked twice: without those that wait
                os._exit(128 + sig)
            super().handle_exit(sig, frame)

    server = Server(config)

    def end(*_: object) -> None:  # uvicorn raises the signal again when it has ended in good order
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    server.run(sockets=[sock])


def _several(
    make: Callable[[], FastAPI],
    sock: socket.socket,
    settings: Settings,
    workers: int,
    started: Callable[[], None],
) -> None:
    """Fork a process for each worker and start another where one dies; SIGTERM goes to all."""
    from vitlib.serve.metrics import DIRECTORY

    with tempfile.TemporaryDirectory(prefix="vitlib-serve-") as folder:
        os.environ[DIRECTORY] = folder
        _listen(sock)  # what comes before the first worker is ready waits
        from vitlib.serve.workers import Workers

        work = partial(_worker, make, sock, settings)
        Workers(work, workers, sock.close).run(started)


def _worker(make: Callable[[], FastAPI], sock: socket.socket, settings: Settings) -> None:
    _one(make(), sock, settings, lambda: None)
