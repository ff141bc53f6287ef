"""What the routes work with: passed in when the application is made, so that tests put fakes here."""

from dataclasses import asdict, dataclass, field

import structlog
from fastapi import Request

from service.answers import EngineReadiness, InteractionsReadiness, Readiness, RoleReadiness, StoreReadiness
from service.bundles.change import BundleChanges
from service.bundles.registry import Bundles
from service.bundles.shadow import Shadow
from service.features.choice import Stores
from service.interactions.recorder import Recorder
from service.metrics.registry import Metrics
from service.quality.live import LiveQuality
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

    def forget(self, user_id: str) -> None:
        """Forget what is kept in memory of a user who was deleted: served scores, keys and values of prompts."""
        self.quality.forget(user_id)
        for engine in self.bundles.engines:
            engine.forget()

    async def readiness(self) -> Readiness:
        """Return whether a request would be scored now."""
        with self.bundles.take_current() as handle:
            engine = handle.engine.health()
            store = await handle.store.health()
            return Readiness(
                ready=engine.ready and store.ready and not self.bundles.stopping and not self.background,
                stopping=self.bundles.stopping,
                bundle_id=handle.bundle_id,
                engine=EngineReadiness(state=engine.state, detail=engine.detail, restarts=engine.restarts),
                store=StoreReadiness(**asdict(store)),
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
