"""The budgets and rules of the design, as tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch
import torch.nn.functional as F

import vitlib

ROOT = Path(vitlib.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Each file imports only from rows above its own; a package's files freely among themselves.
ORDER = (
    "errors",
    "system",
    "config_parts",
    "config",
    "scores",
    "dropout",
    "positions",
    "encoder",
    "patch_embed",
    "variants",
    "methods",
    "vit",
    "param_groups",
    "points",
    "parts",
    "tokens",
    "testing",
    "source",
    "adapters",
    "image",
    "checkpoint",
    "weights",
    "explain",
    "fast",
    "predict",
    "plots",
    "metrics",
    "data",
    "retrieval",
    "features",
    "bench",
    "checks",
    "vendor",
    "export",
    "train",
    "evaluate",
    "batch",
    "probe",
    "audit",
    "serve",
    "cli",
    "__main__",
)

# ImageProcessor.from_profile takes the name of a family, and all facts of a family are in its file,
# which makes its transforms by functions of `image`. ViTConfig.named takes names of timm and
# open_clip, whose tables are in `checkpoint`. Both import when they are called.
# A method of ViT in `methods` imports what it does when it is called: the model comes first.
EXCEPTIONS = {
    "image/preprocess_config.py": {"checkpoint"},
    "config.py": {"checkpoint"},
    "methods/research.py": {"points", "parts", "tokens", "vit"},
    "methods/timm.py": {"param_groups", "checkpoint", "vit"},
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def runtime_nodes(path: Path) -> list[ast.AST]:
    """List the nodes of a file that run: an import for type checkers alone does not."""
    module = tree(path)
    for_types = {
        node
        for block in ast.walk(module)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    return [node for node in ast.walk(module) if node not in for_types]


def row(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rows(path: Path) -> set[str]:
    """List the rows of vitlib that a file imports when it runs, anywhere in it."""
    rows = set()
    for node in runtime_nodes(path):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rows |= {name.split(".")[1] for name in names if name.startswith("vitlib.")}
    return rows


def test_every_file_has_a_row_in_the_order() -> None:
    assert {row(path) for path in FILES} == {*ORDER, "__init__"}


def test_imports_follow_the_order() -> None:
    for path in FILES:
        mine = row(path)
        if mine == "__init__":  # loads names on first use; imports nothing of vitlib at import
            continue
        exempt = EXCEPTIONS.get(path.relative_to(ROOT).as_posix(), set())
        for other in imported_rows(path) - {mine} - exempt:
            assert ORDER.index(other) < ORDER.index(mine), f"{path} imports {other}"


def is_file(module: str, name: str) -> bool:
    """Return True if `from module import name` imports a file of vitlib, not a name of one."""
    return (ROOT.parent / module.replace(".", "/") / f"{name}.py").is_file()


def test_packages_have_no_import_cycle() -> None:
    for package in {path.parent for path in FILES if path.parent != ROOT}:
        edges: dict[str, set[str]] = {}
        for path in package.glob("*.py"):
            dotted = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
            name = dotted.removesuffix(".__init__")
            edges[name] = {
                f"{node.module}.{alias.name}" if is_file(node.module, alias.name) else node.module
                for node in runtime_nodes(path)
                if isinstance(node, ast.ImportFrom) and node.module
                for alias in node.names
            }
        done: set[str] = set()
        while edges:
            free = [name for name, needs in edges.items() if not needs & (edges.keys() - {name})]
            assert free, f"a cycle among {sorted(edges)}"
            for name in free:
                done.add(name)
                del edges[name]


def test_files_and_functions_are_short() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body
                if ast.get_docstring(node) is not None:  # what a function says is not its length
                    body = body[1:]
                code = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
                assert code <= 50, f"{path}: {node.name} has {code} lines"
                assert node.end_lineno - node.lineno + 1 <= 120, f"{path}: {node.name}"


def test_public_names() -> None:
    assert len(vitlib.__all__) <= 12
    assert sorted(vitlib.__all__) == vitlib.__all__
    for name in vitlib.__all__:
        value = getattr(vitlib, name)
        assert value.__doc__, name
        assert value.__module__.startswith("vitlib.")
    assert set(vitlib.__all__) <= set(dir(vitlib))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vitlib.nothing


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_few_modules_are_loaded() -> None:
    with_torch = loaded_by("import torch")
    touched = loaded_by("import vitlib\nfor name in vitlib.__all__: getattr(vitlib, name)")
    more = touched - with_torch
    print(len(more), "modules more than torch:", *sorted(more))
    own = {name for name in more if name.partition(".")[0] == "vitlib"}
    # How many files Pillow and Python have depends on their versions: 16 of Pillow's in 13.0.
    others = {name.partition(".")[0] for name in more - own} - sys.stdlib_module_names
    assert others <= {"PIL"}
    assert len(own) <= 120 - 16
    never = {"transformers", "torchvision", "timm", "matplotlib", "fastapi", "ray", "sklearn"}
    assert not never & {name.split(".")[0] for name in touched}
    alone = loaded_by("import vitlib")
    assert "torch" not in alone


def test_transformers_is_never_imported() -> None:
    for path in FILES:
        assert "import transformers" not in path.read_text(), path
        assert "from transformers" not in path.read_text(), path


def docstring_lines(path: Path) -> set[int]:
    return {
        line
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def calls_of_vit(note: Callable[[FrameType], object]) -> None:
    """Build ViT-B/16 and compute logits on the meta device; note every frame of vitlib."""
    config = vitlib.ViTConfig.named("B/16", num_classes=1000)
    model_class = vitlib.ViT  # loaded on first use, which is not part of the forward

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            note(frame)

    images = torch.zeros(1, 3, 224, 224)
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        with torch.device("meta"):
            model = model_class(config).eval()
            model(images.to("meta"))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def test_pixels_to_logits_is_a_short_read() -> None:
    """Count the code lines of functions entered from construction to logits of ViT-B/16."""
    entered: set[CodeType] = set()
    calls_of_vit(lambda frame: entered.add(frame.f_code))
    lines: set[tuple[str, int]] = set()
    for code in entered:
        numbers = [line for _, _, line in code.co_lines() if line]
        lines |= {(code.co_filename, n) for n in range(code.co_firstlineno, max(numbers) + 1)}
    files = {name for name, _ in lines}
    lines -= {(name, n) for name in files for n in docstring_lines(Path(name))}
    names = sorted(code.co_qualname for code in entered) if sys.version_info >= (3, 11) else []
    print(len(lines), "lines to read in", sorted(Path(name).name for name in files), names)
    assert len(lines) <= 200
    assert {Path(name).name for name in files} == {"patch_embed.py", "encoder.py", "vit.py"}


def test_attention_is_few_frames_below_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the frames of vitlib from ViT.forward to the call of torch's attention."""
    depths: set[int] = set()
    attend = F.scaled_dot_product_attention

    def count_frames(*args: torch.Tensor) -> torch.Tensor:
        files = [frame.filename for frame in traceback.extract_stack()]
        depths.add(sum(name.startswith(str(ROOT)) for name in files))
        return attend(*args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count_frames)
    model = vitlib.ViT(vitlib.ViTConfig(embed_dim=8, depth=2, num_heads=2, num_classes=3)).eval()
    model(torch.zeros(1, 3, 224, 224))
    assert depths == {5}  # forward, _encode, iter_hidden_states, Block, Attention


MODEL_FILES = [ROOT / name for name in ("patch_embed.py", "encoder.py", "vit.py")]


def test_forward_has_no_flags_and_says_its_shapes() -> None:
    for path in MODEL_FILES:
        assert "Shapes:" in ast.get_docstring(tree(path)), path
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.FunctionDef):
                continue
            assert node.args.kwarg is None, f"{path}: {node.name} takes **{node.args.kwarg}"
            if node.name.startswith("forward") and node.name != "forward_intermediates":  # timm's
                kinds = {ast.unparse(a.annotation) for a in node.args.args[1:]}
                assert kinds <= {"Tensor", "int | None", "Tensor | None"}, f"{path}: {kinds}"
                assert re.search(r"\(B, .*->.*\(B, ", ast.get_docstring(node)), (path, node.name)


# assert_same reads modules of other libraries, which have no points: hooks for one call.
HOOKS = {ROOT / "testing/recording.py"}


def test_no_utils_hooks_or_loose_loading() -> None:
    names = {path.stem for path in FILES}
    assert not names & {"utils", "common", "misc", "helpers"}
    for path in FILES:
        text = path.read_text()
        assert path in HOOKS or "register_forward" not in text, path
        assert "strict=False" not in text.replace("zip(", "").replace("strict=False)", ""), path


def test_public_functions_are_documented() -> None:
    for path in FILES:
        assert ast.get_docstring(tree(path)), path
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"
                for inner in node.body if isinstance(node, ast.ClassDef) else []:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        click_internals = {
                            *("list_commands", "get_command", "format_commands"),
                            *("make_context", "invoke"),
                        }
                        is_overload = "overload" in map(ast.unparse, inner.decorator_list)
                        is_exempt = is_overload or inner.name in click_internals
                        documented = ast.get_docstring(inner) or is_exempt
                        assert documented, f"{path}: {node.name}.{inner.name}"


def test_only_printing_module_prints() -> None:
    """Check that output passes terminal.py, which escapes it: by cli/printing.py and the logger."""
    prints = re.compile(
        r"(?<![\w.])(print|click\.s?echo|warnings\.warn|sys\.std(out|err)\.write)\("
    )
    loggers = set()
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if path.parts[-2:] != ("cli", "printing.py"):
            assert not prints.search(text), path
        loggers |= set(re.findall(r"getLogger\(([^)]*vitlib[^)]*)\)", text))
    assert loggers == {'"vitlib"'}  # it has the filter, which records of its children would pass by
