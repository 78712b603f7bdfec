"""A simple server for comparison: FastAPI around transformers' pipeline, without batching.

It has a synchronous endpoint and one warmed float32 pipeline per worker. serving.py starts it:

    python benchmarks/serving_peer.py FOLDER PORT WORKERS THREADS
"""

from __future__ import annotations

import base64
import io
import os
import sys
from typing import Any


def app() -> Any:
    """Build the app in each of uvicorn's workers."""
    import torch
    from fastapi import FastAPI
    from PIL import Image
    from transformers import pipeline

    torch.set_num_threads(int(os.environ["PEER_THREADS"]))
    classify = pipeline("image-classification", model=os.environ["PEER_MODEL"], device="cpu")
    labels = list(classify.model.config.id2label.values())
    classify(Image.new("RGB", (224, 224)), top_k=1)
    server = FastAPI()

    @server.post("/score")
    def score(body: dict[str, Any]) -> list[dict[str, Any]]:
        data = body["input_data"]["data"]
        photos = [Image.open(io.BytesIO(base64.b64decode(text))) for text in data]
        results = classify(photos, top_k=len(labels))
        return [
            {
                "probs": [prediction["score"] for prediction in predictions],
                "labels": [prediction["label"] for prediction in predictions],
            }
            for predictions in results
        ]

    @server.get("/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    return server


def main() -> None:
    """Serve until the process is killed."""
    import uvicorn

    folder, port, workers, threads = sys.argv[1:]
    os.environ |= {"PEER_MODEL": folder, "PEER_THREADS": threads}
    uvicorn.run(
        "serving_peer:app", factory=True, port=int(port), workers=int(workers),
        log_level="warning", app_dir=os.path.dirname(os.path.abspath(__file__)),  # noqa: PTH100, PTH120
    )  # fmt: skip


if __name__ == "__main__":
    main()
