"""Who serves: the current bundle, a canary with a share of the users, a shadow that nobody sees."""

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from service.bundles.handle import BundleHandle, Seat
from service.engines.protocol import Engine
from service.metrics.registry import Metrics


class Role(StrEnum):
    """What a bundle is loaded for."""

    CURRENT = "current"
    CANARY = "canary"
    SHADOW = "shadow"


class Bundles:
    """The bundles that are served. Every change takes effect between two requests."""

    def __init__(self, current: BundleHandle, metrics: Metrics) -> None:
        self.stopping = False
        self._metrics = metrics
        self._seats: dict[Role, Seat] = {}
        self._shares: dict[Role, float] = {}
        self.put(Role.CURRENT, Seat(current))

    @property
    def current(self) -> BundleHandle:
        """The bundle that answers whoever is not the canary's."""
        return self._seats[Role.CURRENT].handle

    @property
    def roles(self) -> dict[Role, Seat]:
        """Who has which role."""
        return dict(self._seats)

    @property
    def engines(self) -> set[Engine]:
        """Every engine that serves a role; bundles of equal merged weights share one."""
        return {seat.handle.engine for seat in self._seats.values()}

    def share(self, role: Role) -> float:
        """Return a role's share: of the users for the canary, of the requests for the shadow."""
        return self._shares.get(role, 1.0)

    def put(self, role: Role, seat: Seat, share: float = 1.0) -> Seat | None:
        """Give a role to a bundle, which gives up the one it had; return who had the role and now has none."""
        self._metrics.loaded(seat.handle.bundle_id, seat.handle.bundle.manifest.reference)
        before = self._seats.get(role)
        for other in [one for one, seated in self._seats.items() if seated is seat and one is not role]:
            self.drop(other)
        self._seats[role], self._shares[role] = seat, share
        if before is not None and before is not seat:
            self._tell(role, before, serves=False)
        self._tell(role, seat, serves=True)
        return before if before is not seat else None

    def drop(self, role: Role) -> Seat | None:
        """End a role; return who had it."""
        seat = self._seats.pop(role, None)
        self._shares.pop(role, None)
        if seat is not None:
            self._tell(role, seat, serves=False)
        return seat

    @contextmanager
    def take(self, user_id: str) -> Iterator[BundleHandle]:
        """Hold the bundle that answers a user, for one request."""
        with self._seat_of(user_id).held() as handle:
            yield handle

    @contextmanager
    def take_current(self) -> Iterator[BundleHandle]:
        """Hold the current bundle, for what concerns no user."""
        with self._seats[Role.CURRENT].held() as handle:
            yield handle

    @contextmanager
    def take_shadow(self) -> Iterator[BundleHandle | None]:
        """Hold the shadow, if there is one."""
        seat = self._seats.get(Role.SHADOW)
        if seat is None:
            yield None
        else:
            with seat.held() as handle:
                yield handle

    async def free(self) -> None:
        """Return when no request holds any bundle."""
        await asyncio.gather(*(seat.free() for seat in self._seats.values()))

    def _seat_of(self, user_id: str) -> Seat:
        canary = self._seats.get(Role.CANARY)
        if canary is not None and place_of(user_id, canary.handle.bundle_id) < self._shares[Role.CANARY]:
            if canary.handle.engine.health().ready:
                return canary
            self._metrics.bundles.fell_back()
        return self._seats[Role.CURRENT]

    def _tell(self, role: Role, seat: Seat, *, serves: bool) -> None:
        backbone = seat.handle.bundle.manifest.backbone
        self._metrics.bundles.serves(seat.handle.bundle_id, backbone.merged_id, role, serves=serves)


def place_of(user_id: str, bundle_id: str) -> float:
    """Return where in [0, 1) a user stands for one canary: those below its share get it.

    It depends on nothing else, so a user stays with a bundle, on every server, and a share that grows keeps who was in
    it. The bundle is part of the hash: another canary is tried on other users.
    """
    digest = hashlib.sha256(f"{bundle_id}\x1f{user_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48  # what a float holds exactly, so never rounded up to 1
