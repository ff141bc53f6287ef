"""A change of bundles: verify, check memory, load beside the old, switch between requests, drain, free."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import structlog

from models.backbone import BackboneError
from models.bundle import BundleError, read_manifest, verify
from models.loading import Bundle
from models.tokens import TokenizerError
from service.background import begin
from service.bundles.handle import BundleHandle, Seat, handle_of, open_parts
from service.bundles.hashing import hashes_of
from service.bundles.loaded import LoadedModels
from service.bundles.memory import check_memory
from service.bundles.registry import Bundles, Role
from service.collector import no_collections
from service.engines.protocol import EngineError, JobFailedError
from service.errors import BundleRefusedError, ChangeRunningError, RequestError
from service.features.choice import Stores
from service.interactions.recorder import Recorder
from service.metrics.registry import Metrics
from service.settings import Settings, SettingsError


@dataclass(frozen=True)
class ChangeReport:
    """A change that runs, or the last one; `outcome` is empty while it runs."""

    role: Role
    bundle: str
    step: str
    began: datetime
    outcome: str = ""
    reason: str = ""


class BundleChanges:
    """Makes one change at a time. It goes on when whoever asked for it leaves, and ends cleanly with the service."""

    def __init__(
        self,
        settings: Settings,
        bundles: Bundles,
        models: LoadedModels,
        stores: Stores,
        interactions: Recorder,
        metrics: Metrics,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._settings = settings
        self._folder = (settings.bundle_folder or settings.bundle.resolve().parent).resolve()
        self._bundles = bundles
        self._models = models
        self._stores = stores
        self._interactions = interactions
        self._metrics = metrics
        self._log = log
        self._running: asyncio.Task[None] | None = None
        self._draining: dict[asyncio.Task[None], Seat] = {}
        self.last: ChangeReport | None = None

    @property
    def draining(self) -> list[str]:
        """The bundles that serve no new request and are held by earlier ones."""
        return [seat.handle.bundle_id for seat in self._draining.values()]

    def begin(self, bundle: Path, role: Role, share: float | None = None) -> "asyncio.Task[None]":
        """Start giving a role to the bundle at a path, relative to the bundle folder; the task ends with the switch.

        The task raises BundleRefusedError where the bundle cannot be served; what is served is then untouched.

        Raises:
            ChangeRunningError: another change is under way.
        """
        return self._begin(str(bundle), role, lambda: self._change(bundle, role, share))

    async def end(self, role: Role) -> None:
        """End the canary or the shadow, and free its bundle when nobody holds it.

        Raises:
            ChangeRunningError: a change is under way.
            BundleRefusedError: nobody has the role, or it is the current bundle's.
        """
        self._refuse_if_running()
        if role is Role.CURRENT:
            raise BundleRefusedError("the current bundle cannot be ended; give its role to another one", "role")
        seat = self._bundles.drop(role)
        if seat is None:
            raise BundleRefusedError(f"there is no {role}", "role")
        self._drain(seat)

    async def follow(self, bundle_id: str) -> None:
        """Make a bundle of the bundle folder current, found by its id; nothing is done if it is so already.

        Raises:
            BundleRefusedError: it is not there, or cannot be served.
            ChangeRunningError: another change is under way.
        """
        if bundle_id == self._bundles.current.bundle_id:
            return

        async def found() -> float:
            folder = await asyncio.to_thread(self._find, bundle_id)
            return await self._change(folder, Role.CURRENT, None)

        await asyncio.shield(self._begin(f"published {bundle_id[:12]}", Role.CURRENT, found))

    async def close(self) -> None:
        """End a change that runs, and what it has loaded."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def free(self) -> None:
        """Wait until no request holds any bundle, then end every store and engine."""
        await asyncio.gather(*self._draining)
        await self._bundles.free()
        await self._models.close()
        await asyncio.gather(*(seat.handle.store.close() for seat in self._bundles.roles.values()))

    def _begin(self, bundle: str, role: Role, work: Callable[[], Awaitable[float]]) -> "asyncio.Task[None]":
        self._refuse_if_running()
        self.last = ChangeReport(role, bundle, "reading the manifest", datetime.now(UTC))
        self._running = asyncio.create_task(self._report(role, bundle, work), name="bundle change")
        self._running.add_done_callback(_seen)
        return self._running

    def _refuse_if_running(self) -> None:
        if self._bundles.stopping:
            raise ChangeRunningError("the service is stopping")
        if self._running is not None and not self._running.done():
            raise ChangeRunningError("another change of bundles is under way; GET /admin/bundle tells where it stands")

    async def _report(self, role: Role, bundle: str, work: Callable[[], Awaitable[float]]) -> None:
        """Make a change, count it, and tell how it ended: the one place where either happens."""
        try:
            seconds = await work()
        except Exception as error:
            refused = error if isinstance(error, RequestError) else _refused(error)
            self._metrics.bundles.refused()
            self._log.error("bundle_refused", role=role, bundle=bundle, reason=refused.message)
            self._step(outcome="refused", reason=refused.message)
            raise refused from error
        self._metrics.bundles.switched(seconds)
        self._step(outcome="switched")

    async def _change(self, bundle: Path, role: Role, share: float | None) -> float:
        """Give a role to a bundle; return the seconds it took to the switch."""
        started = time.monotonic()
        opened = await self._verified(await asyncio.to_thread(self._locate, bundle))
        seat = next((one for one in self._bundles.roles.values() if one.handle.bundle_id == opened.id), None)
        if seat is not None and seat.handle is self._bundles.current and role is not Role.CURRENT:
            raise BundleRefusedError(f"bundle {opened.id[:12]} is the current one", "bundle")
        loaded = seat is None
        if seat is None:
            seat = Seat(await self._load(opened))
        else:
            await self._prove(seat.handle)
        before = self._bundles.put(role, seat, self._share(role, share))
        seconds = time.monotonic() - started
        self._log.info(
            "bundle_switched",
            role=role,
            bundle_id=seat.handle.bundle_id,
            before=None if before is None else before.handle.bundle_id,
            share=self._bundles.share(role),
            loaded=loaded,
            seconds=round(seconds, 3),
        )
        if before is not None:
            self._drain(before)
        return seconds

    async def _verified(self, folder: Path) -> Bundle:
        """Return the bundle in a folder, every file's hash checked: also where the bundle is loaded already."""
        await asyncio.to_thread(read_manifest, folder)  # before anything is hashed that is no bundle
        self._step(step="verifying every file")
        hashes = await hashes_of(folder)
        return Bundle(folder, await asyncio.to_thread(verify, folder, hashes=hashes))

    async def _load(self, bundle: Bundle) -> BundleHandle:
        """Load a bundle beside those that serve.

        Raises:
            BundleError, TokenizerError, EngineError, OSError, BundleTooLargeError: it cannot be.
        """
        shared = self._models.has_weights(bundle.manifest)
        usages = [model.engine.usage() for model in self._models]
        await asyncio.to_thread(check_memory, bundle.manifest, self._settings, usages, shared=shared)
        self._step(step="opening tables and tokenizer")
        with no_collections():
            parts = await asyncio.to_thread(open_parts, bundle)
        self._step(step="counting interactions")
        try:
            await self._interactions.count(parts.counts)
            self._step(step="loading projections" if shared else "loading the language model")
            model = await self._models.lease(parts)
        except BaseException:
            self._interactions.uncount(parts.counts)
            raise
        handle = handle_of(parts, model.engine, model.batcher, self._stores)
        try:
            await self._prove(handle)
        except BaseException:
            await self._give_up(handle)
            raise
        return handle

    async def _prove(self, handle: BundleHandle) -> None:
        """Score the bundle's own prompt through the queue and the engine that will serve it.

        Raises:
            EngineError, DeadlineExceededError: it is not scored.
        """
        self._step(step="scoring a prompt")
        deadline = time.monotonic() + self._settings.forward_limit_s
        async with asyncio.timeout(self._settings.forward_limit_s):
            [logits_K], _ = await handle.batcher.score(
                [handle.proof], deadline, admitted=True, bundle_id=handle.bundle_id
            )
        if not np.isfinite(logits_K).all():
            raise JobFailedError(f"{handle.bundle.folder}: the prompt that proves it has a logit that is not finite")

    def _share(self, role: Role, share: float | None) -> float:
        if share is not None:
            return share
        return self._settings.shadow_share if role is Role.SHADOW else 1.0

    def _drain(self, seat: Seat) -> None:
        """Free a bundle when the requests that hold it have ended."""
        task = begin(self._free(seat), "bundle drain", vital=False)
        self._draining[task] = seat
        task.add_done_callback(lambda done: self._draining.pop(done, None))

    async def _free(self, seat: Seat) -> None:
        await seat.free()
        await self._give_up(seat.handle)
        serving = {one.handle.bundle_id for one in self._bundles.roles.values()}
        if seat.handle.bundle_id not in serving:  # else it was loaded again meanwhile
            self._metrics.bundles.freed(seat.handle.bundle_id)
            self._metrics.retired(seat.handle.bundle_id)
        self._log.info("bundle_freed", bundle_id=seat.handle.bundle_id)

    async def _give_up(self, handle: BundleHandle) -> None:
        """End all that a handle holds."""
        self._interactions.uncount(handle.counts)
        await self._models.give_back(handle.bundle_id, handle.engine)
        await handle.store.close()

    def _locate(self, bundle: Path) -> Path:
        """Return a bundle's folder, links resolved."""
        folder = (self._folder / bundle).resolve()
        if self._folder not in folder.parents:
            raise BundleRefusedError(
                f"{bundle}: not inside the bundle folder {self._folder}; put it there, or set SELLA_BUNDLE_FOLDER",
                "bundle",
            )
        return folder

    def _find(self, bundle_id: str) -> Path:
        for folder in sorted(self._folder.iterdir()):
            try:
                if folder.is_dir() and read_manifest(folder).bundle_id == bundle_id:
                    return folder
            except BundleError:
                continue  # whatever else lies there
        raise BundleRefusedError(f"bundle {bundle_id[:12]} is not in {self._folder}; copy it there")

    def _step(self, **changed: str) -> None:
        assert self.last is not None
        self.last = replace(self.last, **changed)  # type: ignore[arg-type]


def _refused(error: Exception) -> BundleRefusedError:
    """Tell why a bundle is refused, whatever stood in its way."""
    known = isinstance(error, (BundleError, BackboneError, TokenizerError, EngineError, SettingsError, OSError))
    told = " ".join(str(error).split())
    return BundleRefusedError(told if known and told else f"{type(error).__name__}: {told}", "bundle")


def _seen(task: "asyncio.Task[None]") -> None:
    """Take a change's error where nobody waits for it; it is logged and kept in the report."""
    if not task.cancelled():
        task.exception()
