"""What a model looks at in images: (model, pixels, target) -> maps as arrays.

How data flows: pixels -> the model's own forward, or its attention, or forward_explicit and its
gradients -> maps.py -> one number a patch (B, h, w), or a pixel (B, H, W). Whatever was asked, the
model, its gradients and its mode are left as they were.

Shapes: as in maps.py; H W pixels.
Sources: Abnar and Zuidema 2005.00928; Chefer et al. 2103.15679; Smilkov et al. 1706.03825
(SmoothGrad); Zeiler and Fergus 1311.2901 (occlusion); Caron et al. 2104.14294; Oquab et al.
2304.07193.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitlib.config import resolve_block_indices
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

Target = int | list[int] | Tensor | None


def attention_rollout(
    model: ViT, pixels: Tensor, *, fuse: Fuse = "mean", discard: float = 0.0
) -> Array:
    """(B, C, H, W) -> how much of each patch reaches what the head reads, (B, h, w) (2005.00928).

    What the head reads: the class token, or the mean of the patches where it reads that.
    """
    with eval_mode(model), torch.no_grad():
        attention = model.attention(pixels)
    read = _read(model)
    reached = maps.rollout(attention, fuse=fuse, discard=discard, rows=read)
    return _patches(model, pixels, reached if read else reached[:, model.num_prefix_tokens :])


def relevance(model: ViT, pixels: Tensor, target: Target = None) -> Array:
    """(B, C, H, W) and a class (None: the best) -> how much each patch counts for its logit,
    (B, h, w), 0 or more (2103.15679)."""
    check_head(model)
    # Its gradients are as large; what their graph keeps beside is at most as much again.
    model.check_attention_memory(pixels, len(model.blocks), copies=3)
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        found = forward_explicit(model, pixels.detach().clone())
        _, scores = class_scores(found.logits, target)
        wanted = found.attention if found.pool is None else [*found.attention, found.pool]
        gradients = torch.autograd.grad(scores.sum(), wanted, allow_unused=True)
    pairs = [
        (a, torch.zeros_like(a) if g is None else g) for a, g in zip(wanted, gradients, strict=True)
    ]
    depth, read = len(found.attention), _read(model)
    attention, slopes = zip(*pairs[:depth], strict=True)
    rows = maps.relevance(attention, slopes, rows=read)
    if found.pool is not None:  # the token that pools is one more layer, of one row
        asked, slope = (maps.to_array(x, 4, "attention") for x in pairs[depth])
        rows = (asked * slope).clip(min=0).mean(axis=1) @ rows
    elif not read:
        rows = rows[:, model.num_prefix_tokens :]
    return _patches(model, pixels, rows)


def gradient(
    model: ViT,
    pixels: Tensor,
    target: Target = None,
    *,
    samples: int = 16,
    noise: float = 0.15,
    seed: int = 0,
) -> Array:
    """(B, C, H, W) and a class (None: the best) -> how fast its logit changes with each pixel: the
    largest of the channels, mean of `samples` noisy copies, (B, H, W), 0 or more (1706.03825).

    noise: the standard deviation, as a share of the pixels' range. samples=1, noise=0: the plain
    gradient.
    """
    if samples < 1 or noise < 0:
        raise ConfigError(f"samples={samples}, noise={noise}: expected 1 or more, 0 or more")
    sources = torch.Generator().manual_seed(seed)
    width = (pixels.amax(dim=(1, 2, 3)) - pixels.amin(dim=(1, 2, 3)))[:, None, None, None]
    total = torch.zeros(len(pixels), *pixels.shape[2:], dtype=torch.float32, device="cpu")
    with eval_mode(model):
        chosen = resolve_classes(model, pixels, target)
        for _ in range(samples):
            drawn = torch.randn(pixels.shape, generator=sources, dtype=torch.float32).to(pixels)
            with torch.inference_mode(False), torch.enable_grad():
                x = (pixels.detach().clone() + drawn * width.clone() * noise).requires_grad_()
                scores = class_scores(model(x), chosen.clone())[1]
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
    """(B, C, H, W) and a class (None: the best) -> by how much its probability falls where a gray
    square covers each patch, the mean of all squares over it, (B, h, w) (1311.2901, section 4.2).

    window, stride: in patches; by default a sixth of the shorter side, and half of that.
    """
    h, w = model.patch_grid(pixels)
    window = max(1, round(min(h, w) / 6)) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= min(h, w) or not 1 <= stride <= window or batch_size < 1:
        raise ConfigError(
            f"window={window}, stride={stride}, batch_size={batch_size}: expected a window of 1 to "
            f"{min(h, w)} patches, a stride of 1 to the window, a batch of 1 or more"
        )
    (p, q), maps_found = model.config.patch_size, []
    corners = [(y, x) for y in _starts(h, window, stride) for x in _starts(w, window, stride)]
    with eval_mode(model), torch.no_grad():
        for image, class_ in zip(pixels, resolve_classes(model, pixels, target), strict=True):
            before = probabilities(model, image[None])[0, class_].item()
            total, count = np.zeros((h, w)), np.zeros((h, w))
            for start in range(0, len(corners), batch_size):
                some = corners[start : start + batch_size]
                covered = image.expand(len(some), -1, -1, -1).clone()
                for one, (y, x) in zip(covered, some, strict=True):
                    one[:, y * p : (y + window) * p, x * q : (x + window) * q] = 0
                falls = before - probabilities(model, covered)[:, class_].cpu().numpy()
                for (y, x), fall in zip(some, falls, strict=True):
                    total[y : y + window, x : x + window] += fall
                    count[y : y + window, x : x + window] += 1
            maps_found.append(total / count)
    return np.array(maps_found, np.float32).reshape(-1, h, w)


def patch_features(model: ViT, pixels: Tensor, layer: int = -1) -> Array:
    """(B, C, H, W) -> what a block makes of the patches, through the final norm, (B, h, w, D)."""
    resolve_block_indices([layer], len(model.blocks), "layer")
    with eval_mode(model), torch.no_grad():
        found = model.forward_intermediates(pixels, [layer], norm=True, reshape=True)[0]
    return maps.to_array(found, 4, "features").transpose(0, 2, 3, 1)


def patch_pca(model: ViT, pixels: Tensor, components: int = 3, layer: int = -1) -> Array:
    """(B, C, H, W) -> the first principal components of all images' patches together,
    (B, h, w, components), each 0..1 (2304.07193, figure 1)."""
    features = patch_features(model, pixels, layer)
    b, h, w, d = features.shape
    found, _ = maps.patch_pca(features.reshape(b, h * w, d), components)
    return found.reshape(b, h, w, components)


def similarity(
    model: ViT, pixels: Tensor, patch: tuple[int, int] | None = None, layer: int = -1
) -> Array:
    """(B, C, H, W) -> the cosine of each patch's features with the class token's, or with those of
    the patch (row, column), (B, h, w), -1..1.

    Raises ConfigError where there is no such patch, or no class token and no patch is given.
    """
    resolve_block_indices([layer], len(model.blocks), "layer")
    with eval_mode(model), torch.no_grad():
        patches, prefix = model.forward_intermediates(
            pixels, [layer], norm=True, return_prefix_tokens=True
        )[0]
    h, w = model.patch_grid(pixels)
    if patch is not None:
        row, column = patch
        if not (0 <= row < h and 0 <= column < w):
            raise ConfigError(
                f"patch={patch}: expected a row in 0..{h - 1}, a column in 0..{w - 1}"
            )
        asked = patches[:, row * w + column, None]
    elif model.config.class_token:
        asked = prefix[:, :1]
    else:
        raise ConfigError("this model has no class token: give the patch to compare with")
    return maps.cosine(asked, patches).reshape(-1, h, w)


def foreground(
    model: ViT, pixels: Tensor, mass: float = 0.6, layer: int = -1
) -> npt.NDArray[np.bool_]:
    """(B, C, H, W) -> the patches of the foreground, (B, h, w).

    First those that hold `mass` of what the class token draws from in a block (2104.14294), the
    median of its heads, as single patches of DINOv2 draw any amount; then every patch goes to that
    group or the rest, by its features. Raises ConfigError where the model has no class token.
    """
    if not model.config.class_token:
        raise ConfigError(
            "this model has no class token whose attention could tell a foreground: pca and "
            "similarity to a patch need none"
        )
    resolve_block_indices([layer], len(model.blocks), "layer")
    with eval_mode(model), torch.no_grad():
        rows = model.attention(pixels, [layer], rows="prefix")[0][
            :, :, 0, model.num_prefix_tokens :
        ]
    b, h, w, d = (features := patch_features(model, pixels, layer)).shape
    grid = np.median(maps.to_array(rows, 3, "attention"), axis=1).reshape(b, h, w)
    first = maps.top_mass(maps.smooth(grid).reshape(b, h * w), mass)
    found = [
        maps.split_groups(x, start)
        for x, start in zip(features.reshape(b, h * w, d), first, strict=True)
    ]
    return np.stack(found).reshape(b, h, w)


def head_maps(model: ViT, pixels: Tensor, layers: int | list[int] | None = None) -> Array:
    """(B, C, H, W) -> where each head of each layer asked for draws what the head reads from,
    (B, L, heads, h, w): the class token's row, or the mean of the patches' where there is none."""
    (h, w), first = model.patch_grid(pixels), model.num_prefix_tokens
    rows: Literal["all", "prefix"] = "prefix" if model.config.class_token else "all"
    with eval_mode(model), torch.no_grad():
        found = model.attention(pixels, layers, rows=rows)
    read = [x[:, :, 0] if rows == "prefix" else x[:, :, first:].mean(dim=2) for x in found]
    grids = torch.stack(read, dim=1)[..., first:].unflatten(-1, (h, w))  # type: ignore[no-untyped-call]
    return maps.to_array(grids, 5, "attention")


def class_named(labels: Sequence[str], name: str) -> int:
    """The class that a person means: its number, its label, or one of the names that a label lists,
    whatever the case. Raises ConfigError, naming the nearest, for none or several."""
    wanted = _folded(name)
    if wanted.isascii() and wanted.isdecimal() and len(wanted) < 10:
        if int(wanted) < len(labels):
            return int(wanted)
        raise ConfigError(
            f"no class {wanted}: expected a label, or a number in 0..{len(labels) - 1}"
        )
    whole = [i for i, label in enumerate(labels) if _folded(label) == wanted]
    parts = {i: [_folded(p) for p in label.split(",")] for i, label in enumerate(labels)}
    found = whole or [i for i, names in parts.items() if wanted in names]
    if len(found) == 1:
        return found[0]
    if found:
        numbers = ", ".join(map(str, found))
        raise ConfigError(f"{name!r} is the label of {len(found)} classes: say which, {numbers}")
    every = {one: labels[i] for i, names in parts.items() for one in (*names, _folded(labels[i]))}
    near = list(dict.fromkeys(every[n] for n in get_close_matches(wanted, every, 3, 0.5)))
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see vitlib info"
    raise ConfigError(f"no label {name!r} among {len(labels)}: {hint}")


def _folded(text: str) -> str:
    """A label without its case, spaces around it and Unicode form: how labels are compared."""
    return unicodedata.normalize("NFC", text.strip()).casefold()


@contextmanager
def eval_mode(model: ViT) -> Iterator[None]:
    """In eval mode, and then as it was; and without the settings of the caller (settings.py)."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with isolate_torch_settings():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _read(model: ViT) -> int | None:
    """How many first tokens the head reads, whose rows' mean is the map; None: all patches."""
    if model.config.pool in ("cls", "pooler", "cls+mean"):
        return 2 if model.head_dist is not None else 1
    return None


def _patches(model: ViT, pixels: Tensor, rows: Array) -> Array:
    """Rows over all tokens (B, Q, T) -> their mean over the patches, (B, h, w)."""
    h, w = model.patch_grid(pixels)
    mean: Array = rows.mean(axis=1)
    return mean[:, model.num_prefix_tokens :].reshape(-1, h, w)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin, so that the last one ends at the end."""
    return sorted({*range(0, length - window + 1, stride), length - window})


def resolve_classes(model: ViT, pixels: Tensor, target: Target) -> Tensor:
    """The class asked of each image, or its best, (B,); one that is asked for needs no run."""
    check_head(model)
    if target is not None:
        return expand_target(target, len(pixels), model.num_classes).to(pixels.device)
    check_best(model)
    with torch.no_grad():
        return model(pixels).argmax(dim=1)  # type: ignore[no-any-return]


def check_best(model: ViT) -> None:
    """Raise ConfigError where no class is the best: of the numbers of a regression none is."""
    if task_of(model.config) == "regression" and model.num_classes > 1:
        names = ", ".join(labels_of(model.config)[:5])
        raise ConfigError(
            f"this model gives {model.num_classes} numbers (regression), and none is the best: "
            f"say which is meant, target= or --class ({names})"
        )


def probabilities(model: ViT, pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> the score of every class, (B, num_classes): 0..1, or a regression's numbers.

    Raises ConfigError where the model has no head.
    """
    check_head(model)
    logits = model(pixels).float()
    return logits_to_scores(logits, task_of(model.config))
