"""Check the language of the package: its docstrings, names and comments.

`python tests/test_language.py [path ...]` prints offenders by file, then shares. Without a path
it reads the package. Tests and other folders need no Args sections.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vitlib"
MAX_VAGUE, MAX_PARTICIPLES, MIN_COMMENTS = 0.01, 0.01, 0.02
# config_parts.py and variants.py hold what a reader of ViT-B/16 need not see.
MAX_TYPE_IGNORES, MAX_TOP_LEVEL_FILES = 40, 16


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
    "not_found": "a name of errors, as in HTTP 404",
    "one_hot": "an encoding of classes",
}
PARTICIPLE = re.compile("[a-z]+(ed|en|wn|ept|orn|ought|aught)")
# Base forms that are participles too (read, put, cut, set, split, cast) are verbs, thus sound.
IRREGULAR = words(
    "begun bent built done dealt felt found gone got heard held hid laid left lent lost made meant",
    "met paid rebuilt said sent sold sped spent spun stuck struck told undone understood withheld",
)
# Verbs, nouns and prepositions that only look like participles.
NO_PARTICIPLE = words(
    "accept between children concept countdown deepen down embed except exceed feed flatten gen",
    "harden intercept lengthen listen markdown need open own proceed reopen reseed screen seed",
    "sharpen shed shorten shutdown spawn speed succeed teardown then tighten token whiten widen",
)
# Methods whose arguments another library defines and describes.
OVERRIDES = words(
    "Function.backward Function.forward Group.invoke Group.list_commands Group.get_command",
    "Group.format_commands Group.make_context HttpToolsProtocol.connection_lost",
    "HttpToolsProtocol.connection_made HttpToolsProtocol.data_received",
    "HttpToolsProtocol.send_400_response Command.format_options ParamType.convert",
)
DIRECTIVE = re.compile(r"#\s*(type:\s*ignore|noqa|fmt:|ruff:|mypy:|pragma:|!|-\*-)")
PROPERTIES = {"property", "cached_property", "setter", "deleter"}
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


def argument_names(node: FunctionNode | ast.Lambda) -> list[str]:
    spec = node.args
    every = [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
    return [argument.arg for argument in every if argument is not None]


def docstring_offenders(path: str, tree: ast.Module) -> Iterator[Offender]:
    for node in [tree, *(scope[-1] for scope in scopes(tree))]:
        summary, _, rest = (ast.get_docstring(node) or "").partition("\n")
        first = re.match(r"\w*", summary)[0]
        problems = {
            f'docstring opens with "{first}"': first.lower() in FIRST_WORDS,
            f'docstring opens in lower case: "{summary[:30]}"': summary[:1].islower(),
            "summary of more than one line": rest and not rest.startswith("\n"),
            f'no period: "{summary[-30:]}"': summary and summary[-1] != "." and rest[:1] in "\n",
        }
        name = getattr(node, "name", "module")
        for problem in [problem for problem, applies in problems.items() if applies]:
            yield Offender(path, node.body[0].lineno, name, problem)


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
    nodes = [node for *_, node in scopes(tree) if isinstance(node, FunctionNode)]
    return [node for node in nodes if not decorators(node) & PROPERTIES]


def participle_offenders(path: str, tree: ast.Module) -> Iterator[Offender]:
    for node in functions(tree):
        word = re.sub("^_|_$", "", node.name)
        if word in IRREGULAR or (PARTICIPLE.fullmatch(word) and word not in NO_PARTICIPLE):
            yield Offender(path, node.lineno, node.name, "function named by a participle")


def section_names(docstring: str) -> set[str]:
    """Return the names that open the entries of Args and of Attributes."""
    names: set[str] = set()
    outer = indent = -1  # columns of the heading and of its entries; -1 outside a section
    for line in docstring.splitlines():
        text, depth = line.strip(), len(line) - len(line.lstrip())
        if text and (outer < 0 or depth <= outer):
            outer, indent = (depth if text in ("Args:", "Attributes:") else -1), -1
        elif text:
            indent = depth if indent < 0 else indent
            if depth == indent and (entry := re.match(r"([\\\w*, ]+?)\s*(\(.*?\))?:", text)):
                names |= {name.strip(" *\\") for name in entry[1].split(",")}
    return names


def needs_args(node: ScopeNode, parents: Sequence[ScopeNode]) -> bool:
    """Return False for private, nested and overriding functions, properties and commands."""
    names = {item.name for item in (*parents, node)} - {"__call__", "__init__"}
    bases = [base_name(base) for item in parents for base in getattr(item, "bases", ())]
    return not (
        any(name.startswith("_") for name in names)
        or any(isinstance(item, FunctionNode) for item in parents)
        or any(f"{base}.{node.name}" in OVERRIDES for base in bases)
        or decorators(node) & {*PROPERTIES, "overload", "command", "group"}  # of click: --help
    )


def args_offenders(path: str, tree: ast.Module) -> Iterator[Offender]:
    for *parents, node in scopes(tree):
        docstring, names = ast.get_docstring(node) or "", []
        is_function = isinstance(node, FunctionNode)
        if not needs_args(node, parents):
            continue
        if is_function:
            names = argument_names(node)[bool(parents) and "staticmethod" not in decorators(node) :]
            if node.name == "__init__":
                docstring += "\n" + (ast.get_docstring(parents[-1]) or "")
        elif "dataclass" in decorators(node) or "NamedTuple" in map(base_name, node.bases):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            names = [ast.unparse(f.target) for f in fields if "ClassVar" not in ast.unparse(f)]
        documented = section_names(docstring)
        missing = [name for name in names if name not in documented and not name.startswith("_")]
        if missing:
            yield Offender(path, node.lineno, node.name, f"no Args for {', '.join(missing)}")
        surplus = sorted(documented - set(names))
        if surplus and is_function and node.name != "__init__":
            yield Offender(path, node.lineno, node.name, f"Args without argument: {surplus}")


def count_lines(tree: ast.Module, source: str) -> Counter[str]:
    """Count lines of code, comments (`own line`: alone on theirs) and uses of `type: ignore`."""
    code, docstrings, counts = set[int](), set[int](), Counter[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            counts["type: ignore"] += "type: ignore" in token.string
            if any(not DIRECTIVE.match(part) for part in re.findall("#[^#]*", token.string)):
                counts["comments"] += 1
                counts["own line"] += token.line.lstrip().startswith("#")
        elif token.string.strip():
            code |= set(range(token.start[0], token.end[0] + 1))
    return counts + Counter(code=len(code - docstrings))


RULES = {
    "docstrings": docstring_offenders,
    "vague names": vague_offenders,
    "participles": participle_offenders,
    "arguments": args_offenders,
}


@functools.cache
def measure_file(file: Path) -> tuple[dict[str, list[Offender]], Counter[str]]:
    source = file.read_text(encoding="utf-8")
    tree, path = ast.parse(source), file.relative_to(ROOT).as_posix()
    offenders = {rule: list(check(path, tree)) for rule, check in RULES.items()}
    if not file.is_relative_to(PACKAGE):  # tests and scripts need no Args sections
        offenders["arguments"] = []
    totals = Counter(bindings=len(bindings(tree)), functions=len(functions(tree)))
    return offenders, totals + count_lines(tree, source)


def measure(*paths: Path) -> tuple[dict[str, list[Offender]], Counter[str]]:
    """Return the offenders of files and folders by rule, and the totals they are a share of."""
    files = {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}
    parts = [measure_file(file) for file in sorted(files)]
    offenders = {rule: [item for part, _ in parts for item in part[rule]] for rule in RULES}
    return offenders, sum((totals for _, totals in parts), Counter())


def assert_share(rule: str, limit: float = 0, of: str = "functions") -> None:
    offenders, totals = measure(PACKAGE)
    assert len(offenders[rule]) <= limit * totals[of], "\n".join(map(str, offenders[rule]))


def test_docstrings_open_with_a_phrase_and_end_with_a_period() -> None:
    assert_share("docstrings")


def test_vague_names_are_rare() -> None:
    assert_share("vague names", MAX_VAGUE, of="bindings")


def test_only_variables_have_vague_names() -> None:
    pattern = re.compile("vague name of (function|class|attribute|argument)")
    vague = measure(PACKAGE)[0]["vague names"]
    offenders = [str(item) for item in vague if pattern.fullmatch(item.problem)]
    assert not offenders, "\n".join(offenders)


def test_functions_named_by_a_participle_are_rare() -> None:
    assert_share("participles", MAX_PARTICIPLES)


def test_every_public_argument_has_a_line() -> None:
    assert_share("arguments")


def test_comments_are_frequent() -> None:
    totals = measure(PACKAGE)[1]
    assert totals["own line"] >= MIN_COMMENTS * totals["code"], totals


def test_type_ignores_are_few() -> None:
    counts = {path: measure_file(path)[1]["type: ignore"] for path in PACKAGE.rglob("*.py")}
    files = sorted(f"{path.relative_to(ROOT)} {count}" for path, count in counts.items() if count)
    assert sum(counts.values()) <= MAX_TYPE_IGNORES, "\n".join(files)


def test_top_level_is_short() -> None:
    names = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert len(names) <= MAX_TOP_LEVEL_FILES, names


def problems(rule: str, source: str) -> list[str]:
    return [f"{item.name}: {item.problem}" for item in RULES[rule]("file.py", ast.parse(source))]


def test_docstring_rule_reports_openings_and_summaries() -> None:
    source = '''"""Whether it works."""\ndef f(): "loads it."\nclass A:\n "Long\\nsummary."\n'''
    assert problems("docstrings", source + " def g(self): 'No period'") == [
        'module: docstring opens with "Whether"',
        'f: docstring opens in lower case: "loads it."',
        "A: summary of more than one line",
        'g: no period: "No period"',
    ]


def test_vague_rule_reports_every_kind_of_binding() -> None:
    source = """
class Way: kept = 1
def of_rows(told, names):
    self.asked = [one for one in names if (found := one)]
    for (place, *ways), is_known, one_hot in names: import numpy as held
    with open(names) as said: return lambda given: given
"""
    expected = words("Way kept of_rows told asked one found place ways is_known held said given")
    assert {problem.split(":")[0] for problem in problems("vague names", source)} == expected


def test_participle_rule_reports_functions_only() -> None:
    names = "_dropped", "shown", "built", "embed", "load_shared", "read", "__len__"
    source = "".join(f"def {name}(): 0\n" for name in names)
    source += "class A:\n @property\n def closed(self): 0\n def opened(self): 0"
    expected = words("_dropped shown built opened")
    assert {problem.split(":")[0] for problem in problems("participles", source)} == expected


def test_args_rule_reports_arguments_and_fields() -> None:
    source = """
def f(a, *b, c): "Add.\\n\\nArgs:\\n  a: An int.\\n  *b: Ints.\\n    c: no.\\n  d: Stale."
@dataclass
class A:
    "Hold.\\n\\nAttributes:\\n    x: A float."
    x: float; y: float
    def g(self, z): 0
    def _h(self, z): 0
class B:
    def __init__(self, x): "Build.\\n\\nArgs:\\n    w: A float."
"""
    assert problems("arguments", source) == [
        "f: no Args for c",
        "f: Args without argument: ['d']",
        "A: no Args for y",
        "g: no Args for z",
        "__init__: no Args for x",
    ]


def test_lines_are_counted_without_docstrings_and_directives() -> None:
    source = '"""Doc."""\n# Why.\nx = 1  # type: ignore  # why\ny = "#"  # noqa: E501\n\n'
    expected = {"code": 2, "comments": 2, "own line": 1, "type: ignore": 1}
    assert count_lines(ast.parse(source), source) == expected


def main(arguments: Sequence[str]) -> int:
    """Print offenders by file, then shares; return 1 if there are offenders."""
    offenders, totals = measure(*([Path(path).resolve() for path in arguments] or [PACKAGE]))
    print(*sorted(item for items in offenders.values() for item in items), sep="\n")
    totals.update({rule: len(items) for rule, items in offenders.items()})
    for name in (*RULES, "comments", "own line", "type: ignore"):
        of = {"vague names": "bindings", "participles": "functions"}.get(name, "code")
        print(f"{name}: {totals[name]} ({totals[name] / max(totals[of], 1):.1%} of {of})")
    return int(any(offenders.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
