"""Help of the command line: examples that run, options in groups, the nearest verb."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fixtures.command_line import Run, make_workplace
from paths import ROOT
from vitlib.cli import VERBS, vitlib_command
from vitlib.cli.verb import GENERAL, LOADING, Verb

COMMANDS = {verb: vitlib_command.get_command(click.Context(vitlib_command), verb) for verb in VERBS}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "serve"])
def test_examples_run(
    verb: str, run_cli: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = COMMANDS[verb]
    assert isinstance(command, Verb)
    assert len(command.examples) >= 2
    monkeypatch.chdir(workplace)
    if verb == "similar":
        run_cli("embed", "-m", "demo", "photos", "-o", "photos.npy")
    for line in command.examples:
        program, *arguments = shlex.split(line)
        assert (program, arguments[0]) == ("vitlib", verb)
        status, out, err = run_cli(*arguments)
        assert status == 0, err
        assert out
        if "-o" in arguments:
            assert Path(arguments[arguments.index("-o") + 1]).exists()


def test_examples_of_serve_run(workplace: Path) -> None:
    command = COMMANDS["serve"]
    assert isinstance(command, Verb)
    for line in command.examples:
        process = subprocess.Popen(
            [sys.executable, "-m", *shlex.split(line), "--port", "0"],
            cwd=workplace,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("http://127.0.0.1:" in line for line in lines)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_groups_and_words_for_values(verb: str, run_cli: Run) -> None:
    command = COMMANDS[verb]
    assert isinstance(command, Verb)
    _, short, _ = run_cli(verb, "--help")
    _, full, _ = run_cli(verb, "--help-all")
    assert run_cli("help", verb)[1] == full
    first, second = (text.split("\n\n") for text in (short, full))
    assert first[1].strip().endswith(".")
    assert first[2].startswith("Examples:\n  vitlib ")
    assert not re.search(r" (INTEGER|TEXT|PATH|FLOAT|DIRECTORY|STR|INT)\b", full)
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help
            assert option.help.split("  [")[0].endswith((".", "]")), option.name
            assert command.heading(option.name or "") != GENERAL, option.name
    if any("--num-heads" in option.opts for option in command.params):
        assert f"{LOADING}:" in full
        assert f"{LOADING}:" not in short
        assert "--help-all has --source-layout" in " ".join(short.split())
    assert len(second) >= len(first)


def test_mistyped_verb_is_suggested(run_cli: Run) -> None:
    status, out, err = run_cli("clasify", "photo.jpg")
    assert (status, out) == (2, "")
    assert "vitlib has no verb 'clasify': did you mean classify?" in err
    assert "expected one of classify, embed" in run_cli("zzz")[2]
    assert run_cli("help", "clasify")[0] == 2


def test_help_and_version(run_cli: Run) -> None:
    assert run_cli("-V")[1].startswith("vitlib, version ")
    assert run_cli("help")[1] == run_cli("--help")[1]
    status, _, err = run_cli()
    assert status == 2
    assert err.splitlines()[0] == "Usage: vitlib [OPTIONS] VERB [ARGS]..."


def test_verbose_and_quiet(run_cli: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    (workplace / "photos/.hidden.jpg").write_bytes(b"")
    usual = run_cli("classify", "-m", "demo", "photos", "-k", 1)
    assert usual[2] == "photos: 1 hidden image or folder is not read\n"
    for arguments in (("-q", "classify"), ("classify", "-q")):
        assert run_cli(*arguments, "-m", "demo", "photos", "-k", 1) == (0, usual[1], "")
    status, _, err = run_cli("classify", "-q", "-m", "demo", "nothing.jpg")
    assert (status, err.count("error")) == (1, 1)
    assert run_cli("classify", "-v", "-m", "demo", "photo.jpg")[0] == 0
