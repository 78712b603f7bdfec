"""The same answers from a Ray cluster: replicas of vitlib's core, batches by Ray Serve.

    pip install 'vitlib[serve]' 'ray[serve]'
    python examples/serve/ray_serve.py MODEL [--replicas 2] [--cpus 1] [--port 8000]

POST / takes the model card's request. Where a replica dies, what it had not answered is asked of
another one, and Ray starts a new one in its place.
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

MOST_BODY = 32 * 2**20
ATTEMPTS = 3


@serve.deployment(max_ongoing_requests=64)
class Vit:
    """One replica: a model and what turns bytes into its answers."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.core = Core(Predictor.load(model), max_pixels=50_000_000)
        self.writer = Writer(self.core.labels, self.core.task)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def scores(self, images: list[Any]) -> list[Any]:
        """Rows of images of many requests."""
        return self.core.answer("classify", images)

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        """As POST /score: a status and JSON."""
        try:
            wanted = parse_request(body, "application/json")
            rows = await asyncio.gather(*map(self.scores, self._read(wanted.images)))
            return 200, self.writer.answer(rows, wanted.params)
        except RequestError as error:
            return error.status, error.body()

    def _read(self, texts: Sequence[Any]) -> list[torch.Tensor]:
        images, wrong = [], []
        for index, text in enumerate(texts):
            try:
                images.append(self.core.preprocess(decode_base64(text), "classify"))
            except ImageError as error:
                wrong.append((index, RequestError(400, "bad_image", str(error))))
            except RequestError as error:
                wrong.append((index, error))
        if wrong:
            raise bad_images(len(texts), wrong)
        return images


@serve.deployment(max_ongoing_requests=256)
class Front:
    """What HTTP reaches: it computes nothing, and asks again where a replica died."""

    def __init__(self, vit: DeploymentHandle) -> None:
        self.vit = vit

    async def __call__(self, request: Request) -> Response:
        """POST /."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > MOST_BODY:
                error = RequestError(413, "too_large", f"expected at most {MOST_BODY} bytes")
                return Response(error.body(), error.status, media_type="application/json")
            parts.append(part)
        for left in reversed(range(ATTEMPTS)):
            try:
                status, body = await self.vit.answer.remote(b"".join(parts))
                return Response(body, status, media_type="application/json")
            except RayActorError:
                if not left:
                    raise
        raise AssertionError


def main() -> None:
    """Start replicas on this machine, or on the cluster that RAY_ADDRESS names, and wait."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="of a replica")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    vit = Vit.options(num_replicas=options.replicas, ray_actor_options={"num_cpus": options.cpus})
    front = Front.options(ray_actor_options={"num_cpus": 0})
    serve.run(front.bind(vit.bind(options.model, options.cpus)), blocking=True)


if __name__ == "__main__":
    main()
