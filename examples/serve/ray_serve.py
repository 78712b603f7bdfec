"""The same answers from a Ray cluster: replicas of vitlib's core, batches by Ray Serve.

    pip install 'vitlib[serve]' 'ray[serve]'
    python examples/serve/ray_serve.py MODEL [--replicas 2] [--cpus 1] [--port 8000]

POST / takes the model card's request. A replica that dies is replaced, and Ray asks another one for
what it had not answered.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from vitlib import Predictor
from vitlib.errors import ImageError
from vitlib.serve.core import Core
from vitlib.serve.protocol import Writer, asked, decoded
from vitlib.serve.refusals import RequestError, bad_images

MOST_BODY = 32 * 2**20


@serve.deployment(max_ongoing_requests=64)
class Vit:
    """One replica: a model and what turns bytes into its answers."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.core = Core(Predictor.load(model), max_pixels=50_000_000)
        self.writer = Writer(self.core.labels)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def scores(self, images: list[Any]) -> list[Any]:
        """Rows of images of many requests."""
        return self.core.answer("classify", images)

    async def __call__(self, request: Request) -> Response:
        """As POST /score."""
        try:
            body = await request.body()
            if len(body) > MOST_BODY:
                raise RequestError(413, "too_large", f"expected at most {MOST_BODY} bytes")
            wanted = asked(body, "application/json")
            images, wrong = [], []
            for index, text in enumerate(wanted.images):
                try:
                    images.append(self.core.read(decoded(text), "classify"))
                except ImageError as error:
                    wrong.append((index, RequestError(400, "bad_image", str(error))))
                except RequestError as error:
                    wrong.append((index, error))
            if wrong:
                raise bad_images(len(wanted.images), wrong)
            rows = await asyncio.gather(*(self.scores(image) for image in images))
        except RequestError as error:
            return Response(error.body(), error.status, media_type="application/json")
        found = self.writer.answer(rows, wanted.params)
        return Response(found, media_type="application/json")


def main() -> None:
    """Start replicas on this machine, or on the cluster that RAY_ADDRESS names, and wait."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="of a replica")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    deployment = Vit.options(
        num_replicas=options.replicas, ray_actor_options={"num_cpus": options.cpus}
    )
    serve.run(deployment.bind(options.model, options.cpus), blocking=True)


if __name__ == "__main__":
    main()
