"""Write a model as an MLflow folder of the flavor python_function, without a pickle.

How data flows: the ONNX file (onnx_file.py) -> mlflow.pyfunc.save_model with the loader's code
(mlflow_code.py) as files -> the loader of the folder, compared with the preprocessing of the model.
"""

from __future__ import annotations

import base64
import importlib.util
import inspect
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vitlib.checks.compare import list_demo_photos
from vitlib.errors import CheckpointError, ConfigError
from vitlib.export.onnx_file import check_onnx, quiet_exporter, write_onnx
from vitlib.export.prepare import PreparedModel
from vitlib.image import base64_text, pixels
from vitlib.system.requirements import import_extra

PACKAGE = "vitlib_exported"  # name of the loader's code in the folder
DATA = Path("data", "model.onnx")
REQUIREMENTS = ("mlflow", "numpy", "pillow", "onnxruntime")  # of `mlflow models serve`
_CODE = Path(__file__).with_name("mlflow_code.py")
_FUNCTIONS = (
    pixels.patches_sides,
    pixels.resized_sides,
    pixels.center_crop,
    pixels.crop_start,
    pixels.normalize_values,
)


def check_mlflow() -> None:
    """Check that MLflow and the libraries that write ONNX files are installed.

    Raises:
        ConfigError: One is not.
    """
    import_extra("mlflow", "mlflow", "MLflow folders need mlflow")
    check_onnx()


def write_mlflow(prepared: PreparedModel, folder: Path) -> Path:
    """Write a model as an MLflow folder.

    Args:
        prepared: The model.
        folder: An empty folder.

    Returns:
        The ONNX file in the folder, folder/model/data/model.onnx.

    Raises:
        ConfigError: The preprocessing needs more than Pillow and NumPy.
        CheckpointError: The folder's code prepares a photo differently from the model.
    """
    processor, root = prepared.processor, folder / "model"
    if processor.float_resize or processor.in_channels not in (1, 3):
        raise ConfigError(
            "an MLflow folder prepares photos by Pillow, and this preprocessing "
            f"({processor.describe()}) needs torch or other channels: export it as onnx"
        )
    code = folder / PACKAGE
    write_code(code)
    onnx = write_onnx(prepared, folder)
    _save_folder(prepared, onnx, code, root)
    onnx.unlink()
    shutil.rmtree(code)
    _compare_preprocessing(prepared, root)
    return root / DATA


def write_code(folder: Path) -> None:
    """Write the loader's code as a package that imports numpy, Pillow and ONNX Runtime alone.

    Args:
        folder: The package, which is made.
    """
    folder.mkdir()
    text = _CODE.read_text(encoding="utf-8").replace("from vitlib.image.", f"from {PACKAGE}.")
    (folder / "__init__.py").write_text(text, encoding="utf-8")
    source = inspect.getsource(base64_text)
    (folder / "base64_text.py").write_text(source, encoding="utf-8")
    functions = "\n\n".join(inspect.getsource(function) for function in _FUNCTIONS)
    (folder / "pixels.py").write_text(
        '"""Functions of vitlib.image.pixels."""\n\nfrom __future__ import annotations\n\n'
        f"import math\n\nimport numpy as np\n\n\n{functions}",
        encoding="utf-8",
    )


def _save_folder(prepared: PreparedModel, onnx: Path, code: Path, root: Path) -> None:
    """Call MLflow's writer."""
    import mlflow
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    example = base64.b64encode(list_demo_photos()[0].read_bytes()).decode()
    numbers = Array(DataType.double)
    outputs = [ColSpec(_nest(numbers, name), name) for name in prepared.outputs if name != "logits"]
    if "logits" in prepared.outputs:
        scores = "values" if prepared.info.task == "regression" else "probs"
        outputs = [ColSpec(numbers, scores), ColSpec(Array(DataType.string), "labels"), *outputs]
    with quiet_exporter():
        mlflow.pyfunc.save_model(
            root,
            loader_module=PACKAGE,
            data_path=os.fspath(onnx),
            code_paths=[os.fspath(code)],
            signature=ModelSignature(Schema([ColSpec(DataType.string, "image")]), Schema(outputs)),
            input_example=pandas.DataFrame({"image": [example]}),
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
            metadata={"vitlib": prepared.info.version, "source": prepared.info.source},
        )


def _nest(numbers: Any, output: str) -> Any:
    """Return the type of an output of one photo: tokens and attention have two axes."""
    from mlflow.types.schema import Array

    return numbers if output == "embedding" else Array(numbers)


def _compare_preprocessing(prepared: PreparedModel, root: Path) -> None:
    """Raise CheckpointError where the folder's code does not prepare photos as the model does."""
    model = _load_code(root / "code" / PACKAGE)._load_pyfunc(os.fspath(root / DATA))
    prepare = prepared.processor.to_float
    if prepared.graph.takes_uint8:
        prepare = prepared.processor.to_uint8_or_float
    for photo in list_demo_photos():
        data = photo.read_bytes()
        wanted = prepare(data).numpy()
        if not np.array_equal(model.preprocess(data), wanted):
            raise CheckpointError(
                f"the folder's code does not prepare {photo.name} as the model does "
                f"({prepared.processor.describe()}): export the model as onnx"
            )


def _load_code(package: Path) -> ModuleType:
    """Import the folder's code, and leave no trace of it in this process."""
    spec = importlib.util.spec_from_file_location(PACKAGE, package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[PACKAGE] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
    return module
