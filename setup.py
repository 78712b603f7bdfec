"""Write the commit into what is built from a checkout; all else is in pyproject.toml."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
# The module that reads it: it needs nothing that is built or installed.
_COMMIT = runpy.run_path(str(ROOT / "vitlib" / "system" / "commit.py"))
FILE = Path("vitlib", _COMMIT["FILE"])


def write_commit(folder: Path) -> None:
    """Write the commit into a folder that was built; none where it is unknown."""
    path = folder / FILE
    path.unlink(missing_ok=True)  # of an earlier build, or a link to the source
    commit = _COMMIT["read_commit"](ROOT)
    if commit:
        path.write_text(commit + "\n", encoding="ascii")


class BuildWithCommit(build_py):
    """Build the package; an editable install reads the checkout."""

    def run(self) -> None:
        """Copy the files, then write the commit."""
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """List the files that were built."""
        outputs = super().get_outputs(include_bytecode)
        path = os.path.join(self.build_lib, FILE)  # noqa: PTH118
        return [*outputs, path] if Path(path).is_file() and path not in outputs else outputs


class SourceWithCommit(sdist):
    """Write the source archive, which builds without git."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files, then write the commit."""
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir))


setup(cmdclass={"build_py": BuildWithCommit, "sdist": SourceWithCommit})
