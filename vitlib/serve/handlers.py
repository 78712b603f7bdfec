"""Handlers of the inference routes, from a request's bytes to the JSON of its rows.

A handler checks whether there is capacity, reads the body within its limits, awaits the
dispatcher's rows, and writes JSON (or .npy). If the client disconnects meanwhile, the request is
cancelled, and those of its images that are not being computed are dropped.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from vitlib.serve import bodies, forms
from vitlib.serve.core import DEFAULT_EXPLANATION, Kind
from vitlib.serve.dispatcher import Dispatcher
from vitlib.serve.errors import RequestError, bad_images, bad_request
from vitlib.serve.explanation import Explanation
from vitlib.serve.guard import wait_for_disconnect
from vitlib.serve.protocol import InferenceRequest, Params, parse_request
from vitlib.serve.settings import Limits
from vitlib.serve.writer import Writer
from vitlib.vit import ViT


class InferenceHandlers:
    """The handlers of /score, /invocations, /classify, /embed and /attend."""

    def __init__(self, dispatcher: Dispatcher, limits: Limits) -> None:
        """Prepare the handlers.

        Args:
            dispatcher: Computes the rows of images.
            limits: The server's limits.
        """
        self.dispatcher, self.limits, self.metrics = dispatcher, limits, dispatcher.metrics
        self.core = dispatcher.core
        self.writer = Writer(self.core.labels, self.core.task)

    # The first line of a handler's docstring is the summary of its route in /openapi.json.

    async def score(self, request: Request) -> Response:
        """Images in JSON or CSV -> the scores of every class, or the numbers of a regression.

        Args:
            request: The request.

        Returns:
            A JSON list in the form that params.format selects.
        """
        body = await self._read_body(request)
        rows, params = await self._answer_text(request, "classify", body, Params())
        return Response(self.writer.answer(rows, params), media_type="application/json")

    async def invocations(self, request: Request) -> Response:
        """The answer of /score, under the key of MLflow.

        Args:
            request: The request.

        Returns:
            {"predictions": ...}.
        """
        body = await self._read_body(request)
        rows, params = await self._answer_text(request, "classify", body, Params())
        wrapped = b'{"predictions":' + self.writer.answer(rows, params) + b"}"
        return Response(wrapped, media_type="application/json")

    async def classify(self, request: Request) -> Response:
        """Photos -> the best labels of each, or the numbers of a regression.

        Args:
            request: The request.

        Returns:
            {"predictions": [[{"label", "score", "index"}, ...], ...]}.
        """
        query = forms.parse_query(
            request.query_params, {"top_k": int, "threshold": float, "on_error": str}
        )
        params = Params.parse(query)
        params.check(self.core.task)
        rows, params = await self._answer_photos(request, "classify", params)
        if params.format != Params.format:
            raise bad_request("params.format is for /score and /invocations")
        labels, engine = self.writer.labels, self.core.engine

        def to_entry(row: Any) -> Any:
            if isinstance(row, RequestError):
                return _to_json(row)
            predictions = engine.predict(row, labels, params.top_k, params.threshold)
            return [prediction._asdict() for prediction in predictions]

        return JSONResponse({"predictions": [to_entry(row) for row in rows]})

    async def embed(self, request: Request) -> Response:
        """Photos -> their embeddings, as JSON or .npy.

        Args:
            request: The request.

        Returns:
            {"embeddings": [[...], ...]}, or an array (N, D) in which the row of a bad image is NaN.
        """
        query = forms.parse_query(request.query_params, {"format": str, "on_error": str})
        form = forms.pop_choice(query, "format", "json", "npy")
        rows, _ = await self._answer_photos(request, "embed", Params.parse(query))
        if form == "json":
            return JSONResponse({"embeddings": [_to_json(row) for row in rows]})
        nan = np.full(self.core.engine.model.num_features, np.nan, np.float32)
        file = io.BytesIO()
        np.save(file, np.stack([nan if isinstance(row, RequestError) else row for row in rows]))
        return Response(file.getvalue(), media_type="application/octet-stream")

    async def attend(self, request: Request) -> Response:
        """Photos -> a map of how much the model uses each patch, 0..1.

        Args:
            request: The request.

        Returns:
            {"maps": [...], "shown": [...]}: rows of patches; top, left, bottom and right of the
            part of the photo that the model sees, as shares of its height and width.
        """
        query = forms.parse_query(
            request.query_params, {"method": str, "class": str, "on_error": str}
        )
        method, class_name = query.pop("method", None), query.pop("class", None)
        params = Params.parse(query)
        self._check_kind("attend")
        model = self.core.predictor.model
        assert isinstance(model, ViT)
        chosen = Explanation.parse(model, self.core.labels, method, class_name)
        rows, _ = await self._answer_photos(request, "attend", params, chosen)
        pairs = [(row, None) if isinstance(row, RequestError) else row for row in rows]
        return JSONResponse(
            {"maps": [_to_json(row) for row, _ in pairs], "shown": [box for _, box in pairs]}
        )

    async def _read_body(self, request: Request) -> bytes:
        """Read and decompress the body; refuse it before that where there is no capacity."""
        self.dispatcher.check_capacity()

        def reserve(size: int) -> None:
            self.dispatcher.reserve_bytes(size)
            request.state.reserved_bytes += size

        encoding = bodies.content_encoding(request)
        body = await bodies.read_body(request, self.limits, reserve)
        if encoding == "identity":
            return body
        return await asyncio.to_thread(bodies.decompress, body, encoding, self.limits, reserve)

    async def _answer_text(
        self,
        request: Request,
        kind: Kind,
        body: bytes,
        defaults: Params,
        explanation: Explanation = DEFAULT_EXPLANATION,
    ) -> tuple[list[Any], Params]:
        """Answer a request in JSON or CSV; options that it does not set come from `defaults`."""
        form = bodies.detect_format(request, body, accepts_photos=False)
        parsed: list[InferenceRequest] = []

        def parse() -> Sequence[Any]:  # in a reading thread
            parsed.append(parse_request(body, "text/csv" if form == "csv" else ""))
            parsed[0].params.check(self.core.task)
            return parsed[0].images

        rows = await self._compute(request, kind, parse, explanation)
        params = parsed[0].params.merge(defaults)
        return self._check_rows(rows, kind, params.on_error), params

    async def _answer_photos(
        self,
        request: Request,
        kind: Kind,
        params: Params,
        explanation: Explanation = DEFAULT_EXPLANATION,
    ) -> tuple[list[Any], Params]:
        """Answer a request with photos: one as the body, files of a form, or text as in /score."""
        body = await self._read_body(request)
        form = bodies.detect_format(request, body, accepts_photos=True)
        if form == "form":
            photos = await forms.read_form(body, request.headers, self.limits)
        elif form == "photo":
            photos = [body]
        else:
            return await self._answer_text(request, kind, body, params, explanation)
        rows = await self._compute(request, kind, lambda: photos, explanation)
        return self._check_rows(rows, kind, params.on_error), params

    def _check_kind(self, kind: Kind) -> None:
        """Raise RequestError where the model has no such result."""
        if kind not in self.core.kinds:
            kinds = ", ".join(self.core.kinds)
            raise RequestError(404, "not_found", f"this model cannot {kind}: it can {kinds}")

    async def _compute(
        self,
        request: Request,
        kind: Kind,
        parse: Callable[[], Sequence[Any]],
        explanation: Explanation,
    ) -> list[Any]:
        """Await the rows, unless the client disconnects before."""
        self._check_kind(kind)
        work = asyncio.ensure_future(self.dispatcher.answer(kind, parse, explanation))
        disconnect = asyncio.ensure_future(wait_for_disconnect(request))
        try:
            await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return await work
        finally:
            work.cancel()
            disconnect.cancel()

    def _check_rows(self, rows: list[Any], kind: Kind, on_error: str) -> list[Any]:
        """Count the rows, and raise the error of the request where bad images are not allowed."""
        for row in rows:
            if isinstance(row, Exception) and not isinstance(row, RequestError):
                raise row
            if isinstance(row, RequestError) and row.status == 429:
                raise row
        errors = [(i, row) for i, row in enumerate(rows) if isinstance(row, RequestError)]
        for index, row in errors:
            row.index = index
        # A request that fails is counted by itself, with the code of its first bad image.
        for _, row in errors[1:] if on_error == "fail" else errors:
            self.metrics.errors.labels(row.code).inc()
        self.metrics.images.labels(kind).inc(len(rows) - len(errors))
        if errors and on_error == "fail":
            raise bad_images(len(rows), errors)
        return rows


def _to_json(row: Any) -> Any:
    """Return an array as lists, or {"error": ...} for a bad image."""
    return {"error": row.as_dict()} if isinstance(row, RequestError) else row.tolist()
