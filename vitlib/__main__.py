"""Run the command line with `python -m vitlib`."""

from vitlib.cli import main

if __name__ == "__main__":
    main()
