"""The jobs that wait, in the order in which they will be taken: the shortest request first, but none forever."""

import asyncio
import time
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from models.packs import room
from service.engines.protocol import DistilJob, Job, Outcome, ScoreJob


@dataclass(eq=False, slots=True)
class Entry:
    """One job in the queue or at the engine."""

    job: Job
    tokens: int  # what is expected to be computed for it
    trunk: int  # equal for jobs whose trunk is computed once when they share a batch
    trunk_tokens: int
    own_tokens: int
    outcome: asyncio.Future[Outcome]
    request: int = 0  # equal for the jobs that one request put in together
    due: float = 0.0  # the order: arrival, later by a multiple of the whole request's work
    enqueued: float = field(default_factory=time.monotonic)
    dispatched: float | None = None


def score_entry(job: ScoreJob, *, first: bool) -> Entry:
    """Return the entry of a group's part, to be called on the event loop; the `first` computes the trunk for all."""
    pack = job.group.pack
    # A hash: two trunks taken for one would make a batch a little longer than meant, and change no score.
    trunk = hash((job.bundle_id, pack.trunk.token_ids, job.group.user_1C.tobytes()))
    own = pack.tokens - len(pack.trunk)
    tokens = pack.tokens if first else own
    return Entry(job, tokens, trunk, len(pack.trunk), own, asyncio.get_running_loop().create_future())


def distil_entry(job: DistilJob) -> Entry:
    """Return the entry of titles to distil; to be called on the event loop."""
    tokens = sum(map(len, job.prompts))
    return Entry(job, tokens, 0, 0, tokens, asyncio.get_running_loop().create_future())


def batch_tokens(batch: Sequence[Entry]) -> int:
    """Return how many tokens a batch is expected to compute."""
    seen: set[int] = set()
    tokens = 0
    for entry in batch:
        tokens += entry.own_tokens if entry.trunk in seen else entry.tokens
        seen.add(entry.trunk)
    return tokens


class Waiting:
    """Entries by their `due` time, and how many tokens they are.

    A request's due time is its arrival plus a multiple of its work's duration, and does not change. So a short request
    goes before a long one that came earlier, but one that came much earlier goes first whatever its length.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def add(self, entry: Entry) -> None:
        """Put an entry in its place."""
        insort(self._entries, entry, key=_order)
        self.tokens += entry.tokens

    def batch(self, max_tokens: int) -> list[Entry]:
        """Return the entry that is due first, those of its user, and what fits beside them in order; takes none out."""
        if not self._entries:
            return []
        head = self._entries[0]
        kin = [entry for entry in self._entries[1:] if type(entry.job) is type(head.job)]
        # Stable, so that each half stays in order.
        kin.sort(key=lambda entry: entry.trunk != head.trunk)
        batch, tokens, trunks = [head], head.trunk_tokens + head.own_tokens, {head.trunk}
        most = room(head.trunk_tokens, max_tokens)
        for entry in kin:
            added = entry.own_tokens + (0 if entry.trunk in trunks else entry.trunk_tokens)
            if tokens + added <= most:
                batch.append(entry)
                tokens += added
                trunks.add(entry.trunk)
        return batch

    def remove(self, entry: Entry) -> bool:
        """Take an entry out; return whether it was there."""
        index = bisect_left(self._entries, _order(entry), key=_order)
        if index == len(self._entries) or self._entries[index] is not entry:
            return False
        del self._entries[index]
        self.tokens -= entry.tokens
        return True


def _order(entry: Entry) -> tuple[float, int]:
    return entry.due, entry.job.id
