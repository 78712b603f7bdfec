"""Assert that two modules give the same, and say where they begin to differ and why.

How data flows: both modules run on each batch in eval mode; outputs are paired by name and shape
and compared in float64; where they differ, diagnosis.py looks inside.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitlib.errors import ConfigError
from vitlib.system.torch_state import isolate_torch_settings, preserve_rng_state
from vitlib.testing.arguments import PointMap, check_module, check_points, iter_batches
from vitlib.testing.diagnosis import diagnose, pair_outputs
from vitlib.testing.distance import Difference, measure_difference
from vitlib.testing.module_names import (
    Sources,
    complete_sources,
    expand_sources,
    guess_sources,
    order_points,
)
from vitlib.testing.recording import evaluating
from vitlib.testing.report import ParityError
from vitlib.testing.states import Subject, common_states
from vitlib.testing.tolerance import Tolerance, float32_bound, is_rounding, resolve_tolerance

logger = logging.getLogger("vitlib")
_TINY = 1e-30  # in place of the largest value of an output of zeros


def assert_same(
    model: nn.Module,
    reference: nn.Module,
    inputs: Tensor | Iterable[Tensor],
    points: PointMap | None = None,
    *,
    atol: float | None = None,
    rtol: float | None = None,
) -> None:
    """Assert that two modules give the same outputs for the same pixels.

    Either may be a ViT of vitlib, a model of transformers or timm, or any module of your own.
    Outputs may be tensors, tuples, mappings or objects with `logits`, `last_hidden_state` or
    `pooler_output`; those with the same name, else of the same shape, are compared. Both run in
    eval mode, without gradients, each in its own dtype and on its own device.

    Args:
        model: The module under test.
        reference: The module that is right.
        inputs: Normalised pixels (B, C, H, W), or several batches of them.
        points: Points of vitlib, and the paths of modules that give them in a module that is not
            vitlib's: {"blocks.*.attn.q": "layers.*.query"}. "path:in" is the input of a module,
            and a pair of paths is for `model` and `reference`. They are compared too, relative to
            their largest values, in float64 if need be. Names of transformers and timm need none.
        atol: Largest |a - b|.
        rtol: The same, relative to the largest |b| of an output; it is added to `atol`. Without
            both it is 5e-6, in proportion to the number of blocks above 12. Where a weight is in
            bfloat16 or float16, 6e-2 or 6e-3 is for the modules as they are, and 5e-6 for copies of
            both in float32 with weights rounded alike; the copies may differ by half the dtype's
            eps at a known point where a weight was rounded in another form, if no trial names a
            cause.

    Raises:
        ParityError: They are not the same, an AssertionError. It names the first point that
            differs, by how much, and the cause.
        ConfigError: An argument is wrong.
    """
    __tracebackhide__ = True
    subjects = make_subjects(model, reference, points)
    tolerance = resolve_tolerance(subjects, atol, rtol)
    with (
        isolate_torch_settings(), preserve_rng_state(), torch.no_grad(),
        evaluating(model), evaluating(reference),
    ):  # fmt: skip
        error = find_error(subjects, inputs, tolerance)
    if error is not None:
        raise error


def make_subjects(
    model: nn.Module, reference: nn.Module, points: PointMap | None
) -> tuple[Subject, Subject]:
    """Find the points of two modules.

    Args:
        model: The module under test.
        reference: The module that is right.
        points: The caller's map.

    Returns:
        Both with their points: those that were named, else guessed.

    Raises:
        ConfigError: An argument is wrong.
    """
    check_module("model", model)
    check_module("reference", reference)
    chosen = check_points(points)
    subjects = Subject("model", model), Subject("reference", reference)
    foreign = [subject.inner for subject in subjects if subject.vit is None]
    if chosen and not foreign:
        raise ConfigError("points: both are ViTs of vitlib, whose points are known: leave it out")
    maps = [Sources(), Sources()]
    for point, pair in chosen.items():
        errors = []
        for subject, path, sources in zip(subjects, pair, maps, strict=True):
            if subject.vit is None:
                try:
                    sources |= expand_sources(subject.inner, {point: path})
                except ConfigError as error:
                    errors.append(error)
        # One path for two modules of other code may be of either.
        is_one = pair[0] == pair[1]
        if len(errors) == (len(foreign) if is_one else 1):
            raise errors[0]
    guesses = [guess_sources(s.inner) if s.vit is None else {} for s in subjects]
    if len(foreign) == 2 and not any(maps) and not all(guesses):
        guesses = [_common_leaves(*foreign)] * 2
    named = frozenset(name for sources in maps for name in sources)
    first, second = (
        replace(s, sources=guess | complete_sources(s.inner, own), named=named)
        for s, guess, own in zip(subjects, guesses, maps, strict=True)
    )
    return first, second


def _common_leaves(model: nn.Module, reference: nn.Module) -> Sources:
    """Return the innermost modules that two modules have by the same paths."""
    paths = [
        {name for name, part in module.named_modules() if name and not any(part.children())}
        for module in (model, reference)
    ]
    return {name: name for name, _ in model.named_modules() if name in paths[0] & paths[1]}


def find_error(
    subjects: tuple[Subject, Subject], inputs: Tensor | Iterable[Tensor], tolerance: Tolerance
) -> ParityError | None:
    """Compare two modules on every batch, until one differs.

    Args:
        subjects: Both modules, in eval mode.
        inputs: As in assert_same.
        tolerance: The bounds.

    Returns:
        The error; None where they are the same.
    """
    copies: tuple[Subject, Subject] | None = None
    for number, images in enumerate(iter_batches(inputs)):
        note = f", batch {number} of inputs," if number else ""
        error = compare(*subjects, images, tolerance.atol, tolerance.rtol, note)
        if error is None and tolerance.coarse is not None:
            copies = copy_in_float32(subjects, tolerance.coarse, images) if not number else copies
            error = compare_copies(copies, tolerance.coarse, images, note) if copies else None
        if error is not None:
            return error
    return None


def copy_in_float32(
    subjects: tuple[Subject, Subject], coarse: torch.dtype, images: Tensor
) -> tuple[Subject, Subject] | None:
    """Copy two modules in float32, with weights rounded to the coarser dtype of both.

    Args:
        subjects: Both modules.
        coarse: Dtype to which weights are rounded.
        images: Images to try them on, (B, C, H, W).

    Returns:
        Both copies, each on its own device; None where one does not run in float32.
    """
    model, reference = (s.widen(coarse, images, torch.float32) for s in subjects)
    if model is not None and reference is not None:
        return model, reference
    subject = subjects[1] if model is not None else subjects[0]
    logger.warning(
        "assert_same: the %s (%s) does not run in float32: compared in %s alone, where an eps of "
        "1e-2 in place of 1e-6 may pass",
        subject.role,
        type(subject.module).__name__,
        str(coarse).removeprefix("torch."),
    )
    return None


def compare_copies(
    copies: tuple[Subject, Subject], coarse: torch.dtype, images: Tensor, note: str
) -> ParityError | None:
    """Compare the copies in float32 of two modules in a coarse dtype.

    Args:
        copies: Both, with the same rounded weights.
        coarse: Dtype to which weights were rounded.
        images: (B, C, H, W).
        note: As in `compare`.

    Returns:
        The error; None where they are the same, or differ by rounding.
    """
    label = str(coarse).removeprefix("torch.")
    note = f"{note or ','} in float32 with weights of {label},"
    error = compare(*copies, images, 0.0, float32_bound(copies), note)
    return None if error is None or is_rounding(error, coarse) else error


def compare(
    model: Subject, reference: Subject, images: Tensor, atol: float, rtol: float, note: str
) -> ParityError | None:
    """Compare two modules on a batch.

    Args:
        model: The module under test, in eval mode.
        reference: The module that is right, in eval mode.
        images: (B, C, H, W).
        atol: Largest |a - b|.
        rtol: The same, relative to the largest |b|.
        note: The batch and the dtype for the message, between commas; empty for the usual ones.

    Returns:
        The error; None where they are the same.
    """
    pairs = pair_outputs(model, reference, images)
    failures: dict[str, tuple[Difference, float]] = {}
    for name, (a, b) in pairs.items():
        difference, allowed = measure_difference(a, b), atol + rtol * float(b.abs().max())
        if not difference.max <= allowed:
            failures[name] = difference, allowed
    bound = min(rtol + atol / max(float(b.abs().max()), _TINY) for _, b in pairs.values())
    is_inside = not failures
    failures = failures or compare_named(model, reference, images, bound)
    if not failures:
        return None
    finding = diagnose(model, reference, images, pairs, is_inside=is_inside)
    # Tokens of DeiT-tiny that no loss has trained are 1e-4 from those in float64, by rounding.
    if is_inside and finding.is_rounding:
        return None
    names = [type(subject.module).__name__ for subject in (model, reference)]
    title = f"model ({names[0]}) and reference ({names[1]}){note}"
    return ParityError(title, failures, finding)


def compare_named(
    model: Subject, reference: Subject, images: Tensor, bound: float
) -> dict[str, tuple[Difference, float]]:
    """Compare the points that the caller named.

    Args:
        model: The module under test, in eval mode.
        reference: The module that is right, in eval mode.
        images: (B, C, H, W).
        bound: Largest max |a - b| / max |b|.

    Returns:
        The points that differ, with what is allowed.

    Raises:
        ConfigError: A module at such a point was not called, or gives another shape.
    """
    if not model.named:
        return {}
    a, b = common_states(model.read(images)[1], reference.read(images)[1])
    failures: dict[str, tuple[Difference, float]] = {}
    order = order_points(max(model.depth, reference.depth))
    # The logits are outputs, which are compared already.
    for name in sorted({*model.named} - {"logits"}, key=order.index):
        if name not in a or name not in b:
            role = "reference" if name in a else "model"
            raise ConfigError(
                f"points: the {role} has no tensor {name!r}: its module was not called, or has no "
                "known name"
            )
        if a[name].shape != b[name].shape:
            shapes = f"{tuple(a[name].shape)} and {tuple(b[name].shape)}"
            raise ConfigError(f"points: {name!r} is {shapes}: expected tensors of the same shape")
        difference = measure_difference(a[name], b[name])
        allowed = bound * float(b[name].abs().max())
        if not difference.max <= allowed:
            failures[name] = difference, allowed
    return failures
