"""The error of two modules that are not the same, as a message of several lines."""

from __future__ import annotations

from dataclasses import dataclass

from vitlib.testing.distance import Difference

_SHOWN = 4  # outputs and points with a line of their own


@dataclass(frozen=True)
class Finding:
    """The first difference inside two modules.

    Attributes:
        point: The first point that differs; None where no point inside does.
        difference: Its distance.
        paths: Paths of the modules at the point, for each module that is not vitlib's.
        before: The last point before it that is equal; None where there is none.
        cause: The cause, or what is usual.
        is_certain: A trial shows the cause.
        compared: Number of points compared; None where the cause is no matter of points.
        dtype: Dtype of the comparison.
        is_rounding: In float64 both are equal.
    """

    point: str | None
    difference: Difference | None
    paths: tuple[str, ...]
    before: str | None
    cause: str
    is_certain: bool
    compared: int | None
    dtype: str
    is_rounding: bool = False


class ParityError(AssertionError):
    """Two modules that are not the same.

    Args:
        title: Names of both modules.
        outputs: The outputs that differ, by name, and the largest difference that is allowed.
        finding: The first difference inside.

    Attributes:
        outputs: As above.
        point: The first point that differs, such as "blocks.3.norm1"; None where it is not known.
        cause: What the difference usually means, or was shown to mean.
        is_certain: True if a trial showed the cause.
    """

    def __init__(
        self, title: str, outputs: dict[str, tuple[Difference, float]], finding: Finding
    ) -> None:
        self.title, self.outputs, self.finding = title, outputs, finding
        self.point, self.cause = finding.point, finding.cause
        self.is_certain = finding.is_certain
        super().__init__(self._describe())

    def __reduce__(self) -> tuple[object, ...]:
        return ParityError, (self.title, self.outputs, self.finding)

    def _describe(self) -> str:
        """Write the message."""
        finding = self.finding
        names = [*self.outputs][:_SHOWN]
        more = len(self.outputs) - len(names)
        lines = [f"{self.title} differ in {', '.join(names)}" + (f" and {more} more" * bool(more))]
        lines += [
            f"{name}: {self.outputs[name][0]} (allowed: max {self.outputs[name][1]:.2g})"
            for name in names
        ]
        if finding.point is not None:
            paths = f" ({', '.join(finding.paths)})" if finding.paths else ""
            lines.append(f"first difference: {finding.point}{paths}: {finding.difference}")
        if finding.before is not None:
            lines.append(f"equal before it: {finding.before}")
        lines.append(f"{'cause' if finding.is_certain else 'usual causes'}: {finding.cause}")
        if finding.compared:
            lines.append(f"{finding.compared} points compared in {finding.dtype}")
        elif finding.compared is not None:
            lines.append(
                "no points inside were compared, as the names of modules are not known: give them "
                'with points={"blocks.*.resid": "path.of.block.*", ...}'
            )
        return "\n  ".join(lines)
