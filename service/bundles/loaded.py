"""Loaded language models, leased by bundles: those of equal merged weights share one, its worker and its queue."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from models.bundle import Manifest
from service.batcher import Batcher, BatchLimits
from service.bundles.handle import BundleParts
from service.engines.choice import open_engine, sharing_key
from service.engines.protocol import BundlePlace, Engine, EngineBrokenError, EngineUnavailableError
from service.metrics.registry import Metrics
from service.settings import Settings


@dataclass(eq=False)
class LoadedModel:
    """An engine with its queue, and the bundles that lease it."""

    engine: Engine
    batcher: Batcher
    leases: Counter[str] = field(default_factory=Counter)  # by bundle id: one that is freed may be taken again already


class LoadedModels:
    """Every model that is loaded. The first lease of a model loads it, the last one given back frees it."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        log: structlog.stdlib.BoundLogger,
        make_engine: Callable[..., Engine] = open_engine,
    ) -> None:
        self._make_engine = make_engine
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._models: dict[tuple[str, int], LoadedModel] = {}

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(self._models.values())

    @property
    def idle(self) -> bool:
        """Whether no model computes anything and nothing waits."""
        return all(model.batcher.idle for model in self)

    def has_weights(self, manifest: Manifest) -> bool:
        """Return whether a bundle's merged weights are loaded already."""
        return any(merged_id == manifest.backbone.merged_id for merged_id, _ in self._models)

    def open(self, parts: BundleParts) -> LoadedModel:
        """Return a model that is told to start later: the first one, while nothing is served.

        Raises:
            SettingsError: the engine is not installed.
        """
        return self._open(parts, asyncio.Event())

    async def lease(self, parts: BundleParts) -> LoadedModel:
        """Return a model that is ready for a bundle: one there is, or one loaded now.

        Raises:
            EngineError: it cannot be; nothing else is touched.
        """
        model = self._models.get(sharing_key(self._settings, parts.bundle, parts.assembler))
        if model is None:
            return await self._load(parts)
        model.leases[parts.bundle.id] += 1  # before it is attached: others may give the model back meanwhile
        if model.leases[parts.bundle.id] == 1:
            try:
                await model.engine.attach(BundlePlace(parts.bundle.folder, parts.bundle.id, parts.proof))
            except BaseException:
                await self.give_back(parts.bundle.id, model.engine)
                raise
        return model

    async def give_back(self, bundle_id: str, engine: Engine) -> None:
        """End a lease: free the bundle's projections, and with the last bundle the model."""
        key, model = next((key, model) for key, model in self._models.items() if model.engine is engine)
        model.leases[bundle_id] -= 1
        if model.leases[bundle_id] > 0:
            return
        del model.leases[bundle_id]
        if model.leases:
            model.engine.detach(bundle_id)
            return
        del self._models[key]
        await model.engine.close()

    async def close(self) -> None:
        """End every engine."""
        models, self._models = list(self), {}
        await asyncio.gather(*(model.engine.close() for model in models))

    def _open(self, parts: BundleParts, lost: asyncio.Event) -> LoadedModel:
        def on_restart() -> None:
            self._metrics.engine_restarted()
            lost.set()

        engine: Engine = self._make_engine(
            self._settings,
            parts.bundle,
            parts.assembler,
            self._log,
            on_restart,
            proof=parts.proof,
            gently=lambda: any(one.engine is not engine and one.engine.health().ready for one in self),
        )
        limits = BatchLimits(
            queue_tokens=self._settings.queue_tokens,
            batch_tokens=self._settings.batch_tokens,
            ahead_s=self._settings.batch_ahead_ms / 1000,
            in_flight=self._settings.batches_in_flight,
        )
        model = LoadedModel(
            engine,
            Batcher(engine, limits, on_queue=self._metrics.queued, on_batch=self._metrics.batched),
            Counter([parts.bundle.id]),
        )
        self._models[sharing_key(self._settings, parts.bundle, parts.assembler)] = model
        return model

    async def _load(self, parts: BundleParts) -> LoadedModel:
        """Load a model beside those that serve. A worker that dies while it loads is not tried again."""
        lost = asyncio.Event()
        model = self._open(parts, lost)
        ready = died = None
        try:
            await model.engine.start()
            ready = asyncio.ensure_future(model.engine.ready())
            died = asyncio.ensure_future(lost.wait())
            await asyncio.wait((ready, died), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise EngineUnavailableError(f"its model could not be loaded: {model.engine.health().detail}")
            ready.result()
        except BaseException:
            await self.give_back(parts.bundle.id, model.engine)
            raise
        finally:
            for task in (ready, died):
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError, EngineBrokenError):
                        await task
        return model
