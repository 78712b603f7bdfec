"""Write the outputs of the how-to pages and of docs/start.md, by running their commands.

    cd tests && python how_to_pages.py

A block of the language console is commands that start with "$ " and their output. Blocks of Python
run too, in the folder that the page before left. test_how_to.py compares pages and outputs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from paths import ROOT

START = ROOT / "docs/start.md"
HOW_TO = ROOT / "docs/how-to"
BLOCK = re.compile(
    r"(?P<varies><!-- varies -->\n)?```(?P<language>console|python)\n(?P<body>.*?)```", re.DOTALL
)
# Lines that a slow machine prints while it works.
LIFE = re.compile(r"(epoch |reading photos|loading).*|.* \.\.\.")


class Block(NamedTuple):
    """A block of a page.

    Attributes:
        language: console or python.
        body: Its text, without the fences.
        varies: True if the output is that of one machine.
    """

    language: str
    body: str
    varies: bool

    def commands(self) -> Iterator[tuple[list[str], str]]:
        """Yield the arguments of each command of vitlib, and the output below it."""
        for command in re.split(r"^\$ ", self.body, flags=re.MULTILINE)[1:]:
            line, _, output = command.partition("\n")
            name, *arguments = shlex.split(line)
            assert name == "vitlib", line
            yield arguments, output


def list_pages() -> list[Path]:
    """List the how-to pages, as they follow each other."""
    index = HOW_TO / "index.md"
    (names,) = re.findall(r"```{toctree}\n:hidden:\n\n(.*?)```", index.read_text(), re.DOTALL)
    return [index, *(HOW_TO / f"{name}.md" for name in names.split())]


def read_blocks(page: Path) -> list[Block]:
    """List the blocks of a page that can be run."""
    return [
        Block(found["language"], found["body"], found["varies"] is not None)
        for found in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def clean(output: str) -> str:
    """Leave out what is of this machine alone."""
    output = output.replace(str(ROOT), "...").replace(str(Path.home()), "~")
    output = re.sub(r"(Linux-[\d.]+)-\S*?(x86_64|aarch64)", r"\1-\2", output)
    lines = [line.rstrip() for line in output.splitlines() if not LIFE.fullmatch(line)]
    return "".join(f"{line}\n" for line in lines)


def run_page(page: Path, folder: Path) -> None:
    """Run a page in a folder, and write the outputs into it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, text=True, check=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.stdout

    def renew(found: re.Match[str]) -> str:
        block = Block(found["language"], found["body"], False)
        if block.language == "python":
            run("-c", block.body)
            return found[0]
        text = ""
        for arguments, _ in block.commands():
            output = clean(run("-m", "vitlib", *arguments))
            text += f"$ vitlib {shlex.join(arguments)}\n{output}"
        return f"{found['varies'] or ''}```console\n{text}```"

    text = page.read_text(encoding="utf-8")
    page.write_text(BLOCK.sub(renew, text), encoding="utf-8")


if __name__ == "__main__":
    for pages in ([START], list_pages()):
        with tempfile.TemporaryDirectory() as folder:
            for path in pages:
                print(path)
                run_page(path, Path(folder))
