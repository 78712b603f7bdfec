"""Configuration of the site, which `make docs` builds with Sphinx from the Markdown pages.

The source folder is the repository, not docs/: CHANGELOG.md, CONTRIBUTING.md and
benchmarks/RESULTS.md are pages too, and relative links mean the same here and on GitHub.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path

import torch
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "docs")]

from public_api import public_modules, public_names  # noqa: E402

import vitlib.errors  # noqa: E402

project = "vitlib"
author = "the authors of vitlib"
copyright = f"{author}, Apache-2.0"  # noqa: A001
release = version = vitlib.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "benchmarks/*.md",
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = [
    ".*",
    "build",
    "docs/*.py",
    "docs/_templates",
    "demo",
    "examples",
    "tests",
    "vitlib",
]
extensions = [
    "accessible_html",  # beside this file
    "myst_nb",  # Markdown, and the tutorials, which it runs
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds of a cell
nb_merge_streams = True
myst_heading_anchors = 4  # anchors of headings as on GitHub

html_theme = "furo"
html_title = f"vitlib {release}"
html_additional_pages = {"index": "redirect.html"}
html_show_sourcelink = False
html_copy_source = False
templates_path = [str(ROOT / "docs/_templates")]  # autosummary looks below the source folder

autosummary_generate = True
# For the list of methods at the head of a class's page: what torch and Python give is left out.
autosummary_context = {"foreign": {*dir(torch.nn.Module), *dir(tuple), *dir(Exception)}}
autodoc_typehints = "description"
autoclass_content = "both"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
default_role = "code"  # docstrings write `name`
napoleon_numpy_docstring = False
# Without a network Sphinx has no inventory of other libraries: their types are text.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|npt|numpy|os|pathlib|PIL|matplotlib|collections|types|typing)\..*"),
    (r"py:.*", r"Tensor|Figure|Path"),
]


def list_aliases() -> dict[str, str]:
    """Map names in annotations and docstrings to those of the site."""
    aliases = {name: f"vitlib.errors.{name}" for name in vars(vitlib.errors)}
    aliases["vitlib.ImageLike"] = "ImageLike"
    for prefix, module in public_modules():
        for name in public_names(module):
            value = getattr(module, name)
            place = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', name)}"
            aliases.setdefault(place, f"{prefix}.{name}")
            aliases.setdefault(name, f"{prefix}.{name}")
    return aliases


def import_types() -> None:
    """Import what modules import for type checkers alone, so that types are shown in full.

    ImageLike stays a name, which docs/api/types.md explains.
    """
    name_of_union = type("ImageLike", (), {"__module__": "vitlib"})
    for name, module in list(sys.modules.items()):
        if not name.startswith("vitlib.") or not module.__file__:
            continue
        for block in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
                with contextlib.suppress(ImportError):  # of an extra that is not installed
                    exec(ast.unparse(ast.Module(block.body, [])), vars(module))
        if "ImageLike" in vars(module):
            vars(module)["ImageLike"] = name_of_union
        if "Images" in vars(module):
            vars(module)["Images"] = name_of_union | Iterable[name_of_union]


def evaluate_hints() -> None:
    """Evaluate the hints of constructors, which Sphinx takes as they are written."""
    for _, module in public_modules():
        for name in public_names(module):
            value = getattr(module, name)
            if inspect.isclass(value) and inspect.isfunction(value.__init__):
                with contextlib.suppress(NameError):  # of a field that another module defines
                    value.__init__.__annotations__ = typing.get_type_hints(value.__init__)


def map_file_names() -> dict[str, str]:
    """Name the page of a function whose name only its case tells from a class's.

    File systems of macOS and Windows would take vitlib.tokens.Drop and vitlib.tokens.drop for one.
    """
    renamed = {}
    for prefix, module in public_modules():
        names = public_names(module)
        for name in names:
            if any(other != name == other.lower() for other in names):
                renamed[f"{prefix}.{name}"] = f"{prefix}.{name}-function"
    return renamed


autosummary_filename_map = map_file_names()
ALIASES = list_aliases()
import_types()
evaluate_hints()


def resolve_alias(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element
) -> nodes.Node | None:
    """Link a public object by its public name; a private type of vitlib is text."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    if name := ALIASES.get(target):
        python = env.get_domain("py")
        role, source = node["reftype"], node["refdoc"]
        return python.resolve_xref(env, source, app.builder, role, name, node, text)
    module, _, name = target.rpartition(".")
    is_private = module.startswith("vitlib.") and hasattr(sys.modules.get(module), name)
    return text if is_private else None


def escape_bars(
    app: Sphinx, what: str, name: str, member: object, options: object, lines: list[str]
) -> None:
    """Escape the bars of absolute values, which reStructuredText takes for a substitution.

    What torch says of its own constructor is left out.
    """
    del app, what, name, member, options
    own = [line for line in lines if not line.startswith("Initialize internal Module state")]
    lines[:] = [re.sub(r"(`[^`]*`)|\|", lambda m: m[1] or r"\|", line) for line in own]


def skip_member(
    app: Sphinx, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Leave out what Python itself says of the fields of a NamedTuple."""
    del app, what, name, skip, options
    return True if (member.__doc__ or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Register the functions above."""
    app.connect("autodoc-process-docstring", escape_bars, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", resolve_alias)
