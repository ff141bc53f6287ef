"""`sella-serve`: a bundle in, a server on a port; or a bundle into Redis."""

import asyncio
import os
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, cast

import structlog
import typer
import uvicorn

from models.backbone import BackboneError
from models.bundle import BundleError
from models.loading import Bundle
from models.tokens import TokenizerError
from service.access.gate import Access
from service.access.key_command import key
from service.access.keys import KeyFileError
from service.app import create_app, open_traces
from service.bundles.change import BundleChanges
from service.bundles.handle import handle_of, open_parts
from service.bundles.loaded import LoadedModels
from service.bundles.memory import warn_if_short
from service.bundles.registry import Bundles
from service.bundles.shadow import Shadow
from service.collaborators import Collaborators
from service.collector import freeze_tables
from service.connections import Connections, room_for_connections
from service.features.choice import Stores
from service.features.publish_command import publish
from service.interactions.log_commands import backup, check, export, restore
from service.interactions.recorder import open_recorder
from service.logs import configure_logs
from service.metrics.registry import Metrics, build_version
from service.quality.live import LiveQuality
from service.quality.served import ServedScores
from service.settings import DAY_S, Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from service.tracing import Traces

CANNOT_SERVE = 2
CUT_OFF = 1  # the process could not end by itself
END_S = 14.0  # beyond the drain; compose kills after 45 s
SOCKET_BUFFER = 262_144  # bytes; the longest answers take a few hundred kilobytes

# Without markup, or the brackets of the options' help would be taken for it.
app = typer.Typer(help="Serve scores from a bundle.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def main() -> None:
    """Serve scores from a bundle."""


for command in (publish, key, export, backup, restore, check):
    app.command()(command)


@app.command()
def run(
    bundle: Annotated[Path | None, typer.Option(help="The bundle's folder [env: SELLA_BUNDLE].")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [env: SELLA_HOST; default 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one [env: SELLA_PORT; default 8000].")] = None,
    engine: Annotated[
        Literal["packed", "vllm"] | None,
        typer.Option(help="What computes the scores [env: SELLA_ENGINE; default packed]."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="embedded, or the address of a Redis [env: SELLA_STORE; default embedded]."),
    ] = None,
) -> None:
    """Serve a bundle over HTTP until SIGTERM or Ctrl-C. Every other setting is a SELLA_ variable."""
    try:
        settings = load_settings(bundle=bundle, host=host, port=port, engine=engine, store=store)
        log = configure_logs(settings)
        metrics = Metrics(settings.drift_window, settings.quality_window)
        quality = LiveQuality(ServedScores(settings.quality_scores, settings.quality_age_s), metrics.quality)
        access = Access.open(settings, log)
        traces = open_traces(settings)
        # Verified before anything listens: a broken bundle is one line here, not a server that is never ready.
        opened = Bundle.open(settings.bundle)
        connections = Connections(settings, room_for_connections(settings, log), metrics.connections)
        collaborators = _collaborators(settings, opened, metrics, log, quality)
        listener = _listen(settings.host, settings.port)
        metrics_listener = None
        if settings.metrics_port is not None:
            metrics_listener = _listen(settings.metrics_host or settings.host, settings.metrics_port)
            access = replace(access, metrics_port=metrics_listener.getsockname()[1])
    except (SettingsError, KeyFileError, BundleError, BackboneError, TokenizerError, OSError) as error:
        _give_up(str(error))
    url = _url(listener)
    sizes = opened.manifest.dimensions
    typer.echo(
        f"sella {build_version()}: bundle {opened.id[:12]} ({sizes.users} users, {sizes.items} items) on {url} - "
        f"the model is loading; {url}/readyz says when it is ready, {url}/docs what to send"
        + ("" if metrics_listener is None else f"; metrics are on {_url(metrics_listener)}")
    )
    listeners = [one for one in (listener, metrics_listener) if one is not None]
    reason = _serve(collaborators, access, connections, listeners, traces)
    if reason:
        _give_up(reason)


def _collaborators(
    settings: Settings, bundle: Bundle, metrics: Metrics, log: structlog.stdlib.BoundLogger, quality: LiveQuality
) -> Collaborators:
    """Return all that the application works with; the model is loaded when it starts.

    Raises:
        BundleError, TokenizerError: the bundle cannot be served.
        SettingsError: the engine is not installed.
    """
    warn_if_short(bundle.manifest, settings, log)
    stores = Stores.of(settings, metrics.store, log)
    models = LoadedModels(settings, metrics, log)
    parts = open_parts(bundle)
    model = models.open(parts)
    bundles = Bundles(handle_of(parts, model.engine, model.batcher, stores), metrics)
    interactions = open_recorder(settings, metrics, log, stores.interactions(settings.retention_days * DAY_S))
    interactions.register(bundles.current.counts)
    changes = BundleChanges(settings, bundles, models, stores, interactions, metrics, log)
    shadow = Shadow(bundles, metrics, log, idle=lambda: models.idle)
    return Collaborators(settings, bundles, changes, shadow, metrics, log, interactions, quality, stores)


def _url(listener: socket.socket) -> str:
    address, port = listener.getsockname()[:2]
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    # Every connection takes these over. Left alone, the kernel keeps up to several megabytes for each client that does
    # not read, and the service never learns that it does not.
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        listener.setsockopt(socket.SOL_SOCKET, buffer, SOCKET_BUFFER)
    return listener


def _serve(
    collaborators: Collaborators,
    access: Access,
    connections: Connections,
    listeners: list[socket.socket],
    traces: "Traces | None",
) -> str:
    """Serve until a signal; return why the model can never be served, or ""."""
    broken: list[str] = []
    log = collaborators.log

    def on_broken(reason: str) -> None:
        broken.append(reason)
        server.should_exit = True

    config = uvicorn.Config(
        create_app(collaborators, on_broken, access, traces),
        log_config=None,
        access_log=False,
        server_header=False,
        # Addresses in headers are the client's own claims; the rate limit of anonymous clients goes by the peer's.
        proxy_headers=False,
        # h11, because httptools loses the body beside an offer to upgrade. uvicorn calls it to make a connection.
        http=cast("type[asyncio.Protocol]", connections.protocol),
        ws="none",
        timeout_graceful_shutdown=max(1, round(collaborators.settings.drain_s)),
    )
    server = _Server(config, collaborators.bundles, collaborators.settings.drain_s + END_S)
    # uvicorn restores these handlers and raises the signal again once it has drained. With its own handler there, the
    # process then ends with 0 and not by the signal, and no signal is lost before uvicorn installs it.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, server.handle_exit)
    freeze_tables()
    log.info("starting", bundle_id=collaborators.bundles.current.bundle_id, version=build_version())
    server.run(sockets=listeners)
    log.info("stopped")
    return broken[0] if broken else ""


class _Server(uvicorn.Server):
    """uvicorn, telling /readyz of a signal as soon as it comes, and ending at the latest `end_s` after it.

    A thread that waits for a disk, a pipe or a terminal that does not answer would keep the process for ever.
    """

    def __init__(self, config: uvicorn.Config, bundles: Bundles, end_s: float) -> None:
        super().__init__(config)
        self._bundles = bundles
        self._end = threading.Timer(end_s, os._exit, (CUT_OFF,))
        self._end.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._bundles.stopping:
            self._bundles.stopping = True
            self._end.start()
        super().handle_exit(sig, frame)


def _give_up(message: str) -> NoReturn:
    typer.echo(f"sella-serve: {message}", err=True)
    raise typer.Exit(CANNOT_SERVE)


if __name__ == "__main__":
    app()
