"""What the routes work with: passed in when the application is made, so that tests put fakes here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import structlog
from fastapi import Request

from service.answers import EngineReadiness, InteractionsReadiness, Readiness, RoleReadiness, StoreReadiness
from service.bundles.change import BundleChanges
from service.bundles.registry import Bundles
from service.bundles.shadow import Shadow
from service.features.choice import Stores
from service.features.protocol import StoreHealth
from service.in_flight import InFlight
from service.interactions.recorder import Recorder
from service.metrics.registry import Metrics
from service.quality.live import LiveQuality
from service.questions import Question
from service.scoring import DELETIONS_UNKNOWN
from service.settings import Settings


@dataclass(frozen=True)
class Collaborators:
    """One application's settings, bundles, metrics, log, interactions, memory of what it served, and stores."""

    settings: Settings
    bundles: Bundles
    changes: BundleChanges
    shadow: Shadow
    metrics: Metrics
    log: structlog.stdlib.BoundLogger
    interactions: Recorder
    quality: LiveQuality
    stores: Stores
    background: list[str] = field(default_factory=list)  # background tasks that died
    in_flight: InFlight = field(default_factory=InFlight)

    def forget(self, user_id: str) -> None:
        """Forget what is kept in memory of a user who was deleted: served scores, keys and values of prompts.

        The engines are told once more when the last request of the user that is in flight has ended.
        """
        self.in_flight.forget(user_id)
        self.quality.forget(user_id)
        self._clear_engines()

    @contextmanager
    def scoring(self, questions: Sequence[Question]) -> Iterator[set[str]]:
        """Follow a request while it is scored; yield its users who are deleted meanwhile."""
        with self.in_flight.request((one.user_id for one in questions), self._clear_engines) as forgotten:
            yield forgotten

    def _clear_engines(self) -> None:
        for engine in self.bundles.engines:
            engine.forget()

    async def readiness(self) -> Readiness:
        """Return whether a request would be scored now."""
        with self.bundles.take_current() as handle:
            engine = handle.engine.health()
            store = await handle.store.health()
            if not store.tells_deletions and not self.interactions.deletions_known():
                store = StoreHealth(False, f"{DELETIONS_UNKNOWN} ({store.detail})")
            return Readiness(
                ready=engine.ready and store.ready and not self.bundles.stopping and not self.background,
                stopping=self.bundles.stopping,
                bundle_id=handle.bundle_id,
                engine=EngineReadiness(state=engine.state, detail=engine.detail, restarts=engine.restarts),
                store=StoreReadiness(ready=store.ready, detail=store.detail),
                interactions=InteractionsReadiness(**asdict(self.interactions.health())),
                background=list(self.background),
                beside=[
                    RoleReadiness(
                        role=role,
                        bundle_id=seat.handle.bundle_id,
                        share=self.bundles.share(role),
                        state=seat.handle.engine.health().state,
                    )
                    for role, seat in self.bundles.roles.items()
                    if seat.handle is not handle
                ],
            )


def collaborators_of(request: Request) -> Collaborators:
    """Return the collaborators of the application that a request came to."""
    collaborators: Collaborators = request.app.state.collaborators
    return collaborators
