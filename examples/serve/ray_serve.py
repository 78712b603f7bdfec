"""Serve a model from a Ray cluster: replicas of vitlib's core, batches made by Ray Serve.

    pip install 'vitlib[serve]' 'ray[serve]'
    python examples/serve/ray_serve.py MODEL [--replicas 2] [--cpus 1] [--port 8000]

POST / takes and returns the same JSON as POST /score of `vitlib serve`. If a replica dies, its
open requests go to another replica, and Ray starts a new one.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from vitlib import Predictor
from vitlib.errors import ImageError
from vitlib.serve.core import Core
from vitlib.serve.errors import RequestError, bad_images
from vitlib.serve.protocol import decode_base64, parse_request
from vitlib.serve.writer import Writer

MAX_BODY = 32 * 2**20
ATTEMPTS = 3


@serve.deployment(max_ongoing_requests=64)
class Vit:
    """Replica of a model, from the bytes of a request to those of the response."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.core = Core(Predictor.load(model), max_pixels=50_000_000)
        self.writer = Writer(self.core.labels, self.core.task)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def classify(self, images: list[Any]) -> list[Any]:
        """Compute the scores of a batch of images, which may come from several requests."""
        return self.core.answer("classify", images)

    async def handle(self, body: bytes) -> tuple[int, bytes]:
        """Return the status and the JSON of a response, in the format of POST /score."""
        try:
            request = parse_request(body, "application/json")
            rows = await asyncio.gather(*map(self.classify, self._decode(request.images)))
            return 200, self.writer.answer(rows, request.params)
        except RequestError as error:
            return error.status, error.body()

    def _decode(self, texts: Sequence[Any]) -> list[torch.Tensor]:
        images, errors = [], []
        for index, text in enumerate(texts):
            try:
                images.append(self.core.preprocess(decode_base64(text), "classify"))
            except ImageError as error:
                errors.append((index, RequestError(400, "bad_image", str(error))))
            except RequestError as error:
                errors.append((index, error))
        if errors:
            raise bad_images(len(texts), errors)
        return images


@serve.deployment(max_ongoing_requests=256)
class Front:
    """Handler of HTTP requests, which passes them to replicas and retries if a replica dies."""

    def __init__(self, vit: DeploymentHandle) -> None:
        self.vit = vit

    async def __call__(self, request: Request) -> Response:
        """Handle POST /."""
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BODY:
                error = RequestError(413, "too_large", f"expected at most {MAX_BODY} bytes")
                return Response(error.body(), error.status, media_type="application/json")
            chunks.append(chunk)
        for retries in reversed(range(ATTEMPTS)):
            try:
                status, body = await self.vit.handle.remote(b"".join(chunks))
                return Response(body, status, media_type="application/json")
            except RayActorError:
                if not retries:
                    raise
        raise AssertionError


def main() -> None:
    """Start replicas on the cluster that RAY_ADDRESS names, or on this machine, and wait."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of a replica")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    vit = Vit.options(num_replicas=options.replicas, ray_actor_options={"num_cpus": options.cpus})
    front = Front.options(ray_actor_options={"num_cpus": 0})
    serve.run(front.bind(vit.bind(options.model, options.cpus)), blocking=True)


if __name__ == "__main__":
    main()
