"""Vision Transformers in plain PyTorch: exact, readable, fast.

Each public name and package is loaded on its first use (PEP 562): `import vitlib` alone imports no
torch, and `vitlib.train.finetune` needs no further import.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from vitlib.system.garbage import pause_collection
from vitlib.system.terminal import escape_record

if TYPE_CHECKING:
    from vitlib import adapters as adapters
    from vitlib import audit as audit
    from vitlib import batch as batch
    from vitlib import checks as checks
    from vitlib import data as data
    from vitlib import evaluate as evaluate
    from vitlib import explain as explain
    from vitlib import export as export
    from vitlib import fast as fast
    from vitlib import features as features
    from vitlib import metrics as metrics
    from vitlib import plots as plots
    from vitlib import probe as probe
    from vitlib import retrieval as retrieval
    from vitlib import testing as testing
    from vitlib import tokens as tokens
    from vitlib import train as train
    from vitlib import vendor as vendor
    from vitlib.adapters import adapt as adapt
    from vitlib.adapters.delta import load_delta, save_delta
    from vitlib.checkpoint.save import save
    from vitlib.config import ViTConfig
    from vitlib.errors import VitlibError
    from vitlib.fast import optimize
    from vitlib.image.processor import ImageProcessor
    from vitlib.param_groups import parameter_groups
    from vitlib.predict.predictor import Predictor
    from vitlib.scores import Prediction
    from vitlib.vit import ViT
    from vitlib.weights import load

__version__ = "0.1.0"
# Packages that vitlib needs, and their oldest versions, as pyproject.toml has them.
REQUIRES = {
    "torch": "2.10",
    "numpy": "1.26",
    "safetensors": "0.4.3",
    "huggingface-hub": "0.24",
    "pillow": "11.3",
    "click": "8.1",
    "tqdm": "4.60",
}
__all__ = [
    "ImageProcessor",
    "Prediction",
    "Predictor",
    "ViT",
    "ViTConfig",
    "VitlibError",
    "load",
    "load_delta",
    "optimize",
    "parameter_groups",
    "save",
    "save_delta",
]

_HOME = {
    "ImageProcessor": "image.processor",
    "Prediction": "scores",
    "Predictor": "predict.predictor",
    "ViT": "vit",
    "ViTConfig": "config",
    "VitlibError": "errors",
    # No name of __all__, which has its 12: the file of adapt is read where parts are added.
    "adapt": "adapters.adaptation",
    "load": "weights",
    "load_delta": "adapters.delta",
    "optimize": "fast",
    "parameter_groups": "param_groups",
    "save": "checkpoint.save",
    "save_delta": "adapters.delta",
}

_MODULES = (
    "adapters",
    "audit",
    "batch",
    "checks",
    "data",
    "evaluate",
    "explain",
    "export",
    "fast",
    "features",
    "metrics",
    "plots",
    "probe",
    "retrieval",
    "testing",
    "tokens",
    "train",
    "vendor",
)

logging.getLogger("vitlib").addFilter(escape_record)


def __getattr__(name: str) -> object:
    if name not in _MODULES and name not in _HOME:
        raise AttributeError(f"module 'vitlib' has no attribute {name!r}")
    with pause_collection():
        module = _import(name if name in _MODULES else _HOME[name])
    if name in _MODULES:
        return module
    globals()[name] = value = getattr(module, name)
    return value


def _import(name: str) -> ModuleType:
    """Import a module of vitlib; a package that is absent, old or broken is named in one line."""
    try:
        module = import_module(f"vitlib.{name}")
    except Exception as error:  # a broken package may raise anything
        from vitlib.system.requirements import explain_import_error

        explained = explain_import_error(error)
        if explained is None:
            raise
        raise explained from error
    # The errors themselves can be caught whatever is installed.
    if name != "errors":
        for package, module_name in (("torch", "torch"), ("numpy", "numpy"), ("pillow", "PIL")):
            _refuse_old(package, sys.modules.get(module_name))
    return module


def _refuse_old(package: str, module: ModuleType | None) -> None:
    """Raise InstallationError for an imported package that is too old for vitlib's numbers."""
    minimum = REQUIRES[package]
    version = getattr(module, "__version__", minimum)
    # By numbers alone: the modules that compare versions take longer to import than all of these.
    if [int(n) for n in version.split(".")[:2]] < [int(n) for n in minimum.split(".")]:
        from vitlib.errors import InstallationError
        from vitlib.system.requirements import Requirement, install_command

        old = Requirement(package, minimum, "", version)
        raise InstallationError(f"{old.problem}: {install_command([old])}")


def __dir__() -> list[str]:
    return sorted([*_HOME, *_MODULES, "__version__"])
