"""The text of a settings file -> its values, by PyYAML's safe loader and with less of YAML.

Left out is what no settings file needs: names for parts (& and *), by which a few lines become more
than memory holds, deep nesting, and a setting given twice, of which PyYAML would keep the last.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vitlib.errors import ConfigError

DEEPEST = 8  # a part, a setting and a list are three


def values_of(text: str, name: str) -> dict[str, Any]:
    """{setting or part: value}. Raises ConfigError, naming the line, for what is no such file."""
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("settings files need PyYAML: pip install 'vitlib[train]'") from error
    try:
        values = yaml.load(text, _loader(yaml))  # the safe one
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that cannot be
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        said = f"line {mark.line + 1}: {problem}" if mark and problem else str(error)
        raise ConfigError(
            f"{name} is no settings file ({' '.join(said.split())}): expected lines of YAML such "
            "as learning_rate: 0.001"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name} holds a {type(values).__name__}: expected lines such as learning_rate: 0.001"
        )
    return values


def _loader(yaml: Any) -> Any:
    """The safe loader, less what is said above."""

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or self.depth == DEEPEST:
                what = "is too deep" if self.depth == DEEPEST else "is a name (*): write it out"
                raise yaml.MarkedYAMLError(problem=f"this {what}", problem_mark=event.start_mark)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = Counter(str(key.value) for key, _ in node.value)
            for key, _ in node.value:
                if keys[str(key.value)] > 1:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} is given twice", problem_mark=key.start_mark
                    )
            return super().construct_mapping(node, deep)

    return Plain
