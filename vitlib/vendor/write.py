"""Write a model as one file of source, its weights, and a test that proves both."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vitlib.errors import ConfigError, SourceError
from vitlib.system.atomic import check_writable, replace_files, staging_folder
from vitlib.vendor.file import write_source
from vitlib.vendor.pinned import write_test
from vitlib.vit import ViT


@dataclass(frozen=True)
class VendoredFiles:
    """Files that `write` wrote.

    Attributes:
        source: The file of source.
        weights: Its weights.
        test: Its test.
        lines: Lines of the source.
    """

    source: Path
    weights: Path
    test: Path
    lines: int

    def as_dict(self) -> dict[str, Any]:
        """Return the paths as text, for JSON."""
        paths = {name: str(getattr(self, name)) for name in ("source", "weights", "test")}
        return {**paths, "lines": self.lines}


def write(
    model: ViT, into: str | os.PathLike[str], *, name: str = "", overwrite: bool = False
) -> VendoredFiles:
    """Write a model as one file that needs torch and safetensors alone.

    Beside `vit.py` stand `vit.safetensors`, the weights by vitlib's names, and `test_vit.py`, which
    compares its logits with pinned ones and with vitlib's. `load()` in the file gives the model.

    Args:
        model: The model, as `vitlib.load` gives it.
        into: The file to write; it ends in .py, and its name is one that Python can import.
        name: Name of the checkpoint, for the line that says how to write the file again.
        overwrite: Replace files that exist.

    Returns:
        The files.

    Raises:
        ConfigError: The model has parts that are not vitlib's, or runs in another way than its
            config says.
        SourceError: A file exists, or cannot be written.
    """
    check_parts(model)
    source = Path(into).expanduser()
    if source.suffix != ".py" or not source.stem.isidentifier():
        raise SourceError(f"{source}: expected a file that Python can import, such as vit.py")
    weights, test = source.with_suffix(".safetensors"), source.with_name(f"test_{source.name}")
    for path in (source, weights, test):
        check_writable(path)
        if path.exists() and not overwrite:
            raise SourceError(f"{path} exists: name another file, or give overwrite=True")
    model = copy.deepcopy(model).cpu().eval()
    command = f"vitlib vendor {name or 'MODEL'} --into {source.name}"
    text = write_source(model, name=source.stem, command=command)
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    with staging_folder(source.absolute().parent) as staging:
        save_file(state, staging / weights.name, metadata={"format": "pt"})
        (staging / test.name).write_text(write_test(model.float(), source.stem), encoding="utf-8")
        (staging / source.name).write_text(text, encoding="utf-8")
        replace_files(staging, source.absolute().parent, last=source.name)
    return VendoredFiles(source, weights, test, len(text.splitlines()))


def check_parts(model: object) -> None:
    """Check that a model is what its config says, with no part of a user's own.

    Args:
        model: The model.

    Raises:
        ConfigError: It is not.
    """
    if type(model) is not ViT:
        raise ConfigError(
            f"a {type(model).__name__}: expected a ViT as vitlib.load() gives it, without "
            "optimize() and without other tokens"
        )
    with torch.device("meta"):
        usual = ViT(model.config)
    modules, expected = dict(model.named_modules()), dict(usual.named_modules())
    for name, module in modules.items():
        if name not in expected or type(module) is not type(expected[name]):
            raise ConfigError(
                f"{name} is a {type(module).__name__}, which is no part of vitlib's model: "
                "vendor the model without parts of your own"
            )
        own = [key for key in ("attend",) if getattr(module, key, None) is not None]
        hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if own or hooks:
            raise ConfigError(
                f"{name or 'the model'} has attention or hooks of your own: vendor the model "
                "without them, and add them to the file"
            )
    missing = expected.keys() - modules.keys()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if missing or shapes != {key: tuple(value.shape) for key, value in usual.state_dict().items()}:
        raise ConfigError("the model's weights are not those that its config says: load it again")
