"""The folder of a run: run.json states the run it belongs to, and no other run may take it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vitlib.data.photos import join_names, short
from vitlib.errors import TrainError
from vitlib.system.atomic import open_atomic
from vitlib.train.resume import list_checkpoints

RUN = "run.json"
FORMAT = "vitlib run 1"


def check_folder(out: Path, resume: bool) -> dict[str, Any] | None:
    """Check that a run can use a folder.

    Args:
        out: The folder, which need not exist.
        resume: Continue the run that it holds.

    Returns:
        The content of run.json; None if the folder is empty or absent and can be written.

    Raises:
        TrainError: It holds a run and `resume` is false, or it holds other files, or it cannot be
            read or written.
    """
    marker = out / RUN
    try:
        if not marker.is_file():
            _check_empty(out)
            return None
        if not resume and list_checkpoints(out):
            raise TrainError(
                f"{out} holds a run already: go on with it (resume=True, --resume), or name "
                "another folder"
            )
        if not resume:
            raise TrainError(
                f"{out} holds a run that has no checkpoint yet: if it has ended, delete the "
                "folder; or name another"
            )
        description = json.loads(marker.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainError(f"{out} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        description = None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise TrainError(
            f"{marker} is damaged or of another version: name another folder for this run"
        )
    return description


def _check_empty(out: Path) -> None:
    """Raise TrainError for a folder that is not empty, or that cannot be made or written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainError(f"{out} is not an empty folder: name another for this run")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise TrainError(f"{out} cannot be made: {parent} is no folder to write to")


def claim_folder(out: Path, description: dict[str, Any], resume: bool) -> None:
    """Create the folder with its run.json, or check that it holds the same run.

    Args:
        out: The folder.
        description: The run: its model, data and settings.
        resume: Continue the run that it holds.

    Raises:
        TrainError: As in check_folder; or the folder holds a run of another description.
    """
    previous = check_folder(out, resume)
    if previous is None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(f"{out} cannot be made: {error.strerror or error}") from error
        text = json.dumps(description, indent=2, ensure_ascii=False)
        with open_atomic(out / RUN) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
        return
    compared = description.keys() - {"arguments"}
    changed = [k for k in description if k in compared and previous.get(k) != description[k]]
    if "config" in changed:
        changed += _list_changes(previous.get("config"), description["config"])
    if changed:
        raise TrainError(
            f"{out} holds a run with another {join_names(changed, 8)}: to go on, all must be the "
            "same; name another folder for another run"
        )


def describe_arguments(**arguments: Any) -> dict[str, Any]:
    """Describe the arguments of finetune() that are text or numbers, to continue a run with them.

    Args:
        **arguments: The arguments by name; sets and models in memory are left out.

    Returns:
        Values of JSON.
    """
    paths = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in arguments.items()}
    return {
        name: value
        for name, value in paths.items()
        if value and isinstance(value, str | int | float | list | tuple | dict)
    }


def _list_changes(before: Any, after: dict[str, Any]) -> list[str]:
    """List the settings that differ, each with its value in the run."""

    def get(holder: Any, key: str) -> Any:
        return holder.get(key) if isinstance(holder, dict) else None

    return [
        f"{name} ({short(json.dumps(get(get(before, part), name)))})"
        for part, values in after.items()
        for name, value in values.items()
        if get(get(before, part), name) != value
    ]
