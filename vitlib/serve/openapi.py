"""What /openapi.json says of the bodies, which the app takes as bytes and reads by itself."""

from __future__ import annotations

from typing import Any

from vitlib.scores import TOP_K, Task

_IMAGE = {"type": "string", "description": "An image in base64, or a URL where it is allowed."}
# Of classes alone: a regression has none to choose among.
_CHOICE: dict[str, dict[str, Any]] = {
    "top_k": {"type": "integer", "minimum": 1},
    "threshold": {"type": "number", "minimum": 0, "maximum": 1},
}
_SPLIT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "columns": {"type": "array", "items": {"type": "string"}, "example": ["image"]},
        "index": {"type": "array", "example": [0, 1]},
        "data": {"type": "array", "items": _IMAGE},
    },
}
_IMAGES: dict[str, Any] = {"type": "array", "items": _IMAGE}
_FILE = {"type": "string", "format": "binary"}
_PHOTO = {"schema": _FILE}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {"images": {"type": "array", "items": _FILE}},
    }
}


def _query(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _json(task: Task) -> dict[str, Any]:
    """A request in JSON."""
    params = {
        "type": "object",
        "properties": {
            **({} if task == "regression" else _CHOICE),
            "format": {"enum": ["azure-v1", "azure-v2", "mlflow"]},
            "on_error": {"enum": ["fail", "null"]},
        },
    }
    return {
        "schema": {
            "oneOf": [
                {
                    "type": "object",
                    "required": ["input_data"],
                    "properties": {"input_data": {"oneOf": [_SPLIT, _IMAGES]}, "params": params},
                },
                {
                    "type": "object",
                    "description": "MLflow's: one of these.",
                    "properties": {
                        "dataframe_split": _SPLIT,
                        "dataframe_records": {
                            "type": "array",
                            "items": {"type": "object", "properties": {"image": _IMAGE}},
                        },
                        "instances": _IMAGES,
                        "inputs": _IMAGES,
                        "params": params,
                    },
                },
            ]
        }
    }


def _body(json: dict[str, Any], *query: dict[str, Any], photos: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": json, "text/csv": {"schema": _IMAGE}}
    if photos:
        photo = {"image/*": _PHOTO, "application/octet-stream": _PHOTO}
        content = {**photo, "multipart/form-data": _FORM, **content}
    return {"requestBody": {"required": True, "content": content}, "parameters": list(query)}


def bodies(task: Task) -> dict[str, dict[str, Any]]:
    """Of each route its body and its query, for a model of this task."""
    json, on_error = _json(task), _query("on_error", enum=["fail", "null"])
    choice = [_query("top_k", default=TOP_K, **_CHOICE["top_k"])]
    choice += [_query("threshold", **_CHOICE["threshold"])]
    if task == "regression":
        choice = []
    return {
        "/score": _body(json, photos=False),
        "/invocations": _body(json, photos=False),
        "/classify": _body(json, *choice, on_error, photos=True),
        "/embed": _body(json, _query("format", enum=["json", "npy"]), on_error, photos=True),
        "/attend": _body(json, on_error, photos=True),
    }


_ERROR = {
    "application/json": {
        "schema": {
            "type": "object",
            "properties": {
                "error": {
                    "type": "object",
                    "properties": {
                        "code": {"type": "string"},
                        "message": {"type": "string"},
                        "index": {"type": "integer", "nullable": True},
                    },
                }
            },
        }
    }
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request or an image is bad.", "content": _ERROR},
    413: {"description": "Too much at once.", "content": _ERROR},
    415: {"description": "Another content type or encoding.", "content": _ERROR},
    429: {"description": "Overloaded: see Retry-After.", "content": _ERROR},
    503: {"description": "The server ends: see Retry-After.", "content": _ERROR},
}


def answers(route: str, task: Task) -> dict[int | str, dict[str, Any]]:
    """What comes back, for a model of this task."""
    what = "the scores of its labels, best first"
    if task == "regression":
        what = "its outputs in their order, each with its number"
    said = {
        "/score": f"Of each image {what}; azure-v1: every one in the model's order.",
        "/invocations": f"The same as /score in predictions: of each image {what}.",
        "/classify": f"Of each image {what}.",
        "/embed": "Of each image the vector that the head reads.",
        "/attend": "Of each image where the class token looks.",
    }
    return {200: {"description": said[route]}, **_FAILURES}
