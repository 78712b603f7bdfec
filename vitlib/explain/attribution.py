"""Attribution: a model, pixels and a target -> maps of patches or pixels, as arrays.

How data flows: pixels -> the model's forward, its attention, or forward_explicit and gradients ->
maps.py -> one number for each patch (B, h, w) or pixel (B, H, W). The model, its gradients and its
mode are the same afterwards.

Shapes: as in maps.py; H W pixels.
Sources: Abnar and Zuidema 2005.00928; Chefer et al. 2103.15679; Smilkov et al. 1706.03825
(SmoothGrad); Zeiler and Fergus 1311.2901 (occlusion); Caron et al. 2104.14294; Oquab et al.
2304.07193.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor

from vitlib.config_parts import LEADING_TOKENS
from vitlib.errors import ConfigError
from vitlib.explain import maps
from vitlib.explain.attention_with_grads import (
    check_head,
    class_scores,
    expand_target,
    forward_explicit,
)
from vitlib.explain.maps import Array, Fuse
from vitlib.scores import labels_of, logits_to_scores, task_of
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

# Labels that an error names: ImageNet has 7 cats and 118 dogs.
MAX_HINTS = 5

Target = int | list[int] | Tensor | None


def attention_rollout(
    model: ViT, pixels: Tensor, *, fuse: Fuse = "mean", discard: float = 0.0
) -> Array:
    """Compute attention rollout: how much of each patch reaches the head (2005.00928).

    The rows are those of the token that the head reads, or the mean of the patches' rows where it
    reads their mean.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        fuse: How heads become one: "mean", "max" or "min".
        discard: Share of each row's weakest entries that is set to 0, from 0 to below 1.

    Returns:
        Shares, (B, h, w), 0..1.

    Raises:
        ConfigError: An option is out of range.
        ImageError: The attention does not fit in memory.
    """
    with eval_mode(model), torch.no_grad():
        attention = model.attention(pixels)
    rows = _num_rows(model)
    product = maps.rollout(attention, fuse=fuse, discard=discard, rows=rows)
    return _patch_map(model, pixels, product if rows else product[:, model.num_prefix_tokens :])


def relevance(model: ViT, pixels: Tensor, target: Target = None) -> Array:
    """Compute the relevance of each patch to the logit of a class (2103.15679).

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        target: A class for all images, or one for each; None means the best class of each.

    Returns:
        Relevance, (B, h, w), 0 or more.

    Raises:
        ConfigError: The model has no head, or a class is out of range.
        ImageError: The attention and its gradients do not fit in memory.
    """
    check_head(model)
    # Attention, its gradients, and at most as much again that the graph keeps for them.
    model.check_attention_memory(pixels, len(model.blocks), copies=3)
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        explicit = forward_explicit(model, pixels.detach().clone())
        _, scores = class_scores(explicit.logits, target)
        tensors = explicit.attention
        tensors = tensors if explicit.pool is None else [*tensors, explicit.pool]
        gradients = torch.autograd.grad(scores.sum(), tensors, allow_unused=True)
    pairs = [
        (a, torch.zeros_like(a) if g is None else g)
        for a, g in zip(tensors, gradients, strict=True)
    ]
    depth, num_rows = len(explicit.attention), _num_rows(model)
    attention, slopes = zip(*pairs[:depth], strict=True)
    rows = maps.relevance(attention, slopes, rows=num_rows)
    # The attention pool is one more layer, with one query.
    if explicit.pool is not None:
        pool, slope = (maps.to_array(x, 4, "attention") for x in pairs[depth])
        rows = (pool * slope).clip(min=0).mean(axis=1) @ rows
    elif not num_rows:
        rows = rows[:, model.num_prefix_tokens :]
    return _patch_map(model, pixels, rows)


def gradient(
    model: ViT,
    pixels: Tensor,
    target: Target = None,
    *,
    samples: int = 16,
    noise: float = 0.15,
    seed: int = 0,
) -> Array:
    """Compute SmoothGrad: the gradient of a logit in each pixel, mean of noisy copies (1706.03825).

    With samples=1 and noise=0 it is the gradient of the image itself.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        target: A class for all images, or one for each; None means the best class of each.
        samples: Number of noisy copies, 1 or more.
        noise: Standard deviation of the noise, as a share of the range of the pixels, 0 or more.
        seed: Seed of the noise.

    Returns:
        The largest absolute gradient of the channels, (B, H, W), 0 or more.

    Raises:
        ConfigError: The model has no head, a class is out of range, or an option is.
    """
    if samples < 1 or noise < 0:
        raise ConfigError(f"samples={samples}, noise={noise}: expected 1 or more, 0 or more")
    generator = torch.Generator().manual_seed(seed)
    width = (pixels.amax(dim=(1, 2, 3)) - pixels.amin(dim=(1, 2, 3)))[:, None, None, None]
    total = torch.zeros(len(pixels), *pixels.shape[2:], dtype=torch.float32, device="cpu")
    with eval_mode(model):
        classes = resolve_classes(model, pixels, target)
        for _ in range(samples):
            sample = torch.randn(pixels.shape, generator=generator, dtype=torch.float32).to(pixels)
            # A copy made outside inference mode: tensors of inference mode have no gradient.
            with torch.inference_mode(False), torch.enable_grad():
                x = (pixels.detach().clone() + sample * width.clone() * noise).requires_grad_()
                scores = class_scores(model(x), classes.clone())[1]
                slope = torch.autograd.grad(scores.sum(), x)[0]
            total += slope.abs().amax(dim=1).float().cpu()
    return (total / samples).numpy()


def occlusion(
    model: ViT,
    pixels: Tensor,
    target: Target = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
) -> Array:
    """Compute how far a class's probability falls where a gray square covers each patch.

    Zeiler and Fergus 1311.2901, section 4.2. A patch gets the mean of all squares over it.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        target: A class for all images, or one for each; None means the best class of each.
        window: Side of the square in patches; None means a sixth of the image's shorter side.
        stride: Step between squares in patches, at most the window; None means half of it.
        batch_size: Number of covered images in a forward.

    Returns:
        Falls of the probability, (B, h, w), -1..1; for a regression, of the output.

    Raises:
        ConfigError: The model has no head, a class is out of range, or an option is.
    """
    h, w = model.patch_grid(pixels)
    window = max(1, round(min(h, w) / 6)) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= min(h, w) or not 1 <= stride <= window or batch_size < 1:
        raise ConfigError(
            f"window={window}, stride={stride}, batch_size={batch_size}: expected a window of 1 to "
            f"{min(h, w)} patches, a stride of 1 to the window, a batch of 1 or more"
        )
    (p, q), grids = model.config.patch_size, []
    corners = [(y, x) for y in _starts(h, window, stride) for x in _starts(w, window, stride)]
    with eval_mode(model), torch.no_grad():
        for image, class_ in zip(pixels, resolve_classes(model, pixels, target), strict=True):
            before = probabilities(model, image[None])[0, class_].item()
            total, count = np.zeros((h, w)), np.zeros((h, w))
            for start in range(0, len(corners), batch_size):
                batch = corners[start : start + batch_size]
                covered = image.expand(len(batch), -1, -1, -1).clone()
                # 0 is the mean colour of the training set, as pixels are normalised.
                for copy, (y, x) in zip(covered, batch, strict=True):
                    copy[:, y * p : (y + window) * p, x * q : (x + window) * q] = 0
                falls = before - probabilities(model, covered)[:, class_].cpu().numpy()
                for (y, x), fall in zip(batch, falls, strict=True):
                    total[y : y + window, x : x + window] += fall
                    count[y : y + window, x : x + window] += 1
            grids.append(total / count)
    return np.array(grids, np.float32).reshape(-1, h, w)


def class_named(labels: Sequence[str], name: str) -> int:
    """Find the class of a name.

    Args:
        labels: Label of each class.
        name: Number of the class, its label, or one of the names that a label lists, in any case.

    Returns:
        The class.

    Raises:
        ConfigError: No class or several have the name; the message names the nearest.
    """
    wanted = _normalize_label(name)
    if wanted.isascii() and wanted.isdecimal() and len(wanted) < 10:
        if int(wanted) < len(labels):
            return int(wanted)
        raise ConfigError(
            f"no class {wanted}: expected a label, or a number in 0..{len(labels) - 1}"
        )
    whole = [i for i, label in enumerate(labels) if _normalize_label(label) == wanted]
    parts = {i: [_normalize_label(p) for p in label.split(",")] for i, label in enumerate(labels)}
    matches = whole or [i for i, names in parts.items() if wanted in names]
    if len(matches) == 1:
        return matches[0]
    if matches:
        numbers = ", ".join(map(str, matches))
        raise ConfigError(f"{name!r} is the label of {len(matches)} classes: say which, {numbers}")
    by_name = {part: labels[i] for i, names in parts.items() for part in names}
    by_name |= {_normalize_label(label): label for label in labels}
    holders = [label for label in labels if wanted in re.findall(r"\w+", _normalize_label(label))]
    near = holders or [by_name[n] for n in get_close_matches(wanted, by_name, 3, 0.5)]
    near = list(dict.fromkeys(near))
    more = f" or {len(near) - MAX_HINTS} more" * (len(near) > MAX_HINTS)
    hint = f"did you mean {' or '.join(map(repr, near[:MAX_HINTS]))}{more}?"
    raise ConfigError(
        f"no label {name!r} among {len(labels)}: {hint if near else 'vitlib info --json has all'}"
    )


def _normalize_label(text: str) -> str:
    """Remove case, outer spaces and differences of Unicode form, for comparisons."""
    return unicodedata.normalize("NFC", text.strip()).casefold()


@contextmanager
def eval_mode(model: ViT) -> Iterator[None]:
    """Put a model in eval mode, with torch's default settings, and restore both afterwards.

    Args:
        model: A ViT in any mode; parts may differ in theirs.
    """
    # Each part's own mode: a user may have frozen some of them in eval mode.
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with isolate_torch_settings():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _num_rows(model: ViT) -> int | None:
    """Count the leading tokens whose rows give the map; None where those of all patches do."""
    if model.config.pool in ("cls", "cls+mean"):
        return 2 if model.head_dist is not None else 1
    if model.config.pool == "prefix":
        return model.num_prefix_tokens
    return LEADING_TOKENS.get(model.config.pool)


def _patch_map(model: ViT, pixels: Tensor, rows: Array) -> Array:
    """Average rows over all tokens (B, Q, T) and take the patches' columns, (B, h, w)."""
    h, w = model.patch_grid(pixels)
    mean: Array = rows.mean(axis=1)
    return mean[:, model.num_prefix_tokens :].reshape(-1, h, w)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Return the starts of windows along a side; the last window ends at its end."""
    return sorted({*range(0, length - window + 1, stride), length - window})


def resolve_classes(model: ViT, pixels: Tensor, target: Target) -> Tensor:
    """Resolve a target to a class for each image; only the best class needs a forward.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        target: A class for all images, or one for each; None means the best class of each.

    Returns:
        Classes, (B,).

    Raises:
        ConfigError: The model has no head or no best class, or a class is out of range.
    """
    check_head(model)
    if target is not None:
        return expand_target(target, len(pixels), model.num_classes).to(pixels.device)
    check_best(model)
    with torch.no_grad():
        logits: Tensor = model(pixels)
    return logits.argmax(dim=1)


def check_best(model: ViT) -> None:
    """Check that a model has a best class; the outputs of a regression have none.

    Args:
        model: A ViT.

    Raises:
        ConfigError: The model is a regression of several outputs.
    """
    if task_of(model.config) == "regression" and model.num_classes > 1:
        names = ", ".join(labels_of(model.config)[:5])
        raise ConfigError(
            f"this model gives {model.num_classes} numbers (regression), and none is the best: "
            f"say which is meant, target= or --class ({names})"
        )


def probabilities(model: ViT, pixels: Tensor) -> Tensor:
    """Compute the score of every class, by the model's task.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).

    Returns:
        Scores, (B, num_classes), 0..1; the outputs of a regression.

    Raises:
        ConfigError: The model has no head.
    """
    check_head(model)
    logits = model(pixels).float()
    return logits_to_scores(logits, task_of(model.config))
