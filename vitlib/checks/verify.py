"""verify: a checkpoint run beside a reference, block by block; or alone, looked over.

Both get the same seeded pixels, in float32 on the CPU. What another library gives comes from
references.py, what one file alone says from health.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checks.compare import distance, plain, probe, states
from vitlib.checks.health import Finding, find_anomalies, unverified_facts
from vitlib.checks.references import LIBRARIES
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError
from vitlib.source.locate import Source
from vitlib.system.torch_state import own_settings
from vitlib.vit import ViT
from vitlib.weights import built, load, read

# Two right implementations of one model are at most 2e-6 apart where it is tiny and 5e-6 at ViT-B
# size: sums of float32 in another order. It adds up block by block, so deeper models get more. The
# smallest mistake of numerics that is known, tanh for erf GELU, makes 5e-4.
TOLERANCE = 5e-6
_DEPTH = 12
# Without these alike, the tokens of two models are not the same things.
_ALIKE = ("embed_dim", "depth", "patch_size", "in_channels", "num_prefix_tokens")


@dataclass(frozen=True)
class Verdict:
    """The answer of verify(); `as_dict` is what `vitlib verify --json` prints."""

    source: str
    layout: str
    against: str | None  # None: the file was looked over, alone
    image_size: tuple[int, int]  # (height, width) of the pixels that both got
    errors: tuple[tuple[str, float], ...]  # after what -> max |a - b| / max |b|
    not_compared: tuple[str, ...]  # of what states() gives, where the reference has no such
    tolerance: float
    diverges_at: str | None  # the first of errors beyond the tolerance
    findings: tuple[Finding, ...]  # of the file alone
    unverified: tuple[str, ...] = ()  # "num_heads=12": what no file says, and no tensor shows

    @property
    def ok(self) -> bool:
        """Whether nothing parts and nothing was found."""
        return self.diverges_at is None and not self.findings

    @property
    def verdict(self) -> str:
        """ "equal", "diverges at block 3"; of a file alone "healthy", "suspicious"."""
        if self.against is None:
            return "healthy" if self.ok else "suspicious"
        return "equal" if self.ok else f"diverges at {self.diverges_at}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        told = asdict(self) | {"errors": dict(self.errors)}
        told["findings"] = [finding._asdict() for finding in self.findings]
        answer: dict[str, Any] = plain({"verdict": self.verdict, **told})
        return answer


@own_settings()
def verify(
    source: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    profile: str | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: str | None = None,
    pool: str | None = None,
    config: ViTConfig | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Verdict:
    """Run a checkpoint beside a reference, or without one look for layers that cannot be right.

    against: "transformers" or "timm", which must be installed and open the same files, or those
        that vitlib writes for them where the checkpoint is in another layout; or a hub id, folder
        or file (a folder of those names: "./timm"), loaded as vitlib.load does by default.

    The rest is as in vitlib.load, for `source`. Compared are the tokens after the embedding, after
    each block and after the final norm, and what the model gives, on two seeded images of the
    model's own size, float32: max |a - b| / max |b| of each, at most 5e-6 (deeper than 12 blocks:
    times depth / 12).

    Raises what load raises, VitlibError where the library is not installed, CheckpointError where
    it does not open the files or the two models are not of the same shape.
    """
    where: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    facts = Facts(architecture=architecture, num_heads=num_heads, activation=activation, pool=pool)
    how: dict[str, Any] = {
        "layout": layout,
        "profile": profile,
        "prefix": prefix,
        "facts": facts,
    }
    if against is None:
        found = read(Source(source, **where), config, **how)
        cfg, findings = found.model.config, find_anomalies(found)
        name = os.fspath(source)
        alone = Verdict(name, found.layout.name, None, cfg.image_size, (), (), 0.0, None, findings)
        return replace(alone, unverified=unverified_facts(found))
    name = os.fspath(against)
    if name in LIBRARIES:
        LIBRARIES[name].module()  # before anything is read: is it installed?
    src = Source(source, **where)
    found = read(src, config, **how)
    model = built(src, found, profile=profile).float()
    with torch.inference_mode():
        pixels = probe(model.config)
        if name in LIBRARIES:
            theirs = LIBRARIES[name].states(src, found.layout.name, where, model, pixels)
        else:
            theirs = _of_file(against, where, model, pixels)
        return _compare(os.fspath(source), found.layout.name, name, model, pixels, theirs)


def _of_file(
    against: str | os.PathLike[str], where: dict[str, Any], model: ViT, pixels: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """What another checkpoint gives. Raises CheckpointError where the models are not alike."""
    here = Path(os.fspath(against)).expanduser().exists()
    other = load(against, **{**where, "revision": None} if not here else where).float()
    ours, theirs = model.config, other.config
    unlike = [
        f"{name} {getattr(ours, name)} and {getattr(theirs, name)}"
        for name in _ALIKE
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if unlike:
        raise CheckpointError(
            f"{os.fspath(against)!r} is another model, which cannot be compared block by block: "
            f"{', '.join(unlike)}"
        )
    return states(other, pixels)


def _compare(
    source: str,
    layout: str,
    against: str,
    model: ViT,
    pixels: Tensor,
    reference: Iterator[tuple[str, Tensor]],
) -> Verdict:
    """Both, side by side, one state of each in memory at a time wherever the reference allows."""
    tolerance = TOLERANCE * max(1.0, model.config.depth / _DEPTH)
    errors: list[tuple[str, float]] = []
    skipped: list[str] = []
    theirs = next(reference, None)
    for name, ours in states(model, pixels):
        if theirs is not None and theirs[0] == "norm" != name:  # theirs norms every token, ours not
            theirs = next(reference, None)
        if theirs is None or theirs[0] != name:
            skipped.append(name)
            continue
        errors.append((name, distance(ours, theirs[1])))
        theirs = next(reference, None)
    return Verdict(
        source=source,
        layout=layout,
        against=against,
        image_size=model.config.image_size,
        errors=tuple(errors),
        not_compared=tuple(skipped),
        tolerance=tolerance,
        diverges_at=next((name for name, error in errors if not error <= tolerance), None),
        findings=(),
    )
