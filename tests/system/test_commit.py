"""Test which commit `vitlib --version` states: the right one, or none."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import vitlib
from vitlib.system import commit
from vitlib.system.commit import read_commit

Run = Callable[..., tuple[int, str, str]]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    command = ["git", *identity, "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make_checkout(folder: Path, name: str = "vitlib") -> Path:
    """Make a repository of one commit that has the package."""
    (folder / "vitlib").mkdir(parents=True)
    (folder / "vitlib" / "__init__.py").write_text("")
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def test_checkout_states_its_commit_and_changes(tmp_path: Path) -> None:
    root = make_checkout(tmp_path / "a")
    head = git(root, "rev-parse", "HEAD")
    git(root, "tag", "v9")  # a tag can be moved, and is no commit
    assert read_commit(root) == head[:12]
    (root / "untracked.txt").write_text("x")
    assert read_commit(root) == head[:12]
    (root / "vitlib" / "__init__.py").write_text("changed = True")
    assert read_commit(root) == head[:12] + "+"


def test_worktree_states_its_own_commit(tmp_path: Path) -> None:
    root = make_checkout(tmp_path / "a")
    git(root, "worktree", "add", "-q", "-b", "other", str(tmp_path / "b"))
    (tmp_path / "b" / "x.txt").write_text("x")
    git(tmp_path / "b", "add", ".")
    git(tmp_path / "b", "commit", "-q", "-m", "two")
    assert read_commit(tmp_path / "b") == git(tmp_path / "b", "rev-parse", "HEAD")[:12]
    assert read_commit(root) == git(root, "rev-parse", "HEAD")[:12]


def test_repository_of_another_project_is_not_asked(tmp_path: Path) -> None:
    assert read_commit(make_checkout(tmp_path / "a", name="other")) == ""


def test_repositories_around_it_are_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package inside a repository, a broken checkout, and a hook's GIT_DIR."""
    outer = make_checkout(tmp_path / "outer")
    inner = outer / "site-packages"
    (inner / "vitlib").mkdir(parents=True)
    assert read_commit(inner) == ""
    (inner / ".git").mkdir()
    (inner / "pyproject.toml").write_text('name = "vitlib"\n')
    assert read_commit(inner) == ""
    root = make_checkout(tmp_path / "a")
    (root / "x.txt").write_text("x")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "two")
    expected = git(root, "rev-parse", "HEAD")[:12]
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))
    assert read_commit(root) == expected


def test_without_git_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_checkout(tmp_path / "a")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_commit(root) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3310e2e41c5f\n", "3310e2e41c5f"),
        ("3310e2e41c5f+\n", "3310e2e41c5f+"),
        ("", ""),
        ("unknown", ""),
        ("3310e2e\x1b[1m", ""),
        ("größer", ""),
    ],
)
def test_installed_package_states_what_the_build_wrote(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert read_commit(tmp_path) == ""
    (tmp_path / "vitlib").mkdir()
    (tmp_path / "vitlib" / commit.FILE).write_text(text, encoding="utf-8")
    assert read_commit(tmp_path) == expected


@pytest.mark.parametrize(
    ("known", "ending"), [("3310e2e41c5f", " (commit 3310e2e41c5f)"), ("", "")]
)
def test_version_has_the_commit_where_it_is_known(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch, known: str, ending: str
) -> None:
    monkeypatch.setattr(commit, "read_commit", lambda: known)
    for option in ("--version", "-V"):
        code, out, err = run_cli(option)
        assert (code, out, err) == (0, f"vitlib, version {vitlib.__version__}{ending}\n", "")


def test_checkout_has_no_written_commit() -> None:
    """A file in the source would go stale."""
    assert not (Path(vitlib.__file__).parent / commit.FILE).exists()
