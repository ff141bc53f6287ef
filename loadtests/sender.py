"""Sends requests over HTTP and reads what the service says of its own time."""

import itertools
import re
from collections.abc import Mapping
from types import TracebackType

import httpx

from loadtests.records import NO_ANSWER, Answer
from loadtests.workload import Ask

_TIMING = re.compile(r"(\w+);dur=([0-9.]+)")

# httpx goes through its whole pool for every request; many small pools keep that short when hundreds wait.
POOLS = 16


class Sender:
    """Keeps its connections; `deadline_ms` is sent as X-Request-Timeout-Ms."""

    def __init__(
        self, url: str, *, deadline_ms: int | None = None, timeout_s: float = 60.0, pools: int = POOLS
    ) -> None:
        headers = {"content-type": "application/json"}
        if deadline_ms is not None:
            headers["x-request-timeout-ms"] = str(deadline_ms)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._clients = [
            httpx.AsyncClient(
                base_url=url,
                headers=headers,
                timeout=timeout_s,
                limits=limits,
                trust_env=False,  # a proxy from the environment must not stand between the load and loopback
                verify=False,  # plain HTTP; reading the certificates would take longer than the first requests
            )
            for _ in range(pools)
        ]
        self._next = itertools.cycle(self._clients)

    async def __aenter__(self) -> "Sender":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            await client.aclose()

    async def __call__(self, ask: Ask) -> Answer:
        """Send one request; whatever becomes of it is an answer."""
        try:
            response = await next(self._next).post(ask.path, content=ask.body)
        except httpx.HTTPError:
            return Answer(NO_ANSWER)
        return Answer(response.status_code, server_timing(response.headers))


def server_timing(headers: Mapping[str, str]) -> dict[str, float]:
    """Return the legs of a Server-Timing header, in seconds."""
    return {leg: float(ms) / 1000 for leg, ms in _TIMING.findall(headers.get("server-timing", ""))}
