"""The server that most people write first: FastAPI around transformers' pipeline, no batches.

A plain `def` endpoint, one pipeline, warmed, float32. Started by serving.py:

    python benchmarks/serving_peer.py FOLDER PORT WORKERS THREADS
"""

from __future__ import annotations

import base64
import io
import os
import sys
from typing import Any


def app() -> Any:
    """The app, for uvicorn's workers."""
    import torch
    from fastapi import FastAPI
    from PIL import Image
    from transformers import pipeline

    torch.set_num_threads(int(os.environ["PEER_THREADS"]))
    classify = pipeline("image-classification", model=os.environ["PEER_MODEL"], device="cpu")
    labels = list(classify.model.config.id2label.values())
    classify(Image.new("RGB", (224, 224)), top_k=1)
    made = FastAPI()

    @made.post("/score")
    def score(body: dict[str, Any]) -> list[dict[str, Any]]:
        data = body["input_data"]["data"]
        photos = [Image.open(io.BytesIO(base64.b64decode(one))) for one in data]
        answers = classify(photos, top_k=len(labels))
        return [
            {"probs": [x["score"] for x in one], "labels": [x["label"] for x in one]}
            for one in answers
        ]

    @made.get("/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    return made


def main() -> None:
    """Serve until killed."""
    import uvicorn

    folder, port, workers, threads = sys.argv[1:]
    os.environ |= {"PEER_MODEL": folder, "PEER_THREADS": threads}
    uvicorn.run(
        "serving_peer:app", factory=True, port=int(port), workers=int(workers),
        log_level="warning", app_dir=os.path.dirname(os.path.abspath(__file__)),  # noqa: PTH100, PTH120
    )  # fmt: skip


if __name__ == "__main__":
    main()
