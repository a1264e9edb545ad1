"""Refusals: what a client did or met, in one sentence and a status; no stack trace leaves the service."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

FAILED = "the service failed at this request; its log says where"


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        sentence: for the client.
        retry_after: seconds after which it may ask again; None: asking again does not help.
    """

    def __init__(self, status: int, sentence: str, retry_after: int | None = None) -> None:
        """See the class."""
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.retry_after = retry_after

    def response(self) -> Response:
        """The answer that says so."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return as_json({"error": self.sentence}, self.status, headers)


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response in ASCII JSON, so that no character of a client's own cannot be sent back."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(text, status, dict(headers or {}), media_type="application/json")


def sentence_of(error: RequestValidationError) -> str:
    """The first thing that is wrong with a request, where it stands and what is wanted."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "the body is no JSON"
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    sentence = f"{place}: {str(first['msg']).removeprefix('Value error, ')}"
    return " ".join(sentence.split())  # a name that a client made up may hold a line break


def add_refusals(app: FastAPI) -> None:
    """Let every error of the framework leave as `{"error": sentence}`."""

    @app.exception_handler(Refusal)
    async def refuse(_: Request, error: Refusal) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def refuse_content(_: Request, error: RequestValidationError) -> Response:
        is_json = error.errors()[0]["type"] != "json_invalid"
        return as_json({"error": sentence_of(error)}, 422 if is_json else 400)

    @app.exception_handler(HTTPException)
    async def refuse_route(_: Request, error: HTTPException) -> Response:
        sentence = {404: "there is nothing at this address; /openapi.json lists what there is"}.get(
            error.status_code, str(error.detail)
        )
        return as_json({"error": sentence}, error.status_code, error.headers)
