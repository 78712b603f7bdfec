"""Start of the command line: help, completion and wrong use import neither torch nor NumPy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete

from vitlib.cli import VERBS, vitlib_command

# Runs command lines in one process; prints each exit status, and the heavy modules at the end.
SCRIPT = """
import contextlib, io, json, sys
from vitlib.cli import main
statuses = []
for line in json.loads(sys.argv[1]):
    sys.argv = ["vitlib", *line]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            statuses.append(stop.code)
print(json.dumps([statuses, sorted({"torch", "numpy", "PIL"} & sys.modules.keys())]))
"""


def run_lines(*lines: list[str]) -> tuple[list[int], list[str]]:
    """Run command lines in a new process; return their exit statuses and the heavy modules."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(lines)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    statuses, modules = json.loads(process.stdout)
    return statuses, modules


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_wrong_use_import_no_torch(verb: str) -> None:
    command = vitlib_command.get_command(click.Context(vitlib_command), verb)
    assert command is not None
    options = [p for p in command.params if isinstance(p, click.Option) and not p.is_flag]
    helps = [[verb, "--help"], [verb, "--help-all"], ["help", verb]]
    wrong = [[verb, "--no-such-option"], *([verb, option.opts[0]] for option in options)]
    wrong += [
        [verb, option.opts[0], "no such value"]
        for option in options
        if isinstance(option.type, click.Choice | click.IntRange | click.FloatRange)
    ]
    if verb not in ("serve", "info", "list", "bench", "doctor"):  # these run without an argument
        wrong.append([verb])
    statuses, modules = run_lines(*helps, *wrong)
    assert statuses == [0] * len(helps) + [2] * len(wrong)
    assert modules == []


def test_version_and_unknown_verb_import_no_torch() -> None:
    lines = [["--help"], ["--version"], [], ["clasify"], ["--no-such-option"]]
    assert run_lines(*lines) == ([0, 0, 2, 2, 2], [])


@pytest.mark.parametrize("words", ["vitlib ", "vitlib finetune --", "vitlib classify --precision "])
def test_completion_imports_no_torch(words: str) -> None:
    count = len(words.split(" ")) - 1
    environment = {"_VITLIB_COMPLETE": "bash_complete", "COMP_WORDS": words}
    script = (
        "import atexit, sys\n"
        "from vitlib.cli import main\n"
        "atexit.register(lambda: print({'torch', 'numpy', 'PIL'} & sys.modules.keys()))\n"
        "main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment, "COMP_CWORD": str(count)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = process.stdout.splitlines()
    assert len(lines) > 3
    assert lines[-1] == "set()"


@pytest.mark.parametrize(
    ("words", "typed", "kind", "values"),
    [
        (["classify"], "pho", "file", ["pho"]),
        (["classify", "-m"], "mi", "file", ["mi"]),
        (["evaluate", "mine"], "pho", "file", ["pho"]),
        (["finetune"], "pho", "file", ["pho"]),
        (["export", "demo", "-o"], "vi", "file", ["vi"]),
        (["list"], "vit", "plain", []),
        (["help"], "cl", "plain", ["classify"]),
        (["help"], "e", "plain", ["embed", "evaluate", "export"]),
    ],
)
def test_completion_offers_files_and_verbs(
    words: list[str], typed: str, kind: str, values: list[str]
) -> None:
    shell = BashComplete(vitlib_command, {}, "vitlib", "_VITLIB_COMPLETE")
    items = shell.get_completions(words, typed)
    assert [item.value for item in items] == values
    assert {item.type for item in items} <= {kind}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "completion"),
    [(["--help"], ""), (["classify", "--help"], ""), ([], "bash_source")],
)
def test_help_on_a_full_disk_is_one_line(arguments: list[str], completion: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vitlib", *arguments],
            env={**os.environ, **({"_VITLIB_COMPLETE": completion} if completion else {})},
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "vitlib: error: stdout cannot be written: No space left on device\n"
