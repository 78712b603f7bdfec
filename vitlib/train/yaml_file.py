"""Settings files: a subset of YAML, parsed by PyYAML's safe loader.

The subset leaves out what no settings file needs. Anchors and aliases (& and *) let a few lines
expand beyond all memory. Deep nesting exhausts the stack. A key given twice would hide a setting.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vitlib.errors import ConfigError
from vitlib.system.requirements import import_extra

MAX_DEPTH = 8  # a part, a setting and a list are three


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse the text of a settings file.

    Args:
        text: The content of the file.
        name: Name of the file, for messages.

    Returns:
        {setting or part: value}; empty for an empty file.

    Raises:
        ConfigError: PyYAML is not installed, or the text is no mapping in this subset of YAML. The
            message names the line.
    """
    yaml = import_extra("train", "pyyaml", "settings files need PyYAML")
    try:
        values = yaml.load(text, _create_loader(yaml))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {problem}" if mark and problem else str(error)
        raise ConfigError(
            f"{name} is no settings file ({' '.join(reason.split())}): expected lines of YAML such "
            "as learning_rate: 0.001"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name} holds a {type(values).__name__}: expected lines such as learning_rate: 0.001"
        )
    return values


def _create_loader(yaml: Any) -> Any:
    """Return a subclass of SafeLoader for the subset; a function, as PyYAML is optional."""
    base: Any = yaml.SafeLoader

    class StrictLoader(base):  # type: ignore[misc]
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Compose a node; refuse aliases and deep nesting before they take memory."""
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or self.depth == MAX_DEPTH:
                problem = (
                    "is too deep" if self.depth == MAX_DEPTH else "is a name (*): write it out"
                )
                raise yaml.MarkedYAMLError(problem=f"this {problem}", problem_mark=event.start_mark)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Construct a mapping; refuse a key that occurs twice."""
            keys = Counter(str(key.value) for key, _ in node.value)
            for key, _ in node.value:
                if keys[str(key.value)] > 1:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} is given twice", problem_mark=key.start_mark
                    )
            return super().construct_mapping(node, deep)

    return StrictLoader
