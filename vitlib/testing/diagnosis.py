"""Search two modules that differ for the first point that does, and for its cause.

How data flows: the image that differs most runs through copies of both modules in float64, where
rounding is 1e-15 and any real difference shows; the tensors of both are compared point by point;
a search for the cause changes one module to be as the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.testing.case import TOKENS, Case, match_rows
from vitlib.testing.causes import explain
from vitlib.testing.distance import Difference, measure_difference, relative_distance
from vitlib.testing.module_names import order_points
from vitlib.testing.outputs import match_outputs, name_outputs, to_float64, vit_outputs
from vitlib.testing.recording import call, to_module
from vitlib.testing.report import Finding
from vitlib.testing.states import States, Subject, common_states
from vitlib.testing.tolerance import coarsest_dtype

Pairs = dict[str, tuple[Tensor, Tensor]]
_NOISE = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative, of equal tensors
# A module may compute a part in float32, such as angles of positions. What such rounding becomes
# is below this, and far below what a mistake makes.
_ROUNDED, _JUMP = 1e-5, 100.0
_ROUNDED_INSIDE = 1e-6  # the same, of a point whose difference reaches no output


def pair_outputs(model: Subject, reference: Subject, images: Tensor) -> Pairs:
    """Run two modules and pair their outputs.

    Args:
        model: The model, in eval mode.
        reference: The reference, in eval mode.
        images: (B, C, H, W).

    Returns:
        Outputs of both by name, float64 on the CPU.
    """
    outputs: list[dict[str, Tensor]] = []
    inputs = [to_module(subject.module, images) for subject in (model, reference)]
    values = [call(s.module, x) for s, x in zip((model, reference), inputs, strict=True)]
    for subject, value in zip((model, reference), values, strict=True):
        named = name_outputs(value, subject.module)
        is_headless = subject.vit is not None and not subject.vit.num_classes
        if subject.vit is not None and not is_headless:
            named = {"logits": value}
        outputs.append(named)
    for index, subject in enumerate((model, reference)):
        if subject.vit is not None:
            value, others = values[index], outputs[1 - index]
            outputs[index] = vit_outputs(subject.vit, inputs[index], value, others)
    pairs = match_outputs(outputs[0], outputs[1])
    return {name: (to_float64(a), to_float64(b)) for name, (a, b) in pairs.items()}


def diagnose(
    model: Subject, reference: Subject, images: Tensor, pairs: Pairs, *, is_inside: bool
) -> Finding:
    """Find the first difference of two modules and its cause.

    Args:
        model: The model, in eval mode.
        reference: The reference, in eval mode.
        images: The images for which outputs differ, (B, C, H, W).
        pairs: Outputs of both.
        is_inside: Outputs are equal, but points that the caller named differ.

    Returns:
        The finding.
    """
    error = max(relative_distance(a, b) for a, b in pairs.values())
    alone = _worst_image(images, pairs)
    try:
        pair_outputs(model, reference, alone)
    except ConfigError:  # a traced module may take batches of one size alone
        alone = images
    if not is_inside:
        cause = _explain_runs(model, reference, images, alone, error)
        if cause is not None:
            return _without_points(cause)
    # In float64 an eps of 1e-12 in place of 1e-6 stands out, which float32 rounds away.
    coarse = coarsest_dtype((model, reference))
    wide = [subject.widen(coarse, alone) for subject in (model, reference)]
    model, reference = (w or s for w, s in zip(wide, (model, reference), strict=True))
    dtype = torch.float64 if all(wide) else torch.float32
    images = to_float64(alone)
    exact = pair_outputs(model, reference, images)
    a, b = common_states(model.read(images)[1], reference.read(images)[1])
    cause = _find_uncalled_block(model, reference, a, b)
    if cause is not None:
        return _without_points(cause)
    left = max(relative_distance(x, y) for x, y in exact.values())
    if is_inside:
        named = [n for n in model.named if n in a and n in b]
        left = max((relative_distance(a[n], b[n]) for n in named), default=left)
    least = _ROUNDED_INSIDE if is_inside else max(_NOISE[dtype], 0.02 * error)
    if all(wide) and left < least:
        return _without_points(
            f"rounding: in float64 they differ by {left:.1g} of the largest value, and by "
            f"{error:.1g} as they are",
            is_rounding=True,
        )
    return _compare_points(model, reference, images, a, b, exact, dtype)


def _explain_runs(
    model: Subject, reference: Subject, images: Tensor, alone: Tensor, error: float
) -> str | None:
    """Find what concerns no point: images that change each other, randomness, or depth."""
    if len(images) > len(alone):
        errors = [relative_distance(*p) for p in pair_outputs(model, reference, alone).values()]
        if max(errors) < 0.01 * error:
            return (
                "batch: one image alone gives equal outputs, so that images of a batch change each "
                "other (axes of batch and tokens exchanged, or a norm over the batch)"
            )
    # A module may draw random numbers also in eval mode, as MAE's mask.
    for subject in (model, reference):
        twice = pair_outputs(subject, subject, alone)
        gaps = [relative_distance(a.nan_to_num(), b.nan_to_num()) for a, b in twice.values()]
        if max(gaps) > 0.1 * min(error, 1.0):
            return f"randomness: the {subject.role} gives other outputs each time"
    depths = model.depth, reference.depth
    if 0 not in depths and depths[0] != depths[1]:
        return f"depth: the model has {depths[0]} blocks, the reference {depths[1]}"
    return None


def _find_uncalled_block(model: Subject, reference: Subject, a: States, b: States) -> str | None:
    """Find a block that one module does not call, while the other does."""
    for index in range(max(model.depth, reference.depth)):
        prefix = f"blocks.{index}."
        is_called = [any(name.startswith(prefix) for name in states) for states in (a, b)]
        for subject, own, other in zip((model, reference), is_called, is_called[::-1], strict=True):
            path = subject.sources.get(f"{prefix}resid")
            if path is not None and other and not own:
                return f"blocks: the {subject.role} does not call block {index} ({path})"
    return None


def _without_points(cause: str, *, is_rounding: bool = False) -> Finding:
    """Return a finding that concerns no single point."""
    return Finding(None, None, (), None, cause, True, None, "float64", is_rounding)


def _worst_image(images: Tensor, pairs: Pairs) -> Tensor:
    """Return the image whose outputs differ most, (1, C, H, W)."""
    gaps = [
        (a - b).abs().flatten(1).amax(dim=1).nan_to_num(torch.inf)
        for a, b in pairs.values()
        if a.shape == b.shape and a.ndim > 1 and len(a) == len(images)
    ]
    index = int(torch.stack(gaps).amax(dim=0).argmax()) if gaps else 0
    return images[index : index + 1]


def _compare_points(
    model: Subject,
    reference: Subject,
    images: Tensor,
    a: States,
    b: States,
    outputs: Pairs,
    dtype: torch.dtype,
) -> Finding:
    """Compare all common points and explain the first that differs."""
    depth = max(model.depth, reference.depth)
    a = align_channels(a, b, depth)
    errors = _measure(a, b, depth)
    inside = dict(errors)
    last = max(outputs, key=lambda name: relative_distance(*outputs[name]))
    # The output is the last point: a jump of the error there is the head's.
    errors.setdefault(last, measure_difference(*outputs[last]))
    first = first_difference(errors, _NOISE[dtype]) or last
    if first == last:
        a, b = a | {last: outputs[last][0]}, b | {last: outputs[last][1]}
    case = Case(first, model, reference, a, b, images)
    cause, is_certain = explain(case, is_output=first == last, is_exact=dtype == torch.float64)
    if not is_certain and errors[first].relative < 1e-6:
        cause += ", or rounding of a part that is computed in float32"
    elif not is_certain and errors[first].relative <= case.eps:
        cause += ", or rounding of a weight that one module holds in another form"
    if not is_certain and dtype != torch.float64:
        cause += ", or rounding to fewer bits inside, as a module does not run in float64"
    names = list(inside)
    index = names.index(first) if first in inside else len(names)
    before = names[index - 1] if index else None
    if not is_certain and _hides_parts(before, first, case.depth):
        between = f" after {before}" if before else ""
        cause = f"a part{between} where no point is compared, or {cause}"
    paths = tuple(
        f"{subject.role}: {subject.sources[first]}"
        for subject in (model, reference)
        if first in subject.sources
    )
    label = str(dtype).removeprefix("torch.")
    return Finding(first, errors[first], paths, before, cause, is_certain, len(names), label)


def align_channels(a: States, b: States, depth: int) -> States:
    """Bring queries and keys of a module into the order of channels that another has.

    Rotary pairs are halves of a head in one library and neighbours in another. One order of both
    queries and keys changes no scores.

    Args:
        a: Tensors of the module by name.
        b: Tensors of the other module by name.
        depth: Number of blocks.

    Returns:
        Tensors of the module; queries and keys of every block in the order of the first block that
        has both in one other order.
    """
    for index in range(depth):
        names = [f"blocks.{index}.attn.{letter}" for letter in "qk"]
        if not all(name in a and name in b and a[name].ndim == 3 for name in names):
            continue
        orders = [match_rows(a[name][0].mT, b[name][0].mT) for name in names]
        if orders[0] is not None and orders[0] == orders[1]:
            width = len(orders[0])
            return {
                name: x[..., orders[0]]
                if name.endswith((".attn.q", ".attn.k")) and x.shape[-1] == width
                else x
                for name, x in a.items()
            }
    return a


def _hides_parts(before: str | None, first: str, depth: int) -> bool:
    """Return True if a forward has points between two that are compared one after the other."""
    order = order_points(depth)
    if first not in order:  # the output, or a module without a known name
        return before is None or before not in ("pooled", "logits")
    # The tokens before a block are those after the one before it, or the embedding.
    skipped = order[order.index(before) + 1 if before in order else 0 : order.index(first)]
    return any(not name.endswith("resid_pre") for name in skipped)


def _measure(a: States, b: States, depth: int) -> dict[str, Difference]:
    """Measure every common point in the order of the forward.

    Points of other shapes are no counterparts, but where each has tokens or patches of its own.
    Tokens of the last block are cut to those that both compute.
    """
    order = order_points(depth)
    names = [name for name in order if name in a and name in b]
    names += [
        n for n in a if n in b and n not in order and ".attn.qkv" not in n and n[-3:] != ".in"
    ]
    shaped = ("patch_embed.proj", *TOKENS)
    return {
        name: measure_difference(a[name], b[name])
        for name in names
        if a[name].shape == b[name].shape
        or (name.split(".", 2)[-1] if name[:7] == "blocks." else name) in shaped
    }


def first_difference(errors: Mapping[str, Difference], noise: float) -> str | None:
    """Choose the first point that really differs.

    Args:
        errors: Distances of points in the order of the forward.
        noise: Largest relative distance of equal tensors.

    Returns:
        Name of the point; None where all are equal.
    """
    names = [name for name in errors if errors[name].relative > noise]
    names = [name for name in names if not _is_reordered(name, errors, noise)]
    if not names or errors[names[0]].relative > _ROUNDED:
        return names[0] if names else None
    largest = 0.0
    for name in names:
        error = errors[name].relative
        if largest and error > max(_ROUNDED, _JUMP * largest):
            return name
        largest = max(largest, error)
    return names[0]


def _is_reordered(name: str, errors: Mapping[str, Difference], noise: float) -> bool:
    """Return True for queries and keys that differ, but give equal attention.

    Their channels may be in another order, as rotary pairs are halves in one library and neighbours
    in another.
    """
    block, _, letter = name.rpartition(".attn.")
    heads = errors.get(f"{block}.attn.heads")
    return letter in ("q", "k") and heads is not None and heads.relative <= max(noise, _ROUNDED)
