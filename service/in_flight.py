"""The requests that are being scored, and whom of their users a deletion reached meanwhile."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class InFlight:
    """Knows the users of each request that is being scored.

    A request that began before a deletion puts back what was dropped: keys and values of its user's prompt in the
    engine's cache, and its scores in the memory of what was served.
    """

    def __init__(self) -> None:
        self._requests: dict[object, tuple[frozenset[str], set[str]]] = {}

    def forget(self, user_id: str) -> None:
        """Note that a user was deleted, in each request that has this user."""
        for users, forgotten in self._requests.values():
            if user_id in users:
                forgotten.add(user_id)

    @contextmanager
    def request(self, user_ids: Iterable[str], clear: Callable[[], None]) -> Iterator[set[str]]:
        """Follow one request to its end; yield the users who are deleted meanwhile.

        `clear` is called at the end if there are any. The engine carries out what it was sent before first.
        """
        key, forgotten = object(), set[str]()
        self._requests[key] = frozenset(user_ids), forgotten
        try:
            yield forgotten
        finally:
            del self._requests[key]
            if forgotten:
                clear()
