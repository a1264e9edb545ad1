"""Serve a bundle over HTTP.

    python -m recllm.serving artifacts/demo/bundle/reclora --port 8000

The API key, if there is to be one, stands in the environment as RECLLM_API_KEY, and the event store's URL as
EVENTS_URL. Every limit is a flag, see
`--help`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Serve until the process is told to stop; what cannot be done is one line and status 2."""
    # Before torch is imported. Threads that wait spin for some microseconds only: a service shares its cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import fastapi
        import prometheus_client
        import sqlalchemy
        import uvicorn
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; wanted pip install 'recllm[serve]'", file=sys.stderr)
        return 2
    del fastapi, prometheus_client, sqlalchemy, uvicorn
    from recllm.errors import ConfigError, StageError
    from recllm.serving.server.events import EventStore
    from recllm.serving.server.flags import events_url, parse

    try:
        bundle, settings, key = parse(arguments)
        url = events_url(bundle)
        events = EventStore(url, settings.max_stored) if url else None
    except (ConfigError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from recllm.serving.server.running import run
    from recllm.serving.server.served import Served

    return run(lambda: Served.load(bundle, settings.lms), settings, key, events)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
