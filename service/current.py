"""Bundle handles: all that scoring with one bundle needs, held by each request from its start to its end."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from models.assembly import Assembler
from models.features import Tables
from models.loading import Bundle, Calibration
from service.batcher import Batcher, BatchLimits
from service.engines.choice import open_engine
from service.engines.protocol import Engine
from service.features.choice import Stores, open_store
from service.features.protocol import FeatureStore
from service.metrics.registry import Metrics
from service.settings import Settings


@dataclass(frozen=True, eq=False)
class BundleHandle:
    """One bundle, opened: who holds it may use every part until letting go."""

    bundle_id: str
    tables: Tables
    store: FeatureStore
    assembler: Assembler
    calibration: Calibration
    engine: Engine
    batcher: Batcher


class CurrentBundle:
    """The bundle that new requests get, and how many requests hold it."""

    def __init__(self, handle: BundleHandle) -> None:
        self.handle = handle
        self.stopping = False
        self._holders = 0
        self._free = asyncio.Event()
        self._free.set()

    @contextmanager
    def take(self) -> Iterator[BundleHandle]:
        """Hold the current bundle for one request; it is not closed before the request lets go."""
        self._holders += 1
        self._free.clear()
        try:
            yield self.handle
        finally:
            self._holders -= 1
            if not self._holders:
                self._free.set()

    async def close(self) -> None:
        """Wait until no request holds the bundle, then free it."""
        await self._free.wait()
        await self.handle.engine.close()
        await self.handle.store.close()


def open_handle(
    settings: Settings, bundle: Bundle, metrics: Metrics, log: structlog.stdlib.BoundLogger, stores: Stores
) -> BundleHandle:
    """Open a verified bundle's tables and tokenizer here; its engine starts loading when it is told to.

    Raises:
        BundleError, TokenizerError: the bundle cannot be served.
        SettingsError: the engine is not installed.
    """
    tables = bundle.tables()
    assembler = bundle.assembler(bundle.encoder(), tables)
    engine = open_engine(settings, bundle, assembler, log, metrics.engine_restarted)
    limits = BatchLimits(
        queue_tokens=settings.queue_tokens,
        batch_tokens=settings.batch_tokens,
        ahead_s=settings.batch_ahead_ms / 1000,
        in_flight=settings.batches_in_flight,
    )
    metrics.serving(bundle.id, bundle.manifest.backbone.merged_id)
    metrics.loaded(bundle.id, bundle.manifest.reference)
    return BundleHandle(
        bundle_id=bundle.id,
        tables=tables,
        store=open_store(bundle.id, tables, stores),
        assembler=assembler,
        calibration=bundle.calibration(),
        engine=engine,
        batcher=Batcher(engine, limits, on_queue=metrics.queued, on_batch=metrics.batched),
    )
