"""Run a server: socket, model, processes and signals.

Mistakes are reported before the server listens: the port, the keys, the model. With several workers
each is a process with its own model and its share of the cores, behind one common socket.
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
    import uvicorn
    from fastapi import FastAPI

    from vitlib.predict.predictor import Predictor
    from vitlib.serve.settings import Settings

logger = logging.getLogger("vitlib")
BACKLOG = 2048  # connections that the system accepts before the server does
KEEP_ALIVE = 75  # seconds that an idle connection stays open
SPARE_SECONDS = 5  # after drain_timeout, to write the answers with status 503
MAX_KEYS_BYTES = 2**20
Load = Callable[[str | None], "Predictor"]  # device -> predictor


def read_keys(path: Path) -> tuple[str, ...]:
    """Read API keys from a file.

    Args:
        path: A text file in UTF-8 with a key in each line. Empty lines and lines that start with #
            are left out.

    Returns:
        The keys, at least one.

    Raises:
        ServeError: The file cannot be read, is too large, or has no key.
    """
    try:
        if path.stat().st_size > MAX_KEYS_BYTES:
            raise ServeError(f"{path}: expected a key in each line, at most {MAX_KEYS_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text in UTF-8"
        raise ServeError(f"the keys' file {str(path)!r} cannot be read: {why}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ServeError(f"{path} has no key: expected one in each line")
    return keys


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket, without listening yet: clients are refused until the model is loaded.

    Args:
        host: A name or address.
        port: The port; 0 takes a free one.

    Returns:
        The socket.

    Raises:
        ServeError: The port is taken, or the address does not belong to this machine.
    """
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = entries[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.set_inheritable(True)
    except OSError as error:
        why = error.strerror or str(error)
        raise ServeError(f"cannot listen on {host}:{port}: {why}") from error
    return sock


def _listen(sock: socket.socket) -> None:
    """Listen; raise ServeError where another process took the port while the model was loaded."""
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def build(load: Load, devices: Sequence[str | None], settings: Settings, name: str) -> FastAPI:
    """Load the model for each device, and make the app.

    Args:
        load: Loads the model on a device.
        devices: The devices; None is the default one.
        settings: The server's settings.
        name: The model's name in /version.

    Returns:
        The app.

    Raises:
        VitlibError: As `load` does.
    """
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
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer the accepted requests.

    Args:
        make: Builds the app, in this process or in each worker.
        sock: The socket from bind().
        settings: The server's settings.
        workers: The number of processes.
        check: Called before several workers start; raises the errors that `make` would raise.
        on_start: Called when the server listens.
    """
    if workers > 1:
        if check is not None:
            check()
        _serve_in_workers(make, sock, settings, workers, on_start)
        return
    app = make()
    _listen(sock)
    # Objects of the model live as long as the process: the collector need not visit them again.
    gc.collect()
    gc.freeze()
    _serve_here(app, sock, settings, on_start)


def count_gpus() -> int:
    """Count the GPUs without initialising CUDA, which does not work in forked workers.

    Returns:
        The number of GPUs.
    """
    import torch

    return torch.cuda.device_count()


def check_model(load: Callable[[], object]) -> None:
    """Load the model in a process of its own, to find errors before workers start.

    The workers are forked from this process, in which torch must not have started threads.

    Args:
        load: Loads the model.

    Raises:
        ServeError: With the message of the error that `load` raised.
    """
    import multiprocessing

    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = os.fork()
    if not process:
        try:
            load()
            sender.send("")
        except VitlibError as error:
            sender.send(str(error))
        finally:
            sender.close()
            os._exit(0)
    # The child has the only open end now, so that recv() ends if the child is killed.
    sender.close()
    try:
        message = receiver.recv()
    except EOFError:
        message = "the process that tried to load the model was killed: is there enough memory?"
    os.waitpid(process, 0)
    if message:
        raise ServeError(message)


def _serve_here(
    app: Any, sock: socket.socket, settings: Settings, on_start: Callable[[], None]
) -> None:
    """Serve in this process."""
    import uvicorn

    from vitlib.serve import access_log
    from vitlib.serve.guard import HardenedProtocol

    class Protocol(HardenedProtocol):
        max_connections = settings.limits.max_connections
        head_seconds = min(HardenedProtocol.head_seconds, settings.limits.body_timeout)
        origins = settings.allow_origins
        log_refusal = staticmethod(access_log.log_request) if settings.access_log else None

    if settings.access_log:
        access_log.start()
    config = uvicorn.Config(
        access_log.AccessLog(app) if settings.access_log else app,
        http=Protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=settings.limits.drain_timeout + SPARE_SECONDS,
    )
    logging.getLogger("uvicorn.error").addFilter(escape_record)  # its tracebacks quote requests

    server = _make_server(config, app, settings, on_start)

    # uvicorn raises the signal again after a clean shutdown: this handler then keeps status 0.
    def end(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    server.run(sockets=[sock])


def _make_server(
    config: uvicorn.Config, app: Any, settings: Settings, on_start: Callable[[], None]
) -> uvicorn.Server:
    """Make a server that calls `on_start`, and starts the app's drain when it ends."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_start()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            drain = getattr(getattr(app, "state", None), "drain", None)
            if drain is not None:
                drain(settings.limits.drain_timeout)
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: Any) -> None:
            # Ctrl-C twice: exit without answers.
            if self.should_exit and sig == signal.SIGINT:
                os._exit(128 + sig)
            super().handle_exit(sig, frame)

    return Server(config)


def _serve_in_workers(
    make: Callable[[], FastAPI],
    sock: socket.socket,
    settings: Settings,
    workers: int,
    on_start: Callable[[], None],
) -> None:
    """Serve in several processes, which share the socket and a folder of metrics."""
    from vitlib.serve.metrics import DIRECTORY

    with tempfile.TemporaryDirectory(prefix="vitlib-serve-") as folder:
        # Before prometheus-client is imported in a worker.
        os.environ[DIRECTORY] = folder
        # Connections wait in the backlog until the first worker is ready.
        _listen(sock)
        from vitlib.serve.workers import Workers

        work = partial(_run_worker, make, sock, settings)
        Workers(work, workers, sock.close).run(on_start)


def _run_worker(make: Callable[[], FastAPI], sock: socket.socket, settings: Settings) -> None:
    """Serve in a worker process."""
    _serve_here(make(), sock, settings, lambda: None)
