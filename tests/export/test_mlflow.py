"""MLflow's server answers the card's request with the numbers of `vitlib serve`."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.exports import export_tiny
from fixtures.server import SAMPLES, Server
from vitlib import ImageProcessor, VitlibError
from vitlib.export import ExportSettings, export_model

mlflow = pytest.importorskip("mlflow", reason="needs pip install 'vitlib[mlflow]'")
pytestmark = [
    pytest.mark.export,
    pytest.mark.filterwarnings("default"),  # MLflow's own
]
PHOTOS = [base64.b64encode(path.read_bytes()).decode() for path in SAMPLES[:2]]
# The sample request of google-vit-base-patch16-224's card.
CARD = {"input_data": {"columns": ["image"], "index": [0, 1], "data": PHOTOS}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mlflow") / "demo"
    assert export_model("demo", out, "mlflow", ExportSettings()).ok
    return out


@pytest.fixture(scope="module")
def app(folder: Path) -> Any:
    """MLflow's scoring server with the folder's model."""
    from mlflow.pyfunc import load_model, scoring_server

    return scoring_server.init(load_model(str(folder)))


def post(app: Any, payload: Any) -> tuple[int, Any]:
    """Send JSON to /invocations of an ASGI app; return the status and the answer."""
    body = json.dumps(payload).encode()
    messages: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http", "method": "POST", "path": "/invocations", "raw_path": b"/invocations",
        "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http",
        "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    answer = b"".join(message.get("body", b"") for message in messages)
    return messages[0]["status"], json.loads(answer)


def test_mlflow_server_answers_card_request_like_vitlib_serve(app: Any) -> None:
    with Server() as server:
        wanted = server.post("/score", CARD).json()
    status, answer = post(app, CARD)
    assert status == 200
    assert [row["labels"] for row in answer["predictions"]] == [row["labels"] for row in wanted]
    probs, expected = (np.array([row["probs"] for row in rows])
                       for rows in (answer["predictions"], wanted))  # fmt: skip
    assert abs(probs - expected).max() <= 5e-6
    assert abs(probs[0] - probs[1]).max() > 0.01


@pytest.mark.parametrize("payload", [
    {"input_data": PHOTOS},
    {"dataframe_split": {"columns": ["image"], "data": [[photo] for photo in PHOTOS]}},
    {"dataframe_records": [{"image": photo} for photo in PHOTOS]},
    {"inputs": {"image": PHOTOS}},
])  # fmt: skip
def test_mlflow_server_answers_every_form(app: Any, payload: Any) -> None:
    assert post(app, payload) == post(app, CARD)


def test_mlflow_server_names_a_bad_photo(app: Any) -> None:
    status, answer = post(app, {"input_data": [PHOTOS[0], "bm8gcGhvdG8="]})
    assert status == 400
    assert "ValueError: input 1: cannot identify image file" in answer["stack_trace"]


def test_mlflow_folder_has_signature_example_and_no_pickle(folder: Path) -> None:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "requirements.txt", "input_example.json", "export.json"} <= names
    assert not any(name.endswith((".pkl", ".pickle", ".pyc")) for name in names)
    signature = mlflow.models.get_model_info(str(folder)).signature
    assert signature.inputs.input_names() == ["image"]
    assert signature.outputs.input_names() == ["probs", "labels"]
    requirements = (folder / "requirements.txt").read_text().split()
    names = {line.partition("==")[0] for line in requirements}
    assert names == {"mlflow", "numpy", "pillow", "onnxruntime"}


ALONE = """
import sys
for name in ("vitlib", "torch", "pandas"):
    sys.modules[name] = None  # an import of it raises
sys.path.insert(0, "code")
import base64, json
import vitlib_exported
model = vitlib_exported._load_pyfunc("data/model.onnx")
photo = base64.b64encode(open(sys.argv[1], "rb").read()).decode()
print(json.dumps(model.predict([photo])[0]))
"""


def test_mlflow_code_runs_without_vitlib_and_torch(folder: Path, app: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-c", ALONE, str(SAMPLES[0])], cwd=folder, capture_output=True,
        text=True, check=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert json.loads(done.stdout) == post(app, {"input_data": PHOTOS[:1]})[1]["predictions"][0]


@pytest.mark.parametrize("processor", [
    ImageProcessor(shortest_edge=36, crop_size=(32, 32), resample=3, crop_rounding="even",
                   image_mean=(0.48, 0.45, 0.4), image_std=(0.26, 0.25, 0.27)),
    ImageProcessor(size=(32, 40), fit="contain", crop_size=(32, 32), fill=(9, 5, 1),
                   image_mean=(0.5,) * 3, image_std=(0.5,) * 3),
])  # fmt: skip
@pytest.mark.parametrize("input_type", ["uint8", "float"])
def test_mlflow_code_prepares_photos_exactly(
    processor: ImageProcessor, input_type: Any, tmp_path: Path
) -> None:
    from fixtures.families import tiny

    settings = ExportSettings(input=input_type)
    report = export_model(tiny("vit"), tmp_path / "m", "mlflow", settings,
                          image_processor=processor)  # fmt: skip
    assert report.ok  # the writer compares every photo of the demo, to the bit


def test_mlflow_answers_with_other_outputs(tmp_path: Path) -> None:
    import pandas

    settings = ExportSettings(outputs=("embedding", "attention"))
    assert export_tiny("vit", tmp_path / "m", "mlflow", settings).ok
    model = mlflow.pyfunc.load_model(str(tmp_path / "m"))
    assert model.metadata.signature.outputs.input_names() == ["embedding", "attention"]
    (row,) = model.predict(pandas.DataFrame({"image": PHOTOS[:1]}))
    assert (np.shape(row["embedding"]), np.shape(row["attention"])) == ((32,), (2, 17))


def test_mlflow_refuses_existing_target_and_float_resize(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(VitlibError, match="mine exists: name a folder that does not"):
        export_tiny("vit", tmp_path / "mine", "mlflow")
    from fixtures.families import tiny

    processor = ImageProcessor(size=(32, 32), float_resize=True)
    with pytest.raises(VitlibError, match="needs torch or other channels: export it as onnx"):
        export_model(tiny("vit"), tmp_path / "new", "mlflow", ExportSettings(),
                     image_processor=processor)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
