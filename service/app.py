"""The application: its collaborators, its routes, and what starts and ends with it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from fastapi import FastAPI

from service.access.gate import Access, Gate
from service.background import begin, listen
from service.bodies import Bodies
from service.collaborators import Collaborators
from service.engines.protocol import EngineBrokenError
from service.errors import install_error_handlers
from service.features.pointer import PointerWatch
from service.features.presence import Presence
from service.intake import Intake
from service.metrics.registry import build_version
from service.routes import admin, health, interactions, rank, score, users
from service.routes.documented import document_keys
from service.settings import Settings, SettingsError

if TYPE_CHECKING:
    from service.tracing import Traces

DESCRIPTION = """Scores clicks with a language model that knows the users and items (SeLLa-Rec).

Send ids; titles only for items that are not in the catalogue. Every error has one shape, and says where and how to
mend it. Limits on lists, titles and bodies are settings of the server."""


def open_traces(settings: Settings) -> "Traces | None":
    """Return where the settings send traces, if anywhere. OpenTelemetry is imported only then.

    Raises:
        SettingsError: it is not installed.
    """
    if settings.tracing is None:
        return None
    try:
        from service.tracing import Traces
    except ImportError as error:
        raise SettingsError("SELLA_TRACING: OpenTelemetry is not installed; pip install 'sella[tracing]'") from error
    return Traces.to(settings.tracing)


def create_app(
    service: Collaborators,
    on_broken: Callable[[str], None] = lambda _: None,
    access: Access | None = None,
    traces: "Traces | None" = None,
) -> FastAPI:
    """Return the application. It answers at once, and scores when its engine is ready.

    `on_broken` is told if the engine can never load its model. `access` says who may call what; without it, the
    settings do.

    Raises:
        KeyFileError: the settings' key files cannot be used, or there must be some.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        listen(service.log, service.background)
        app.openapi()  # here, and not while requests wait
        await service.interactions.start()
        await service.bundles.current.engine.start()
        watch = begin(_watch(service, on_broken), "engine watch")
        follow = begin(_follow(service), "pointer watch")
        tell = begin(_tell_served(service), "presence in the store")
        yield
        service.bundles.stopping = True
        for task in (watch, follow, tell):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # one that died was told of
        await service.changes.close()
        await service.shadow.close()
        await service.changes.free()
        await service.interactions.close()
        await service.stores.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="sella",
        version=build_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        # One page of documentation, and no sign-in through it: every open route must be worth being open.
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.collaborators = service
    app.state.bodies = Bodies(service.settings)
    service.interactions.on_outcome = service.quality.on_outcome
    service.interactions.on_deleted = service.forget
    access = access or Access.open(service.settings, service.log)
    # The last one added is the first that a request meets.
    app.add_middleware(Gate, access=access, settings=service.settings, metrics=service.metrics, log=service.log)
    app.add_middleware(Intake, metrics=service.metrics, log=service.log)
    if traces is not None:
        from service.tracing import TraceRequests

        app.add_middleware(TraceRequests, traces=traces)
    install_error_handlers(app, service.metrics, service.log)
    for routes in (score, rank, interactions, users, health, admin):
        app.include_router(routes.router)
    document_keys(app)
    return app


async def _follow(service: Collaborators) -> None:
    """Serve the bundle that Redis points to, if there is a Redis, once the first one is ready."""
    if service.stores.client is None:
        return
    with suppress(EngineBrokenError):
        await service.bundles.current.engine.ready()
        served = service.bundles.current.bundle_id
        watch = PointerWatch(
            *(service.stores.client, service.settings.pointer_s, service.changes.follow, service.log),
            served=served,
            keys=service.stores.keys,
            metrics=service.metrics.store,
        )
        await watch.run()


async def _tell_served(service: Collaborators) -> None:
    """Tell Redis which bundles are served, if there is a Redis."""
    if service.stores.client is None:
        return

    def served() -> set[str]:
        return {seat.handle.bundle_id for seat in service.bundles.roles.values()} | set(service.changes.draining)

    client, url, stores = service.stores.client, service.settings.store, service.stores
    await Presence(client, url, stores.keys, served, stores.metrics, service.log, stores.impression_s).run()


async def _watch(service: Collaborators, on_broken: Callable[[str], None]) -> None:
    engine = service.bundles.current.engine  # the first one; a later one that cannot load is refused
    try:
        await engine.ready()
    except EngineBrokenError as error:
        service.log.error("engine_broken", reason=str(error))
        on_broken(str(error))
