"""Add small trainable parts to a model whose weights stay frozen, and merge LoRA into weights.

How data flows: the module tree is copied, its parameters are not: the copy has frozen parameters of
its own over the same memory. Prompts, LoRA and adapters are then put into the copy. Each wrapper
has the part that it wraps under the name `base`, so that a name of the frozen model is found by
leaving `base` out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vitlib.adapters.bottleneck import BottleneckAdapter, ParallelAdapter
from vitlib.adapters.lora import LoraLinear, is_wrappable, layer_parent
from vitlib.adapters.prompts import add_prompts
from vitlib.adapters.settings import (
    Adaptation,
    AdapterSettings,
    LoraSettings,
    read_adaptation,
)
from vitlib.encoder import Block
from vitlib.errors import ConfigError
from vitlib.parts.sharing import copy_sharing_weights
from vitlib.system.torch_state import isolate_torch_settings, outside_inference_mode
from vitlib.variants import (
    PostNormBlock,
    PromptedBlock,
    PromptedPosition,
    PromptedPostNormBlock,
)
from vitlib.vit import ViT

HEAD = ("head.", "head_dist.")
PROMPTS = "prompt_token"
_WRAPPERS = (LoraLinear, BottleneckAdapter, PromptedPosition)
_BLOCKS = (Block, PostNormBlock, PromptedBlock, PromptedPostNormBlock)
_SLOTS = {"attn": "ls1", "mlp": "ls2"}


@isolate_torch_settings()
@outside_inference_mode()
def adapt(
    model: ViT,
    *,
    prompts: int | Mapping[str, Any] | None = None,
    adapters: int | Mapping[str, Any] | None = None,
    lora: int | Mapping[str, Any] | None = None,
) -> ViT:
    """Make a model with small parts to train, over the frozen weights of a model.

    The new model's weights are frozen and lie in the memory of the old one's, which stays as it is
    and trains as before. The parts and a copy of the head are trainable. To train more of it, call
    `copy.deepcopy(model)` first: a weight that is trained changes in both models otherwise.

    LoRA and adapters start at 0, so that the new model first gives the logits of the old one.
    Prompts are drawn at random.

    Args:
        model: The model, which is not changed.
        prompts: Number of learned tokens after the prefix tokens (2203.12119), or
            `dict(count=10, deep=True)` for tokens of each block's own. They count as prefix tokens
            (`num_prefix_tokens`), have no position, and are no part of a mean.
        adapters: Width of bottleneck adapters behind each branch (1902.00751), or
            `dict(dim=64, on="attn mlp", parallel=False, scale=1.0)`. `parallel=True` puts them
            beside the MLP (2205.13535), which then has no point `mlp.hidden`.
        lora: Rank of low-rank updates (2106.09685), or `dict(rank=8, on="qv", alpha=16.0)`; `on` is
            some of q, k, v, o, fc1 and fc2.

    Returns:
        The new model, in the mode of the old one.

    Raises:
        ConfigError: A setting is not valid, nothing is to be added, or a part of the model that
            must be vitlib's own is not.
    """
    check_plain(model, "adapt")
    adaptation = read_adaptation(prompts, adapters, lora)
    adapted = copy_over_frozen(model)
    add_parts(adapted, adaptation, adapted.device)
    return adapted


def check_plain(model: object, name: str) -> None:
    """Check that a model is a ViT that has no added parts.

    Args:
        model: Any object.
        name: The function that takes it, for the message.

    Raises:
        ConfigError: It is another object, or was adapted before.
    """
    if not isinstance(model, ViT):
        raise ConfigError(f"{name}: expected a ViT, got a {type(model).__name__}")
    if model.adaptation is not None:
        added = ", ".join(model.adaptation.to_json())
        raise ConfigError(
            f"{name}: the model has {added} already: give the model that these were added to, and "
            "all parts in one call"
        )


def copy_over_frozen(model: ViT) -> ViT:
    """Copy a model's modules, with frozen parameters over the same memory.

    Args:
        model: The model, which is only read.

    Returns:
        The copy. Its head has memory of its own and trains.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(HEAD):
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone())
        else:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for name, buffer in model.named_buffers():
        if not name.startswith(HEAD):
            memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def add_parts(model: ViT, adaptation: Adaptation, device: torch.device) -> None:
    """Put parts into a model.

    Args:
        model: The model, changed in place.
        adaptation: The settings.
        device: Device of the parts; on "meta" nothing is drawn.

    Raises:
        ConfigError: A part of the model is not vitlib's own.
    """
    model.adaptation = adaptation
    if adaptation.prompts is not None:
        add_prompts(model, adaptation.prompts, device)
    for index, block in enumerate(model.blocks):
        if adaptation.lora is not None:
            add_lora(block, index, adaptation.lora, device)
        if adaptation.adapters is not None:
            width = model.config.embed_dim
            add_adapters(block, index, adaptation.adapters, width, device)


def add_lora(block: nn.Module, index: int, settings: LoraSettings, device: torch.device) -> None:
    """Wrap linear layers of a block.

    Args:
        block: The block, changed in place.
        index: Its number, for the message.
        settings: Rank and layers.
        device: Device of the updates.

    Raises:
        ConfigError: A layer is not there, not vitlib's own, or smaller than the rank.
    """
    for name in settings.on:
        parent = layer_parent(block, name)
        base: Any = getattr(parent, name, None)
        if parent is None or not is_wrappable(base):
            raise ConfigError(
                f"lora: {name} of blocks.{index} is a {type(base).__name__}: expected a linear "
                "layer; leave it out of on="
            )
        if settings.rank > (largest := min(base.in_features, base.out_features)):
            raise ConfigError(
                f"lora: rank={settings.rank}: expected at most {largest}, the smaller side of "
                f"{name} of blocks.{index}"
            )
        layer = LoraLinear(base, settings.rank, settings.alpha, device=device)
        setattr(parent, name, layer.train(block.training))


def add_adapters(
    block: nn.Module, index: int, settings: AdapterSettings, width: int, device: torch.device
) -> None:
    """Put adapters behind the branches of a block, or beside its MLP.

    Args:
        block: The block, changed in place.
        index: Its number, for the message.
        settings: Width of the bottleneck, and which branches.
        width: Channels of the branches, D.
        device: Device of the adapters.

    Raises:
        ConfigError: The block is not vitlib's own: nothing is known of its branches.
    """
    if type(block) not in _BLOCKS:
        raise ConfigError(
            f"adapters: blocks.{index} is a {type(block).__name__}: expected vitlib's Block"
        )
    weight = next(block.parameters())
    like = torch.empty(0, dtype=weight.dtype, device=device)
    assert settings.scale is not None  # the settings fill both in
    assert settings.on is not None
    for branch in settings.on:
        slot = branch if settings.parallel else _SLOTS[branch]
        kind = ParallelAdapter if settings.parallel else BottleneckAdapter
        adapter = kind(getattr(block, slot), like, width, settings.dim, settings.scale)
        setattr(block, slot, adapter.train(block.training))


@isolate_torch_settings()
@outside_inference_mode()
def merge_lora(model: ViT) -> ViT:
    """Make a model whose weights contain the updates of LoRA, which is then as fast as its base.

    Args:
        model: A model with LoRA, which is not changed.

    Returns:
        A new model without LoRA, whose other weights are those of `model`. The merged ones are
        computed in float64 and rounded once; they train, as the updates did.

    Raises:
        ConfigError: The model has no LoRA.
    """
    if not isinstance(model, ViT):
        raise ConfigError(f"merge_lora: expected a ViT, got a {type(model).__name__}")
    if not any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ConfigError(
            "merge_lora: the model has no LoRA: vitlib.adapt(model, lora=...) adds it"
        )
    merged = copy_sharing_weights(model)
    for module in list(merged.modules()):
        for name, child in module.named_children():
            if isinstance(child, LoraLinear):
                # Not merge(), which writes into the memory that `model` shares.
                child.base.weight = nn.Parameter(child.merged_weight().to(child.base.weight))
                setattr(module, name, child.base)
    if merged.adaptation is not None:
        rest = replace(merged.adaptation, lora=None)
        merged.adaptation = None if rest == Adaptation() else rest
    return merged


def base_names(model: ViT) -> dict[str, str | None]:
    """Map the names of a model's tensors to those that they have in its base.

    Args:
        model: An adapted model.

    Returns:
        For each name of its state dict that of the base; None for a tensor of an added part.
    """
    modules = model.named_modules(remove_duplicate=False)
    wrappers = {path for path, module in modules if isinstance(module, _WRAPPERS)}
    return {name: base_name(name, wrappers) for name in model.state_dict()}


def base_name(name: str, wrappers: set[str]) -> str | None:
    """Return the name that a tensor has in the base, or None if it was added.

    Args:
        name: Its name in the adapted model.
        wrappers: Paths of the modules that wrap another one as `base`.
    """
    words: list[str] = []
    path = ""
    for word in name.split("."):
        if path in wrappers:
            if word != "base":
                return None
        else:
            words.append(word)
        path = f"{path}.{word}" if path else word
    return None if words[-1] == PROMPTS else ".".join(words)
