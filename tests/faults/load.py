"""A steady load whose every answer is compared with what the service said before the fault."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import httpx

DEADLINE_S = 5.0
EXACT = 1e-5  # fp32: what batch and neighbours may change of a score


@dataclass(frozen=True)
class Ask:
    """A request and the raw scores it had, by item."""

    body: dict[str, Any]
    expected: dict[str, float]


@dataclass(frozen=True)
class Seen:
    """What became of one request; times are `time.monotonic()`."""

    began: float
    seconds: float
    status: int  # 0: no answer
    wrong: str = ""


@dataclass
class Load:
    """Requests one after the other from a few threads until it is told to stop."""

    seen: list[Seen] = field(default_factory=list)

    @property
    def good(self) -> int:
        """How many were answered with 200 within their deadline."""
        return sum(one.status == 200 and one.seconds <= DEADLINE_S for one in self.seen)

    @property
    def wrong(self) -> list[str]:
        """Every answer whose scores were others than before."""
        return [one.wrong for one in self.seen if one.wrong]

    @property
    def share_good(self) -> float:
        """The share of all requests that was good."""
        return self.good / len(self.seen)

    def statuses(self) -> dict[int, int]:
        """How many requests ended in each status."""
        found = [one.status for one in self.seen]
        return {status: found.count(status) for status in sorted(set(found))}


def asks_of(url: str, users: Sequence[str], items: Sequence[str]) -> list[Ask]:
    """Ask once for every user and remember the raw scores."""
    asks = []
    with httpx.Client(base_url=url, timeout=30) as client:
        for user in users:
            body = {"user_id": user, "candidates": list(items)}
            answer = client.post("/rank", json=body).raise_for_status().json()
            asks.append(Ask(body, {one["item_id"]: one["raw_score"] for one in answer["results"]}))
    return asks


@contextmanager
def load_on(url: str, asks: Sequence[Ask], *, threads: int = 2, pause_s: float = 0.02) -> Iterator[Load]:
    """Send requests while the block runs; after it, `Load.seen` is complete."""
    load = Load()
    over = threading.Event()

    def send(first: int) -> None:
        with httpx.Client(base_url=url, timeout=DEADLINE_S + 5) as client:
            for ask in cycle([*asks[first:], *asks[:first]]):
                if over.wait(pause_s):
                    return
                load.seen.append(_once(client, ask))

    workers = [threading.Thread(target=send, args=(number % len(asks),)) for number in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield load
    finally:
        over.set()
        for worker in workers:
            worker.join()


def _once(client: httpx.Client, ask: Ask) -> Seen:
    began = time.monotonic()
    headers = {"X-Request-Timeout-Ms": str(int(1000 * DEADLINE_S))}
    try:
        response = client.post("/rank", json=ask.body, headers=headers)
    except httpx.HTTPError:
        return Seen(began, time.monotonic() - began, 0)
    seconds = time.monotonic() - began
    if response.status_code != 200:
        return Seen(began, seconds, response.status_code)
    found = {one["item_id"]: one["raw_score"] for one in response.json()["results"]}
    return Seen(began, seconds, 200, _difference(ask, found))


def _difference(ask: Ask, found: dict[str, float]) -> str:
    """Say what differs from before, or nothing."""
    user = ask.body["user_id"]
    if found.keys() != ask.expected.keys():
        return f"user {user}: items {sorted(found)} instead of {sorted(ask.expected)}"
    worst = max(found, key=lambda item: abs(found[item] - ask.expected[item]))
    if abs(found[worst] - ask.expected[worst]) <= EXACT:
        return ""
    return f"user {user}, item {worst}: {found[worst]} instead of {ask.expected[worst]}"
