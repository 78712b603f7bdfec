"""The verb `vitlib doctor`: check the installation."""

from __future__ import annotations

import sys

import click

from vitlib.cli.options import json_option
from vitlib.cli.printing import echo, echo_json, fail, print_table
from vitlib.cli.verb import Verb


@click.command(cls=Verb, examples=("vitlib doctor", "vitlib doctor --json"))
@json_option
def doctor(as_json: bool) -> None:
    """Check the installation: versions, devices, extras, what is missing and how to mend it.

    Exit status 1 where something keeps vitlib from working. An extra that is absent is none: the
    verbs that need it name it.
    """
    from vitlib.system.installation import examine

    found = examine()
    if as_json:
        echo_json(found.as_dict())
    else:
        print_table([*found.versions.items(), *found.machine.items()])
        echo()
        print_table([(f"vitlib[{name}]", text) for name, text in found.extras.items()])
        for note in found.notes:
            echo(f"note: {note}")
    for problem in found.problems:
        fail(problem)
    if found.problems:
        sys.exit(1)
    if not as_json:
        echo()
        echo("vitlib can work here.")
