"""``GET /metrics`` in OpenMetrics, for scrapers that ask for it: the form that carries exemplars.

vLLM answers in the older text form whatever it is asked for, and keeps doing so for everyone else. With
several API processes it does so for all: what they write down for each other has no exemplars.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import REGISTRY
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.types import Scope, Send

from server.metrics import several_processes

METRICS_PATH: Final = "/metrics"
_MEDIA_TYPE: Final = b"application/openmetrics-text"


def wants_openmetrics(scope: Scope, path: str) -> bool:
    """Whether a request is for the metrics, in OpenMetrics, and this process can answer it."""
    if path != METRICS_PATH or several_processes():
        return False
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    return any(
        part.split(b";")[0].strip() == _MEDIA_TYPE and b"q=0" not in part.replace(b"q=0.", b"")
        for part in accepted.split(b",")
    )


async def send_openmetrics(send: Send) -> None:
    """Answer with everything that is registered in this process, vLLM's metrics included."""
    # With many series it takes long enough for every stream to notice.
    body: bytes = await run_in_threadpool(generate_latest, REGISTRY)
    headers = [
        (b"content-type", CONTENT_TYPE_LATEST.encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
