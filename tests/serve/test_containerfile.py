"""Test the steps of examples/serve/Containerfile; `make test-wheel` also runs them."""

from __future__ import annotations

import ast
import re

import click

from fixtures.containerfile import read_steps
from paths import ROOT
from vitlib.cli import vitlib_command

STEPS = read_steps(ROOT / "examples" / "serve" / "Containerfile")


def test_steps_are_known_and_in_order() -> None:
    names = [step.instruction for step in STEPS]
    assert names[0] == "FROM"
    assert names[-1] == "ENTRYPOINT"
    expected = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "HEALTHCHECK"}
    assert {*names} == {*expected, "ENTRYPOINT"}
    assert names.index("USER") > names.index("RUN")


def test_base_has_a_version_and_a_python_of_the_package() -> None:
    (base,) = [step.text for step in STEPS if step.instruction == "FROM"]
    match = re.fullmatch(r"[\w./-]+/python:3\.(\d+)-slim-\w+", base)
    assert match
    assert int(match[1]) >= 10


def test_copied_files_are_there_and_enough_to_build() -> None:
    copied = [word for s in STEPS if s.instruction == "COPY" for word in s.text.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "setup.py", "constraints.txt", "vitlib"} <= {*copied}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in re.findall(r'(?:readme = |license-files = \[)"(\S+)"', text):
        assert name in copied


def test_torch_is_the_tested_one() -> None:
    (run,) = [step.text for step in STEPS if step.instruction == "RUN"]
    (version,) = re.findall(r"torch==([\d.]+)", run)
    assert f"torch=={version}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_server_runs_as_a_user_with_a_number() -> None:
    """Kubernetes refuses a name where it must not be root."""
    (user,) = [step.text for step in STEPS if step.instruction == "USER"]
    assert int(user) > 1000


def test_entry_and_health_fit_the_server() -> None:
    name, verb, *arguments = STEPS[-1].words()
    assert (name, verb) == ("vitlib", "serve")
    parent = click.Context(vitlib_command)
    command = vitlib_command.get_command(parent, verb)
    assert command is not None
    with command.make_context(verb, arguments, parent=parent) as context:
        port = context.params["port"]
    (exposed,) = [step.text for step in STEPS if step.instruction == "EXPOSE"]
    assert int(exposed) == port
    (health,) = [step for step in STEPS if step.instruction == "HEALTHCHECK"]
    *_, code = health.words()
    ast.parse(code)
    assert f"http://127.0.0.1:{port}/health'" in code
