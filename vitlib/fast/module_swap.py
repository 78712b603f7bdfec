"""Recognise stock modules, and swap them for fast ones without touching the model.

A stock module is of vitlib's own classes, unchanged and without hooks. Only such a module may be
replaced by a faster one, here and in vitlib.train.fused_step: its code is known, so its numbers
are. Everything else is called as the user made it.

How data flows: the model is copied without its weights (a module is its dictionary of children, and
only that is new). Each stock module is replaced by its fast counterpart; every other module is the
very object that the user put there. ViT.forward then runs on the copy, so whatever a subclass or a
hook does still happens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from vitlib.encoder import (
    MLP,
    Attention,
    Block,
    LayerNorm,
    LayerScale,
    Linear,
    RMSNorm,
    RotaryAttention,
    SwiGLU,
)
from vitlib.fast.linears import own_copy
from vitlib.patch_embed import PatchEmbed, PatchProjection
from vitlib.positions import LearnedRotaryEmbedding, RelativePositionBias, RotaryEmbedding
from vitlib.variants import AttentionPool, PostNormBlock, PromptedPosition
from vitlib.vit import ViT

STOCK_TYPES: tuple[type[nn.Module], ...] = (
    ViT, PatchEmbed, Block, Attention, RotaryAttention, AttentionPool, MLP, SwiGLU,
    Linear, LayerNorm, LayerScale, RelativePositionBias, RotaryEmbedding, LearnedRotaryEmbedding,
    RMSNorm, PostNormBlock, PromptedPosition,
    nn.Linear, nn.LayerNorm, nn.Conv2d, PatchProjection,
    nn.Identity, nn.ModuleList, nn.ParameterList,
)  # fmt: skip
# Classes that only call their children: these may be replaced inside a subclass too.
CONTAINER_TYPES = (ViT, PatchEmbed, Block, Attention, MLP, SwiGLU, nn.ModuleList)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# (path, stock module) -> its fast counterpart, or None to look at the children instead.
Convert = Callable[[str, nn.Module], "nn.Module | None"]
_untyped_module: Any = torch_module  # its functions have no annotations


def has_global_hooks() -> bool:
    """Return True if a hook is registered for every module of the process."""
    return bool(_untyped_module._has_any_global_hook())


def is_stock(
    module: object,
    types: Collection[type[nn.Module]] = STOCK_TYPES,
    methods: Collection[str] | None = None,
) -> bool:
    """Return True if a module does what its class says: no subclass, hook or replaced method.

    Its children are not looked at: is_stock_tree does that.

    Args:
        module: The module.
        types: The exact classes that count as stock.
        methods: Names that the instance must not replace. None checks every method, which takes
            longer: training asks for each module at each step, and names the ones that it calls.

    Returns:
        True if a faster module may stand in its place.
    """
    if type(module) not in types or any(getattr(module, name, None) for name in _HOOKS):
        return False
    if methods is not None:
        return not any(name in vars(module) for name in methods)
    # An attribute of the instance hides the method of its class.
    return not any(
        callable(value) and callable(getattr(type(module), name, None))
        for name, value in vars(module).items()
    )


def is_stock_tree(module: nn.Module) -> bool:
    """Return True if a module and all within it are stock, in the layout that vitlib builds.

    Args:
        module: The module.

    Returns:
        False also where a global hook watches every module.
    """
    if has_global_hooks():
        return False
    return all(is_stock(part) for part in module.modules()) and has_stock_layout(module)


def has_stock_layout(module: nn.Module) -> bool:
    """Return True if a module of stock parts is put together as vitlib builds it.

    A stock part in the wrong place, such as an nn.Identity for a norm, has other arithmetic.

    Args:
        module: Any module; a Block, a PatchEmbed and an AttentionPool have a layout to check.

    Returns:
        True if the parts are those that the faster module expects.
    """
    if isinstance(module, PatchEmbed):
        conv, patch = module.proj, module.patch_size
        return (
            isinstance(conv, nn.Conv2d)
            and (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            == (patch, patch, (0, 0), (1, 1), 1)
            and (module.norm is None or is_norm(module.norm, conv.out_channels))
        )
    if isinstance(module, AttentionPool):
        return module.projects_query and module.mlp is not None
    if not isinstance(module, Block):
        return True
    attn, mlp = module.attn, module.mlp
    if not isinstance(attn, Attention) or attn.attend or not isinstance(mlp, MLP):
        return False
    linears, d = (attn.q, attn.k, attn.v, attn.proj), attn.num_heads * attn.head_dim
    qk_norms, qk_width = (attn.q_norm, attn.k_norm), attn.head_dim if attn.norms_heads else d
    return (
        all(x is None or isinstance(x, LayerScale) for x in (module.ls1, module.ls2))
        and all(is_norm(norm, d) for norm in (module.norm1, module.norm2))
        and (qk_norms == (None, None) or all(is_norm(norm, qk_width) for norm in qk_norms))
        and (attn.sub_norm is None or is_norm(attn.sub_norm, d))
        and all(isinstance(x, nn.Linear) and x.weight.shape == (d, d) for x in linears)
        and all(isinstance(x, nn.Linear) for x in (mlp.fc1, mlp.fc2))
        and (mlp.sub_norm is None or is_norm(mlp.sub_norm, mlp.fc2.in_features))
    )


def is_norm(module: object, width: int) -> bool:
    """Return True for a norm whose numbers a fast module can take over.

    Args:
        module: Any module.
        width: The number of channels that it should norm.
    """
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm) or module.normalized_shape != (width,):
        return False
    has_bias = isinstance(module, nn.RMSNorm) or module.bias is not None
    return has_bias and module.weight is not None and module.eps is not None


def is_reduced(model: ViT) -> bool:
    """Return True for a model of `ViT.with_tokens`, whose own forward calls token functions.

    Args:
        model: A model.
    """
    if type(model) is ViT:
        return False
    from vitlib.tokens.model import ReducedViT  # few programs have one

    return type(model) is ReducedViT


def unoptimized_modules(model: ViT) -> list[str]:
    """List the modules that are not stock, which optimize() leaves as the user made them.

    Args:
        model: A model.

    Returns:
        Their paths, outermost first. Below a module of an unknown class nothing is listed.
    """
    paths: list[str] = []
    types = (*STOCK_TYPES, type(model)) if is_reduced(model) else STOCK_TYPES

    def visit(module: nn.Module, path: str) -> None:
        if not is_stock(module, types):
            paths.append(path or "the model itself")
            if not isinstance(module, CONTAINER_TYPES):
                return
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    if has_global_hooks():
        paths.insert(0, "every module (a global hook)")
    return paths


def swap_stock_modules(module: nn.Module, convert: Convert, path: str = "") -> nn.Module:
    """Replace each stock module that has a fast counterpart.

    Args:
        module: The model, or a module within it. It is only read.
        convert: Gives the counterpart of a stock module.
        path: The module's path in the model; "" is the model itself.

    Returns:
        A copy with the counterparts in place, or the module itself where nothing changes.
    """
    if is_stock_tree(module):
        fast = convert(path, module)
        if fast is not None:
            return fast
    if not isinstance(module, CONTAINER_TYPES):
        return module
    children = {
        name: None
        if child is None
        else swap_stock_modules(child, convert, f"{path}.{name}" if path else name)
        for name, child in module._modules.items()
    }
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    return copy_with_children(module, children)


def copy_with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """Copy a module with other children; hooks and buffers are shared.

    Args:
        module: The module, which is only read.
        children: The children of the copy, by name.

    Returns:
        The copy in eval mode, its own parameters in float32.
    """
    clone = copy.copy(module)
    # nn.Module.__setattr__ would register into the dictionaries that the copy still shares, so the
    # three entries are replaced in the instance's __dict__.
    clone.__dict__["_modules"] = children
    clone.__dict__["_parameters"] = {
        name: None if tensor is None else own_copy(tensor)
        for name, tensor in module._parameters.items()
    }
    clone.__dict__["training"] = False
    return clone


def copy_as_float32(module: nn.Module) -> nn.Module:
    """Copy a stock module that is too small to be worth a faster one.

    Args:
        module: The module, which is only read.

    Returns:
        A deep copy in float32 without gradients.
    """
    return copy.deepcopy(module).float().requires_grad_(False)
