"""Verdict: the result of comparing a model with a reference, or of searching one file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vitlib.checks.compare import to_json
from vitlib.checks.health import Finding


@dataclass(frozen=True)
class Verdict:
    """The result of verify(); `as_dict` is what `vitlib verify --json` prints.

    Attributes:
        source: The checkpoint.
        layout: The checkpoint's layout.
        against: The reference; None where the file was searched for anomalies alone.
        image_size: (height, width) of the images that both models got.
        errors: Name of each state and max |a - b| / max |b| after it.
        not_compared: Names of states that the reference does not have.
        tolerance: The largest error that counts as equal.
        diverges_at: The first state with an error above the tolerance; None where all are equal.
        findings: Anomalies of the file alone.
        unverified: Facts such as "num_heads=12" that no file states and no tensor shows.
        photos: Number of photos that an exported file and the reference got; 0 for checkpoints.
    """

    source: str
    layout: str
    against: str | None
    image_size: tuple[int, int]
    errors: tuple[tuple[str, float], ...]
    not_compared: tuple[str, ...]
    tolerance: float
    diverges_at: str | None
    findings: tuple[Finding, ...]
    unverified: tuple[str, ...] = ()
    photos: int = 0

    @property
    def ok(self) -> bool:
        """True if every compared state is equal and there are no anomalies."""
        return self.diverges_at is None and not self.findings

    @property
    def verdict(self) -> str:
        """One of "equal" and "diverges at block 3"; for one file "healthy" or "suspicious"."""
        if self.against is None:
            return "healthy" if self.ok else "suspicious"
        return "equal" if self.ok else f"diverges at {self.diverges_at}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict.

        Returns:
            A dict of JSON's types.
        """
        fields = asdict(self) | {"errors": dict(self.errors)}
        fields["findings"] = [finding._asdict() for finding in self.findings]
        result: dict[str, Any] = to_json({"verdict": self.verdict, **fields})
        return result
