"""vitlib serve"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vitlib.cli.options import (
    ModelOptions,
    calibration_option,
    model_option,
    open_predictor,
    place_options,
    precision_options,
    quiet,
    tell_calibration,
)
from vitlib.cli.printing import echo
from vitlib.errors import ConfigError, ServeError
from vitlib.serve.settings import Limits, Settings

if TYPE_CHECKING:
    from vitlib.predict.predictor import Predictor

F = TypeVar("F", bound=Callable[..., Any])
NEEDED = ("fastapi", "uvicorn", "httptools", "prometheus_client", "python_multipart", "urllib3")


def limit_options(command: F) -> F:
    """A flag for each of Limits."""
    for one in reversed(fields(Limits)):
        about = one.metadata
        command = click.option(
            "--" + one.name.replace("_", "-"),
            type=click.IntRange(about["low"], about["high"]),
            default=one.default,
            show_default=True,
            help=about["help"],
        )(command)
    return command


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: every network.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any."
)
@click.option(
    "--workers", type=click.IntRange(1, 256), default=1, show_default=True,
    help="Processes, each with the model and its share of the cores.",
)  # fmt: skip
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="A key a line; requests must bring one. Default: none is asked for.",
)
@click.option(
    "--allow-urls", multiple=True, metavar="HOST",
    help="Fetch photos from this host: a name, *.NAME, either with :PORT, or *. Several: commas, "
    "or the option again.",
)  # fmt: skip
@click.option("--allow-private-urls", is_flag=True, help="Also where it is in a private network.")
@click.option(
    "--allow-origin", "allow_origins", multiple=True, metavar="ORIGIN",
    help="Let pages of this origin (https://www.example.com, or * for all) use the server from a "
    "browser. Several: the option again.  [default: none]",
)  # fmt: skip
@limit_options
@model_option
@place_options
@precision_options
@calibration_option
def serve(
    host: str,
    port: int,
    workers: int,
    api_key_file: Path | None,
    allow_urls: tuple[str, ...],
    allow_private_urls: bool,
    allow_origins: tuple[str, ...],
    asked: ModelOptions,
    **limits: int,
) -> None:
    """Answer photos over HTTP, and show a page to try it.

    POST /score takes the model card's requests; / is the page, /docs all the rest.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ServeError(f"serving needs {missing[0]}: pip install 'vitlib[serve]'")
    from vitlib.serve import run

    if asked.precision == "auto" and asked.calibrate is None:
        raise click.UsageError("--precision auto needs --calibrate, photos to choose by")
    keys = () if api_key_file is None else run.read_keys(api_key_file)
    settings = Settings(
        limits=Limits(**limits),
        api_keys=keys,
        allow_urls=tuple(host for given in allow_urls for host in given.split(",")),
        allow_private_urls=allow_private_urls,
        allow_origins=allow_origins,
    )
    devices = (asked.device or "").split(",") if asked.device else [None]
    if workers > 1 and (len(devices) > 1 or (devices[0] or "cpu") != "cpu"):
        raise ConfigError(
            "several workers are for a CPU: with GPUs name them, --device cuda:0,cuda:1"
        )
    if workers > 1 and devices == [None] and run.count_gpus():
        raise ConfigError(
            f"--workers {workers} would be {workers} processes on one GPU: give --device cuda:0 "
            "without --workers (several GPUs: --device cuda:0,cuda:1), or --device cpu"
        )
    quiet()
    local = Path(asked.model).exists()  # then clients are not told where it lies
    name = Path(asked.model).resolve().name if local else asked.model
    with run.listen(host, port) as sock:
        run.serve(
            lambda: run.build(partial(_load, asked, workers), devices, settings, name),
            sock,
            settings,
            workers=workers,
            check=lambda: run.check_model(lambda: _load(asked, 1, "cpu")),
            started=lambda: _say(sock.getsockname(), name),
        )


def _load(asked: ModelOptions, workers: int, device: str | None) -> Predictor:
    import os

    import torch

    if workers > 1:
        torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    predictor = open_predictor(replace(asked, device=device or asked.device))
    predictor.fast()
    tell_calibration(predictor)
    return predictor


def _say(address: Any, model: str) -> None:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    echo(f"{model}: http://{host}:{address[1]}", err=True)
