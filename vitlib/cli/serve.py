"""The verb `vitlib serve`: answer requests over HTTP."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vitlib.cli.compiling import check_compile, compile_option, print_compiling
from vitlib.cli.options import (
    DEFAULT_MODEL,
    ModelOptions,
    calibration_option,
    device_options,
    precision_options,
    subject_option,
)
from vitlib.cli.predictors import mute_libraries, open_predictor, print_calibration
from vitlib.cli.printing import echo, fail
from vitlib.cli.verb import Verb, positional_arguments
from vitlib.errors import ConfigError, ServeError
from vitlib.serve.settings import Limits, Settings
from vitlib.system.requirements import check_extra, import_extra

if TYPE_CHECKING:
    from vitlib.predict.predictor import Predictor

F = TypeVar("F", bound=Callable[..., Any])
NEEDED = ("fastapi", "starlette", "uvicorn", "httptools", "python-multipart", "urllib3")


def limit_options(command: F) -> F:
    """Add an option for each field of Limits.

    Args:
        command: function of the verb.

    Returns:
        The command with the options.
    """
    for field in reversed(fields(Limits)):
        about = field.metadata
        command = click.option(
            "--" + field.name.replace("_", "-"),
            type=click.IntRange(about["low"], about["high"]),
            metavar="N",
            default=field.default,
            show_default=True,
            help=about["help"],
        )(command)
    return command


@click.command(
    cls=Verb,
    examples=("vitlib serve demo", "vitlib serve mine --port 8080 --precision int8"),
    headings={
        **dict.fromkeys(("host", "port", "api_key_file"), "Server"),
        **dict.fromkeys(("allow_urls", "allow_private_urls", "allow_origins"), "Server"),
        "access_log": "Server",
        **dict.fromkeys((field.name for field in fields(Limits)), "Limits"),
    },
)
@positional_arguments("[MODEL]")
@subject_option
@click.option(
    "--host",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 for every network.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    default=8000,
    show_default=True,
    help="Port; 0 for any free one.",
)
@click.option(
    "--workers", type=click.IntRange(1, 256), metavar="N", default=1, show_default=True,
    help="Processes, each with the model and its share of the cores.",
)  # fmt: skip
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="File with an API key a line; a request must have one of them. Default: no keys.",
)
@click.option(
    "--allow-urls", multiple=True, metavar="HOST",
    help="Fetch photos from this host: a name, *.NAME, either with :PORT, or *. Separate several "
    "by commas, or repeat the option.",
)  # fmt: skip
@click.option("--allow-private-urls", is_flag=True, help="Allow hosts in private networks as well.")
@click.option(
    "--cors-origin", "--allow-origin", "allow_origins", multiple=True, metavar="ORIGIN",
    help="Origin whose pages may use the server from a browser (https://www.example.com, or * for "
    "all); may be repeated.  [default: none]",
)  # fmt: skip
@click.option("--access-log", is_flag=True, help="Write a line for each request on stderr.")
@limit_options
@device_options
@precision_options
@compile_option("The server starts some minutes later.")
@calibration_option
def serve(
    host: str,
    port: int,
    workers: int,
    api_key_file: Path | None,
    allow_urls: tuple[str, ...],
    allow_private_urls: bool,
    allow_origins: tuple[str, ...],
    access_log: bool,
    options: ModelOptions,
    **limits: int,
) -> None:
    """Answer requests over HTTP, with a page to try it.

    MODEL is a hub id, a folder or a weights file; google/vit-base-patch16-224 by default. POST
    /score takes requests of Azure's model catalog; / is the page, /docs documents the others.
    """
    options = replace(options, model=options.model or DEFAULT_MODEL)
    for package in NEEDED:
        import_extra("serve", package, f"serving needs {package}", kind=ServeError)
    # Where it is imported before its folder is set, it counts each process alone.
    check_extra("serve", "prometheus-client", "serving needs prometheus-client", ServeError)
    from vitlib.serve import run

    if options.precision == "auto" and options.calibrate is None:
        raise click.UsageError("--precision auto needs --calibrate, photos to choose by")
    if options.compile:
        check_compile(options.model, options.image_size)
        if workers > 1:
            raise click.UsageError(
                "--compile is for one process, which uses all cores: leave it or --workers out"
            )
    keys = () if api_key_file is None else run.read_keys(api_key_file)
    settings = Settings(
        limits=Limits(**limits),
        api_keys=keys,
        allow_urls=tuple(host for hosts in allow_urls for host in hosts.split(",")),
        allow_private_urls=allow_private_urls,
        allow_origins=allow_origins,
        access_log=access_log,
    )
    devices = _choose_devices(options, workers)
    mute_libraries()
    # Clients must not learn the path of a local model.
    local = Path(options.model).exists()
    name = Path(options.model).resolve().name if local else options.model
    with run.bind(host, port) as sock:
        try:
            run.serve(
                lambda: run.build(partial(_load, options, workers), devices, settings, name),
                sock,
                settings,
                workers=workers,
                check=lambda: run.check_model(lambda: _load(options, 1, "cpu")),
                on_start=lambda: _print_address(sock.getsockname(), name),
            )
        except KeyboardInterrupt:  # before the server listens
            fail("interrupted")
            # The thread that loads a model cannot be stopped. Python would unwind its stack as the
            # process ends, at which torch aborts: a message of C++, and status 134.
            os._exit(128 + signal.SIGINT)


def _choose_devices(options: ModelOptions, workers: int) -> list[str | None]:
    """Return the devices of the models; raise ConfigError for several workers on a GPU."""
    from vitlib.serve import run

    devices: list[str | None] = [*options.device.split(",")] if options.device else [None]
    if workers > 1 and (len(devices) > 1 or (devices[0] or "cpu") != "cpu"):
        raise ConfigError(
            "several workers are for a CPU: with GPUs name them, --device cuda:0,cuda:1"
        )
    if workers > 1 and devices == [None] and run.count_gpus():
        raise ConfigError(
            f"--workers {workers} would be {workers} processes on one GPU: give --device cuda:0 "
            "without --workers (several GPUs: --device cuda:0,cuda:1), or --device cpu"
        )
    return devices


def _load(options: ModelOptions, workers: int, device: str | None) -> Predictor:
    """Load and optimize the model of one process."""
    import torch

    from vitlib.system.cores import count_cores

    if workers > 1:
        torch.set_num_threads(max(count_cores() // workers, 1))
    predictor = open_predictor(replace(options, device=device or options.device))
    predictor.fast()
    if options.compile:
        print_compiling("for every size of batch: the server answers in some minutes")
    print_calibration(predictor)
    return predictor


def _print_address(address: Any, model: str) -> None:
    """Print the URL of the server."""
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    echo(f"{model}: http://{host}:{address[1]}", err=True)
