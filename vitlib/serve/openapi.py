"""The bodies of requests and answers in /openapi.json.

FastAPI cannot derive them: the app takes bodies as bytes and parses them itself.
"""

from __future__ import annotations

from typing import Any

from vitlib.scores import TOP_K, Task
from vitlib.serve.explanation import CLASS_METHODS, METHODS

_IMAGE = {"type": "string", "description": "An image in base64, or a URL where it is allowed."}
# Only for classes: a regression has none to choose from.
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
    """Return a parameter of the URL."""
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _json(task: Task) -> dict[str, Any]:
    """Return the schema of a request in JSON."""
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
                    "description": "The forms of MLflow: one of these keys.",
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


def _explanations() -> list[dict[str, Any]]:
    """Return the parameters of /attend that select a map."""
    return [
        _query(
            "method", enum=list(METHODS), default="rollout",
            description=f"The explanation; {' and '.join(CLASS_METHODS)} are of one class.",
        ),
        _query("class", type="string", description="Its label or number; default: the best."),
    ]  # fmt: skip


def _body(json: dict[str, Any], *query: dict[str, Any], photos: bool) -> dict[str, Any]:
    """Return the body of a route and its parameters; `photos`: the route accepts photos too."""
    content: dict[str, Any] = {"application/json": json, "text/csv": {"schema": _IMAGE}}
    if photos:
        photo = {"image/*": _PHOTO, "application/octet-stream": _PHOTO}
        content = {**photo, "multipart/form-data": _FORM, **content}
    return {"requestBody": {"required": True, "content": content}, "parameters": list(query)}


def bodies(task: Task) -> dict[str, dict[str, Any]]:
    """Describe the body and the query of each route.

    Args:
        task: The model's task.

    Returns:
        Route to a part of its OpenAPI operation.
    """
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
        "/attend": _body(json, *_explanations(), on_error, photos=True),
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
    413: {"description": "The body is too large, or has too many images.", "content": _ERROR},
    415: {"description": "Unsupported content type or encoding.", "content": _ERROR},
    429: {"description": "Overloaded: see Retry-After.", "content": _ERROR},
    503: {"description": "The server is shutting down: see Retry-After.", "content": _ERROR},
}


def answers(route: str, task: Task) -> dict[int | str, dict[str, Any]]:
    """Describe the answers of a route.

    Args:
        route: The route, such as "/score".
        task: The model's task.

    Returns:
        Status to description.
    """
    result = "the scores of its labels, best first"
    if task == "regression":
        result = "its outputs in their order, each with its number"
    descriptions = {
        "/score": f"For each image {result}; azure-v1: every class in the model's order.",
        "/invocations": f"As /score, in predictions: for each image {result}.",
        "/classify": f"For each image {result}.",
        "/embed": "For each image its embedding.",
        "/attend": "For each image a number for each patch, 0 to 1, as rows of patches.",
    }
    return {200: {"description": descriptions[route]}, **_FAILURES}
