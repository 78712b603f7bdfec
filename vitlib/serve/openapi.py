"""What /openapi.json says of the bodies, which the app takes as bytes and reads by itself."""

from __future__ import annotations

from typing import Any

_IMAGE = {"type": "string", "description": "An image in base64, or a URL where it is allowed."}
_PARAMS = {
    "type": "object",
    "properties": {
        "top_k": {"type": "integer", "minimum": 1},
        "threshold": {"type": "number", "minimum": 0, "maximum": 1},
        "format": {"enum": ["azure-v1", "azure-v2", "mlflow"]},
        "on_error": {"enum": ["fail", "null"]},
    },
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
_IMAGES = {"type": "array", "items": _IMAGE}
_JSON = {
    "schema": {
        "oneOf": [
            {
                "type": "object",
                "required": ["input_data"],
                "properties": {"input_data": {"oneOf": [_SPLIT, _IMAGES]}, "params": _PARAMS},
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
                    "params": _PARAMS,
                },
            },
        ]
    }
}
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


def _body(*query: dict[str, Any], photos: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": _JSON, "text/csv": {"schema": _IMAGE}}
    if photos:
        content = {"image/*": _PHOTO, "multipart/form-data": _FORM, **content}
    return {"requestBody": {"required": True, "content": content}, "parameters": list(query)}


BODIES: dict[str, dict[str, Any]] = {
    "/score": _body(photos=False),
    "/invocations": _body(photos=False),
    "/classify": _body(
        _query("top_k", type="integer", minimum=1, default=5),
        _query("threshold", type="number", minimum=0, maximum=1),
        _query("on_error", enum=["fail", "null"]),
        photos=True,
    ),
    "/embed": _body(
        _query("format", enum=["json", "npy"]),
        _query("on_error", enum=["fail", "null"]),
        photos=True,
    ),
    "/attend": _body(_query("on_error", enum=["fail", "null"]), photos=True),
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
ANSWERS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request or an image is bad.", "content": _ERROR},
    413: {"description": "Too much at once.", "content": _ERROR},
    429: {"description": "Overloaded: see Retry-After.", "content": _ERROR},
}
