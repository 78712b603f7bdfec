"""A model as one file to take along: written from the library's own source, for one checkpoint.

`values.py` says what expressions of the source are for this model, `expressions.py` and
`statements.py` write them with it, `program.py` gathers facts over all functions, `emit.py` and
`file.py` put the file together, `pinned.py` writes its test.
"""

from vitlib.vendor.writer import VendoredFiles, write

__all__ = ["VendoredFiles", "write"]
