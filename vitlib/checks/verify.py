"""Compare a checkpoint with a reference block by block, or search one file for anomalies.

Both models get the same seeded images, in float32 on the CPU. references.py runs other libraries,
health.py reads one file alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.families import Profile
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.layout import LayoutName
from vitlib.checkpoint.read import read_checkpoint
from vitlib.checks.compare import NamedStates, iter_named_states
from vitlib.checks.health import find_anomalies, unverified_facts
from vitlib.checks.references import LIBRARIES
from vitlib.checks.verdict import Verdict
from vitlib.checks.verify_exported import verify_exported
from vitlib.config import Activation, Pool, ViTConfig
from vitlib.errors import CheckpointError
from vitlib.image.decode import ImageLike
from vitlib.predict.runtimes import find_format
from vitlib.source.locate import Source
from vitlib.system.atomic import expand_home
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.testing.distance import float32_tolerance, relative_distance
from vitlib.testing.images import seeded_images, usual_size
from vitlib.vit import ViT
from vitlib.weights import build_model, load

# Tokens of two models correspond only where these fields are equal.
_EQUAL_FIELDS = ("embed_dim", "depth", "patch_size", "in_channels", "num_prefix_tokens")


@isolate_torch_settings()
def verify(
    source: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    photos: Sequence[ImageLike] | None = None,
    layout: LayoutName | None = None,
    profile: Profile | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pool: Pool | None = None,
    config: ViTConfig | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Verdict:
    """Compare a checkpoint with a reference; without one, search it for anomalies.

    The images are two seeded ones of the model's own size. The tokens after the embedding, each
    block and the final norm are compared, then the output. Each may differ by
    max |a - b| / max |b| of at most 5e-6 in float32; beyond 12 blocks, times depth / 12.

    An exported file is compared on photos: the pixels of both preprocessings, then each output
    from the same pixels. The arguments about files are then for the reference.

    Args:
        source: A hub id, a folder, one weights file or an exported file (.onnx, .pt2, .xml).
        against: "transformers" or "timm", which must be installed and opens the same files, or
            files that vitlib writes for it where the checkpoint is in another layout. Else a hub
            id, folder or file, loaded by vitlib.load's defaults (a folder of these names:
            "./timm"). None searches the checkpoint for anomalies.
        photos: For an exported file; None takes the ten in the package.
        layout: As in vitlib.load, for `source`.
        profile: As in vitlib.load, for `source`.
        prefix: As in vitlib.load, for `source`.
        architecture: As in vitlib.load, for `source`.
        num_heads: As in vitlib.load, for `source`.
        activation: As in vitlib.load, for `source`.
        pool: As in vitlib.load, for `source`.
        config: As in vitlib.load, for `source`.
        revision: As in vitlib.load, for `source`.
        token: As in vitlib.load.
        cache_dir: As in vitlib.load.
        local_files_only: As in vitlib.load.

    Returns:
        The verdict.

    Raises:
        VitlibError: As in vitlib.load, or the library is not installed.
        CheckpointError: The library does not open the files, or the shapes of the models differ.
    """
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    if find_format(source) is not None:
        reading = {
            "layout": layout, "profile": profile, "prefix": prefix, "architecture": architecture,
            "num_heads": num_heads, "activation": activation, "pool": pool,
        }  # fmt: skip
        return verify_exported(source, against, photos, reading | hub)
    facts = Facts(architecture=architecture, num_heads=num_heads, activation=activation, pool=pool)
    name = None if against is None else os.fspath(against)
    if name in LIBRARIES:
        # Raises where it is not installed, before files are read.
        LIBRARIES[name].module()
    src = Source(source, **hub)
    checkpoint = read_checkpoint(
        src, config, layout=layout, profile=profile, prefix=prefix, facts=facts
    )
    cfg = checkpoint.model.config
    verdict = Verdict(
        os.fspath(source), checkpoint.layout.name, name, usual_size(cfg), (), (), 0.0, None, ()
    )
    if name is None:
        return replace(
            verdict,
            findings=find_anomalies(checkpoint),
            unverified=unverified_facts(checkpoint),
        )
    model = build_model(src, checkpoint, profile=profile).float()
    with torch.inference_mode():
        images = seeded_images(model.config)
        if name in LIBRARIES:
            states = LIBRARIES[name].states(src, checkpoint.layout.name, hub, model, images)
        else:
            states = _reference_states(name, hub, model, images)
        return _compare(verdict, model, images, states)


def _reference_states(against: str, hub: dict[str, Any], model: ViT, images: Tensor) -> NamedStates:
    """Return the states of another checkpoint; raise CheckpointError where shapes differ."""
    is_local = expand_home(against).exists()
    reference = load(against, **hub | ({} if is_local else {"revision": None})).float()
    cfg, other = model.config, reference.config
    different = [
        f"{name} {getattr(cfg, name)} and {getattr(other, name)}"
        for name in _EQUAL_FIELDS
        if getattr(cfg, name) != getattr(other, name)
    ]
    if different:
        raise CheckpointError(
            f"{against!r} is another model, which cannot be compared block by block: "
            f"{', '.join(different)}"
        )
    return iter_named_states(reference, images)


def _compare(verdict: Verdict, model: ViT, images: Tensor, reference: NamedStates) -> Verdict:
    """Compare state by state; one state of each model is in memory where the reference allows."""
    tolerance = float32_tolerance(model.config.depth)
    errors: list[tuple[str, float]] = []
    not_compared: list[str] = []
    expected = next(reference, None)
    for name, state in iter_named_states(model, images):
        # The reference normalises every token, and the model only the pooled vector.
        if expected is not None and expected[0] == "norm" != name:
            expected = next(reference, None)
        if expected is None or expected[0] != name:
            not_compared.append(name)
            continue
        errors.append((name, relative_distance(state, expected[1])))
        expected = next(reference, None)
    return replace(
        verdict,
        errors=tuple(errors),
        not_compared=tuple(not_compared),
        tolerance=tolerance,
        diverges_at=next((name for name, error in errors if not error <= tolerance), None),
    )
