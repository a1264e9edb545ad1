"""Structured logs: a line of JSON an event, without anything that users sent or are.

No id, no address, no query, no body, and of an exception its type and where it arose, but not its text, which
may repeat what a user sent.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAME = "recllm.serving"
log = logging.getLogger(NAME)


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update(getattr(record, "facts", {}))
        if record.exc_info and record.exc_info[1] is not None:
            line.update(where(record.exc_info[1]))
        return json.dumps(line, default=str)


def where(error: BaseException) -> dict[str, Any]:
    """Type of an exception and the calls in which it arose, without its text."""
    calls = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return {"exception": type(error).__name__, "calls": calls[-8:]}


def tell(event: str, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    """Write a line."""
    if error is not None:
        facts |= where(error)
    log.log(level, event, extra={"facts": facts})


def start_logs() -> None:
    """Send the service's lines, and the server's own, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in (NAME, "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    log.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
