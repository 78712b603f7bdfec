"""ExecuTorch programs answer like the model at every batch that they take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.exports import export_tiny
from fixtures.families import FAMILIES, tiny
from vitlib import VitlibError
from vitlib.export import ExportSettings

pytest.importorskip("executorch.runtime", reason="needs pip install 'vitlib[executorch]'")
pytestmark = [
    pytest.mark.export,
    pytest.mark.filterwarnings("default"),  # torchao's own
]


# SwiGLU and rotary embeddings have chunks, which ExecuTorch's lowering would fix to one batch.
@pytest.mark.parametrize("family", FAMILIES)
def test_executorch_answers_like_model(family: str, tmp_path: Path) -> None:
    from vitlib.export.executorch_file import MAX_BATCH, open_executorch

    settings = ExportSettings(outputs=("logits", "embedding"))
    report = export_tiny(family, tmp_path, "executorch", settings)
    assert max(c.error for c in report.comparisons) <= 1e-5
    runtime = open_executorch(report.path)
    levels = np.random.default_rng(0).integers(0, 256, (MAX_BATCH, 3, 32, 32), dtype=np.uint8)
    first, second = runtime.run(levels)["logits"], runtime.run(levels[::-1])["logits"]
    assert abs(first - second[::-1]).max() <= 1e-5 * abs(first).max()
    with torch.inference_mode():
        wanted = tiny(family)((torch.from_numpy(levels).float() / 255 - 0.5) / 0.5).numpy()
    assert abs(first - wanted).max() <= 1e-5 * abs(wanted).max()


@pytest.mark.parametrize("settings", [
    ExportSettings(precision="fp16"), ExportSettings(precision="int8"),
])  # fmt: skip
def test_executorch_refuses_other_precisions(settings: ExportSettings, tmp_path: Path) -> None:
    message = "computes in fp32 at one image size|int8 is for ONNX files"
    with pytest.raises(VitlibError, match=message):
        export_tiny("vit", tmp_path, "executorch", settings)
    assert not list(tmp_path.iterdir())


def test_larger_batch_gets_one_line(tmp_path: Path) -> None:
    from vitlib.export.executorch_file import MAX_BATCH, open_executorch

    runtime = open_executorch(export_tiny("vit", tmp_path, "executorch").path)
    levels = np.zeros((MAX_BATCH + 1, 3, 32, 32), np.uint8)
    with pytest.raises(VitlibError, match="ExecuTorch does not run a batch of 9: "):
        runtime.run(levels)
