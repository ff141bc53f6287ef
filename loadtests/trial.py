"""One open-loop run against a running service at one rate: what capacity and overload are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.arrivals import ClosedLoop, OpenLoop, poisson
from loadtests.records import Record, Summary, summarize
from loadtests.sender import Sender
from loadtests.server import Server
from loadtests.workload import Ask

WARM_UP = 20  # requests before anything is measured: connections, caches, lazy starts


@dataclass(frozen=True)
class Trial:
    """A service, its load, and the limit that its answers should keep."""

    server: Server
    asks: Sequence[Ask]
    limit_s: float
    deadline_ms: int  # what clients send with a request; beyond it an answer is of no use to them
    seed: int = 0

    async def warm_up(self) -> None:
        """Send a few requests one after the other."""
        async with Sender(self.server.url) as send:
            await ClosedLoop(send, self.asks).run(60, WARM_UP)

    async def run(self, rate: float, seconds: float) -> list[Record]:
        """Send Poisson arrivals at a rate, on an idle service."""
        self.server.settle()
        async with Sender(self.server.url, deadline_ms=self.deadline_ms) as send:
            # An answer after its deadline and this grace will not come.
            loop = OpenLoop(send, self.asks, grace_s=self.deadline_ms / 1000 + 5)
            return await loop.run(poisson(rate, seconds, self.seed))

    async def summary(self, rate: float, seconds: float) -> Summary:
        """Run and sum up."""
        return summarize(await self.run(rate, seconds), seconds, self.limit_s)
