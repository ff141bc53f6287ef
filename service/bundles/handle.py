"""Bundle handles: all that scoring with one bundle needs, held by each request from its start to its end."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from models.assembly import Assembler
from models.features import Tables
from models.fusion import Fusion
from models.loading import Bundle
from models.packs import ScoringGroup
from service.batcher import Batcher
from service.bundles.proof import prove_contents
from service.engines.protocol import Engine
from service.features.choice import Stores, open_store
from service.features.protocol import FeatureStore
from service.interactions.counts import LiveCounts


@dataclass(frozen=True, eq=False)
class BundleParts:
    """What is read of a bundle on the server's side."""

    bundle: Bundle
    tables: Tables
    assembler: Assembler
    fusion: Fusion
    counts: LiveCounts
    proof: ScoringGroup  # a prompt of its own that an engine scores before it serves


@dataclass(frozen=True, eq=False)
class BundleHandle:
    """One bundle, opened: who holds it may use every part until letting go.

    Engine and batcher may be shared with other bundles of the same merged weights.
    """

    bundle: Bundle
    bundle_id: str
    tables: Tables
    store: FeatureStore
    assembler: Assembler
    fusion: Fusion
    counts: LiveCounts  # since the end of the bundle's own counts
    proof: ScoringGroup
    engine: Engine
    batcher: Batcher


class Seat:
    """A handle, and how many requests hold it."""

    def __init__(self, handle: BundleHandle) -> None:
        self.handle = handle
        self._holders = 0
        self._free = asyncio.Event()
        self._free.set()

    @property
    def holders(self) -> int:
        """How many requests hold the handle."""
        return self._holders

    @contextmanager
    def held(self) -> Iterator[BundleHandle]:
        """Hold the handle for one request; it is not freed before the request lets go."""
        self._holders += 1
        self._free.clear()
        try:
            yield self.handle
        finally:
            self._holders -= 1
            if not self._holders:
                self._free.set()

    async def free(self) -> None:
        """Return when nobody holds it."""
        await self._free.wait()


def open_parts(bundle: Bundle) -> BundleParts:
    """Open a verified bundle's tables and tokenizer, and prove its contents.

    Raises:
        BundleError, TokenizerError: the bundle cannot be served.
    """
    tables = bundle.tables()
    counts = LiveCounts(bundle.manifest.counted_until)
    assembler, fusion = bundle.assembler(bundle.encoder(), tables), bundle.fusion()
    proof = prove_contents(bundle, tables, assembler, fusion)
    return BundleParts(bundle, tables, assembler, fusion, counts, proof)


def handle_of(parts: BundleParts, engine: Engine, batcher: Batcher, stores: Stores) -> BundleHandle:
    """Join what was read with what computes."""
    return BundleHandle(
        bundle=parts.bundle,
        bundle_id=parts.bundle.id,
        tables=parts.tables,
        store=open_store(parts.bundle.id, parts.tables, stores, parts.counts.until),
        assembler=parts.assembler,
        fusion=parts.fusion,
        counts=parts.counts,
        proof=parts.proof,
        engine=engine,
        batcher=batcher,
    )
