"""Check the language of the package: its docstrings, names and comments.

`python tests/test_language.py [path ...]` prints every offender by file, then the shares.
Without a path it reads the package; other folders are held to names and docstrings.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vitlib"
MAX_VAGUE, MAX_PARTICIPLES, MIN_COMMENTS = 0.01, 0.01, 0.02
MAX_TYPE_IGNORES, MAX_TOP_LEVEL_FILES = 40, 14


def words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


FIRST_WORDS = words("what whether of where how as")
VAGUE = words(
    "found said told held kept asked given seen where way ways place places known beside ours",
    "theirs plain one",
)
# Compounds in which a vague word belongs to a term of the field.
TERMS = {
    "as_dict": "dataclasses.asdict, with the spelling of PEP 8",
    "as_json": "click's usual name for --json: `json` is a module",
    "as_tuple": "an argument of torch.nonzero",
    "held_out": "data that training does not use",
    "in_place": "an operation that overwrites its input",
    "leave_one_out": "cross-validation",
    "one_cycle": "the 1cycle learning rate schedule",
    "one_hot": "an encoding of classes",
    "one_vs_rest": "multi-class metrics",
    "plain_text": "the media type text/plain",
    "two_way": "a table that is read in both directions",
}
PARTICIPLE = re.compile("[a-z]+(ed|en|wn|ept|orn|ought|aught)")
# Base forms that are participles too (read, put, cut, set, split, cast) are verbs, thus sound.
IRREGULAR = words(
    "begun bent built done dealt felt found gone got heard held hid hung laid led left lent lost",
    "made meant met paid rebuilt remade said sent slid sold sped spent spun stood stuck struck",
    "sunk swung told understood undone unwound withheld won",
)
# Verbs, nouns and prepositions that only look like participles.
NO_PARTICIPLE = words(
    "accept between broaden children concept countdown darken deepen down embed except exceed feed",
    "flatten harden intercept lengthen lighten listen loosen markdown need open own proceed reopen",
    "reseed screen seed sharpen shed shorten shutdown speed straighten strengthen succeed teardown",
    "tighten token unembed unflatten weaken widen",
)
# Methods whose arguments another library defines and describes.
OVERRIDES = words(
    "Command.format_help Command.format_options Command.invoke Command.main Command.parse_args",
    "Function.backward Function.forward Function.setup_context",
    "Group.format_commands Group.get_command Group.list_commands Group.resolve_command",
    "ParamType.convert ParamType.get_metavar ParamType.shell_complete",
    "HttpToolsProtocol.connection_lost HttpToolsProtocol.connection_made",
    "HttpToolsProtocol.data_received",
)
DIRECTIVE = re.compile(r"#\s*(type:\s*ignore|noqa|fmt:|ruff:|mypy:|pragma:|!|-\*-)")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
ScopeNode = FunctionNode | ast.ClassDef


class Offender(NamedTuple):
    """A name or docstring that breaks a rule."""

    path: str
    line: int
    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.name}: {self.problem}"


class Counts(NamedTuple):
    """Lines of code, lines with a comment, and lines with `type: ignore`."""

    code: int
    comments: int
    type_ignores: int


def scopes(node: ast.AST, *parents: ScopeNode) -> Iterator[tuple[ScopeNode, ...]]:
    """Yield each function and class as the last of the scopes that enclose it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ScopeNode):
            yield (*parents, child)
            yield from scopes(child, *parents, child)
        elif not isinstance(child, ast.expr):
            yield from scopes(child, *parents)


def base_name(node: ast.expr) -> str:
    """Return the last name of a decorator or base class: `command` for `@click.command()`."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def decorators(node: ScopeNode) -> set[str]:
    return {base_name(decorator) for decorator in node.decorator_list}


def is_property(node: ScopeNode) -> bool:
    return bool(decorators(node) & {"property", "cached_property", "setter", "deleter"})


def argument_names(node: FunctionNode | ast.Lambda) -> list[str]:
    spec = node.args
    every = [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
    return [argument.arg for argument in every if argument is not None]


def docstring_offenders(path: str, tree: ast.Module) -> Iterator[Offender]:
    for node in [tree, *(scope[-1] for scope in scopes(tree))]:
        summary, _, rest = (ast.get_docstring(node) or "").partition("\n")
        if not summary:
            continue
        offender = functools.partial(
            Offender, path, node.body[0].lineno, getattr(node, "name", "module")
        )
        first = re.match(r"\w*", summary)[0]
        if first.lower() in FIRST_WORDS:
            yield offender(f'docstring opens with "{first}"')
        if summary[:1].islower():
            yield offender(f'docstring opens in lower case: "{summary[:30]}"')
        if rest and not rest.startswith("\n"):
            yield offender("summary of more than one line")
        elif not summary.endswith("."):
            yield offender(f'summary without a period: "{summary[-30:]}"')


def node_bindings(node: ast.AST, scope: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the kind and the name of all that one node binds in its scope."""
    variable = "attribute" if isinstance(scope, ast.ClassDef) else "variable"
    if isinstance(node, ScopeNode):
        yield ("class" if isinstance(node, ast.ClassDef) else "function"), node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield variable, node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        if getattr(node.value, "id", "") in {"self", "cls"}:
            yield "attribute", node.attr
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        yield variable, node.name
    elif isinstance(node, ast.alias) and node.asname not in {None, node.name}:
        yield "import", node.asname


def bindings(tree: ast.Module) -> dict[tuple[int, str], tuple[str, int]]:
    """Map each scope and name that it binds to the kind and the first line of the name."""
    result: dict[tuple[int, str], tuple[str, int]] = {}

    def visit(node: ast.AST, scope: ast.AST, owner: ast.AST) -> None:
        for kind, name in node_bindings(node, scope):
            holder = owner if kind == "attribute" else scope
            result.setdefault((id(holder), name), (kind, node.lineno))
        if isinstance(node, ast.ClassDef):
            scope = owner = node
        elif isinstance(node, FunctionNode | ast.Lambda):
            scope = node
            for name in argument_names(node):
                result[id(node), name] = ("argument", node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child, scope, owner)

    visit(tree, tree, tree)
    return result


def vagueness(name: str) -> str:
    """Return `vague name`, `vague compound`, or an empty string for a sound name."""
    parts = [part.lower() for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", name)]
    spelled = "_".join(parts)
    if not parts or any(f"_{term}_" in f"_{spelled}_" for term in TERMS):
        return ""
    if spelled in VAGUE or name.strip("_").startswith(("of_", "as_")):
        return "vague name"
    return "vague compound" if parts[0] in VAGUE or parts[-1] in VAGUE else ""


def vague_offenders(path: str, tree: ast.Module) -> Iterator[Offender]:
    for (_, name), (kind, line) in bindings(tree).items():
        if problem := vagueness(name):
            yield Offender(path, line, name, f"{problem} of {kind}")


def functions(tree: ast.Module) -> list[ScopeNode]:
    nodes = [scope[-1] for scope in scopes(tree)]
    return [node for node in nodes if isinstance(node, FunctionNode) and not is_property(node)]


def participle_offenders(path: str, tree: ast.Module) -> Iterator[Offender]:
    for node in functions(tree):
        word = re.sub("^_|_$", "", node.name)
        is_participle = PARTICIPLE.fullmatch(word) and word not in NO_PARTICIPLE
        if is_participle or word in IRREGULAR:
            yield Offender(path, node.lineno, node.name, "function named by a participle")


def section_names(docstring: str, *headings: str) -> set[str]:
    """Return the names that open the entries of a docstring's sections."""
    names: set[str] = set()
    outer = indent = -1  # columns of the heading and of its entries; -1 outside a section
    for line in docstring.splitlines():
        text, depth = line.strip(), len(line) - len(line.lstrip())
        if text and (outer < 0 or depth <= outer):
            outer, indent = (depth if text in headings else -1), -1
        elif text:
            indent = depth if indent < 0 else indent
            entry = re.match(r"([\\\w*, ]+?)\s*(\(.*?\))?:", text)
            if depth == indent and entry:
                names |= {name.strip(" *\\") for name in entry[1].split(",")}
    return names


def public_fields(node: ast.ClassDef) -> list[str]:
    """Return the fields of a dataclass, or the arguments of a constructor."""
    if "dataclass" not in decorators(node) and "NamedTuple" not in map(base_name, node.bases):
        inits = [item for item in node.body if getattr(item, "name", "") == "__init__"]
        return argument_names(inits[-1])[1:] if inits else []
    items = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return [item.target.id for item in items if "ClassVar" not in ast.unparse(item.annotation)]


def needs_args(node: ScopeNode, parents: Sequence[ScopeNode]) -> bool:
    """Return False for private, nested and overriding functions, properties and commands."""
    is_private = node.name.startswith("_") and node.name != "__call__"
    if is_private or any(item.name.startswith("_") for item in parents):
        return False
    bases = [base_name(base) for item in parents for base in getattr(item, "bases", ())]
    return not (
        any(isinstance(item, FunctionNode) for item in parents)
        or any(f"{base}.{node.name}" in OVERRIDES for base in bases)
        or is_property(node)
        or decorators(node) & {"command", "group", "overload"}  # --help prints the docstring
    )


def args_offenders(path: str, tree: ast.Module) -> Iterator[Offender]:
    for *parents, node in scopes(tree):
        if not needs_args(node, parents):
            continue
        docstring, headings = ast.get_docstring(node) or "", ["Args:"]
        if isinstance(node, ast.ClassDef):
            inits = [item for item in node.body if getattr(item, "name", "") == "__init__"]
            names = public_fields(node)
            docstring = "\n".join([docstring, *(ast.get_docstring(item) or "" for item in inits)])
            headings.append("Attributes:")
        else:
            has_self = bool(parents) and "staticmethod" not in decorators(node)
            names = argument_names(node)[has_self:]
        documented = section_names(docstring, *headings)
        missing = [name for name in names if name not in documented and not name.startswith("_")]
        if missing:
            yield Offender(path, node.lineno, node.name, f"no Args for {', '.join(missing)}")
        surplus = sorted(documented - set(names))
        if surplus and not isinstance(node, ast.ClassDef):
            yield Offender(path, node.lineno, node.name, f"Args without argument: {surplus}")


def count_lines(tree: ast.Module, source: str) -> Counts:
    """Count lines of code and of comments; docstrings and blank lines are neither."""
    code, comments, docstrings, type_ignores = set[int](), set[int](), set[int](), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            type_ignores += bool(re.search(r"#\s*type:\s*ignore", token.string))
            if any(not DIRECTIVE.match(part) for part in re.findall("#[^#]*", token.string)):
                comments.add(token.start[0])
        elif token.string.strip():
            code |= set(range(token.start[0], token.end[0] + 1))
    return Counts(len(code - docstrings), len(comments), type_ignores)


RULES = {
    "docstrings": docstring_offenders,
    "vague names": vague_offenders,
    "participles": participle_offenders,
    "arguments": args_offenders,
}


class Measure(NamedTuple):
    """The offenders of some files by rule, and the totals of which they are a share."""

    offenders: dict[str, list[Offender]]
    bindings: int
    functions: int
    counts: Counts

    def share(self, rule: str) -> float:
        total = self.bindings if rule == "vague names" else self.functions
        return len(self.offenders[rule]) / max(total, 1)


@functools.cache
def measure_file(file: Path) -> Measure:
    source = file.read_text(encoding="utf-8")
    tree, path = ast.parse(source), file.relative_to(ROOT).as_posix()
    offenders = {rule: list(check(path, tree)) for rule, check in RULES.items()}
    if not file.is_relative_to(PACKAGE):  # tests and scripts need no Args sections
        offenders["arguments"] = []
    return Measure(offenders, len(bindings(tree)), len(functions(tree)), count_lines(tree, source))


def measure(*paths: Path) -> Measure:
    """Add the measures of files and of folders."""
    files = {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}
    each = [measure_file(file) for file in sorted(files)]
    return Measure(
        {rule: [item for part in each for item in part.offenders[rule]] for rule in RULES},
        sum(part.bindings for part in each),
        sum(part.functions for part in each),
        Counts(*map(sum, zip(*(part.counts for part in each), strict=True))),
    )


def listing(offenders: Sequence[Offender]) -> str:
    return "\n".join(["", *map(str, offenders)])


def test_docstrings_open_with_a_phrase_and_end_with_a_period() -> None:
    offenders = measure(PACKAGE).offenders["docstrings"]
    assert not offenders, listing(offenders)


def test_vague_names_are_rare() -> None:
    package = measure(PACKAGE)
    assert package.share("vague names") <= MAX_VAGUE, listing(package.offenders["vague names"])


def test_only_variables_have_vague_names() -> None:
    pattern = re.compile("vague name of (function|class|attribute|argument)")
    vague = measure(PACKAGE).offenders["vague names"]
    offenders = [offender for offender in vague if pattern.fullmatch(offender.problem)]
    assert not offenders, listing(offenders)


def test_functions_named_by_a_participle_are_rare() -> None:
    package = measure(PACKAGE)
    share = package.share("participles")
    assert share <= MAX_PARTICIPLES, listing(package.offenders["participles"])


def test_every_public_argument_has_a_line() -> None:
    offenders = measure(PACKAGE).offenders["arguments"]
    assert not offenders, listing(offenders)


def test_comments_are_frequent() -> None:
    code, comments, _ = measure(PACKAGE).counts
    assert comments >= MIN_COMMENTS * code, f"{comments} comment lines, {code} lines of code"


def test_type_ignores_are_few() -> None:
    counts = {path: measure_file(path).counts.type_ignores for path in PACKAGE.rglob("*.py")}
    files = [f"{path.relative_to(ROOT)}: {count}" for path, count in counts.items() if count]
    assert sum(counts.values()) <= MAX_TYPE_IGNORES, "\n".join(["", *sorted(files)])


def test_top_level_is_short() -> None:
    names = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert len(names) <= MAX_TOP_LEVEL_FILES, f"{len(names)} files: {', '.join(names)}"


def main(arguments: Sequence[str]) -> int:
    """Print offenders by file, then shares; return 1 if there are offenders."""
    total = measure(*([Path(path).resolve() for path in arguments] or [PACKAGE]))
    offenders = sorted(item for rule in RULES for item in total.offenders[rule])
    for offender in offenders:
        print(offender)
    code, comments, type_ignores = total.counts
    for rule in RULES:
        print(f"{rule}: {len(total.offenders[rule])}")
    print(f"vague names: {total.share('vague names'):.1%} of {total.bindings} bindings")
    print(f"participles: {total.share('participles'):.1%} of {total.functions} functions")
    print(f"comment lines: {comments}, {comments / max(code, 1):.1%} of {code} lines of code")
    print(f"type: ignore: {type_ignores}")
    return int(bool(offenders))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
