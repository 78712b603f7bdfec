"""Run a module that is not vitlib's, and read tensors of its forward at its modules.

A module of another library has no named points, so hooks read its tensors: registered for one
call, and removed after it whatever happens. Nothing else of the module changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.errors import ConfigError, VitlibError, first_line
from vitlib.testing.module_names import split_source

_RESIZING = "interpolate_pos_encoding"  # argument of transformers, without which sizes are fixed


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and each of its modules in its own mode again afterwards.

    Args:
        module: Any module.
    """
    # train() and eval() would set every part to the mode of the whole.
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def to_module(module: nn.Module, images: Tensor) -> Tensor:
    """Move images to the device of a module, and floats to its dtype.

    Args:
        module: Any module.
        images: Its input.

    Returns:
        The images; as they are for a module without weights.
    """
    weights = [w for w in (*module.parameters(), *module.buffers()) if w.is_floating_point()]
    if not weights:
        return images
    dtype = weights[0].dtype if images.is_floating_point() else images.dtype
    return images.to(device=weights[0].device, dtype=dtype)


def call(module: nn.Module, images: Tensor) -> Any:
    """Call a module; one of transformers, off its grid, with resized positions.

    Args:
        module: Any module, in eval mode.
        images: (B, C, H, W), of its dtype and on its device.

    Returns:
        What it returns.

    Raises:
        ConfigError: It raises an error.
    """
    try:
        return module(images)
    except VitlibError:
        raise
    except Exception as error:  # modules of other libraries raise anything
        # Sizes off the learned grid are refused unless they are asked for.
        if _can_resize(module):
            with suppress(Exception):
                return module(images, **{_RESIZING: True})
        raise ConfigError(
            f"{type(module).__name__} cannot be called with pixels {tuple(images.shape)} alone "
            f"({type(error).__name__}: {first_line(error)}): expected a module that can; of two "
            "towers give the image tower"
        ) from error


def _can_resize(module: nn.Module) -> bool:
    """Return True if a module takes, or passes on, transformers' argument for other sizes."""
    try:
        parameters = signature(module.forward).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        return _RESIZING in parameters or Parameter.VAR_KEYWORD in kinds
    except (TypeError, ValueError):  # a compiled function has no signature
        return False


def record(
    module: nn.Module, images: Tensor, sources: Mapping[str, str]
) -> tuple[Any, dict[str, Tensor]]:
    """Call a module and read tensors at its modules.

    Args:
        module: Any module, in eval mode.
        images: (B, C, H, W), of its dtype and on its device.
        sources: By the name of a point, its source (see module_names.py).

    Returns:
        What the module returns, and the tensors by name: those whose modules were called.
    """
    tensors: dict[tuple[str, str], Tensor] = {}
    # The stack removes every hook, also where a registration or the call raises.
    with ExitStack() as stack:
        for path, side in sorted({site for s in sources.values() for site in split_source(s)}):
            part, site = module.get_submodule(path), (path, side)
            if side == "in":
                keep = partial(_keep_input, tensors, site)
                handle = part.register_forward_pre_hook(keep, with_kwargs=True)
            else:
                handle = part.register_forward_hook(partial(_keep_output, tensors, site))
            stack.callback(handle.remove)
        output = call(module, images)
    states = {}
    for name, source in sources.items():
        sites = split_source(source)
        if all(site in tensors for site in sites):
            states[name] = torch.cat([tensors[site] for site in sites], dim=-1)
    return output, split_fused(states, sources)


def split_fused(states: dict[str, Tensor], sources: Mapping[str, str]) -> dict[str, Tensor]:
    """Cut the output of a layer that computes queries, keys and values into its thirds.

    Args:
        states: Tensors by name.
        sources: Their sources.

    Returns:
        Tensors by name; "qkv" of a block is the whole output.
    """
    for name in [name for name in states if name.endswith("attn.q")]:
        names = [name[:-1] + letter for letter in "qkv"]
        if len({sources.get(n) for n in names}) == 1 and states[name].shape[-1] % 3 == 0:
            whole = states[name]
            states |= dict(zip(names, whole.chunk(3, dim=-1), strict=True))
            states[name[:-1] + "qkv"] = whole
    return states


def _keep_output(
    tensors: dict[tuple[str, str], Tensor],
    site: tuple[str, str],
    _module: nn.Module,
    _args: tuple[Any, ...],
    output: Any,
) -> None:
    """Keep the first output of a module, as it is before anything overwrites it."""
    tensor = first_tensor(output)
    if tensor is not None:
        # Of a module that is called again, the first call counts.
        tensors.setdefault(site, tensor.detach().clone())


def _keep_input(
    tensors: dict[tuple[str, str], Tensor],
    site: tuple[str, str],
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Keep the first input of a module, as it is before anything overwrites it."""
    tensor = first_tensor((*args, *kwargs.values()))
    if tensor is not None:
        tensors.setdefault(site, tensor.detach().clone())


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of a value.

    Args:
        value: A tensor, or a tuple, list or mapping of values.

    Returns:
        The tensor; None where there is none.
    """
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value
    if not isinstance(items, tuple | list) and not isinstance(value, Mapping):
        return None
    return next((item for item in items if isinstance(item, Tensor)), None)
