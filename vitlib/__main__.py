"""Run the command line: `vitlib`, or `python -m vitlib`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; what its import raises is one line on stderr too.

    Raises:
        SystemExit: Always, with the exit status.
    """
    try:
        from vitlib.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # of click, or of a file that Python takes for it
        from vitlib.system.requirements import explain_import_error
        from vitlib.system.terminal import escape_unprintable

        explained = explain_import_error(error)
        if explained is None:
            raise
        sys.exit(escape_unprintable(f"vitlib: error: {explained}"))
    run()


if __name__ == "__main__":
    main()
