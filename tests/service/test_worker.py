"""The worker's loop in a thread, with the real model."""

import gc
import multiprocessing
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import pytest

from models.loading import Bundle
from models.scoring_model import ScoringModel
from service.engines.packed import PackedModel
from service.engines.protocol import BundlePlace
from service.engines.worker import Attach, Attached, Detach, Forget, Inbox, Order, Ready, serve
from tests.tiny import tiny_bundle


class LocalInbox(Inbox):
    """An inbox without a pipe: the real one ends its process with the pipe."""

    def __init__(self) -> None:
        self._orders: deque[Order] = deque()
        self._cancelled = set()
        self._arrived = threading.Condition()


class Loop:
    """`serve` in a thread."""

    def __init__(self, model: PackedModel) -> None:
        self.model, self.inbox = model, LocalInbox()
        self.ours, theirs = multiprocessing.Pipe()

        def run() -> None:
            with suppress(SystemExit):
                serve(theirs, model, self.inbox)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert isinstance(self.receive(), Ready)

    def receive(self) -> object:
        assert self.ours.poll(20), "the worker says nothing"
        return self.ours.recv()

    def end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def leave(bundle_id: str) -> None:
            raise SystemExit

        monkeypatch.setattr(self.model, "detach", leave)
        self.inbox.put(Detach(""))
        self.thread.join(20)
        gc.unfreeze()


@pytest.fixture
def loop(bundle: Bundle, model: ScoringModel) -> Loop:
    return Loop(PackedModel(bundle, model, batch_tokens=1024))


def test_a_bundle_that_is_attached_while_vectors_are_dropped_ends_no_worker(
    loop: Loop, model: ScoringModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = tiny_bundle(tmp_path / "alike", rest_seed=7)
    forgetting, loaded = threading.Event(), threading.Event()
    open_projections, clear = Bundle.open_projections, model.vectors.clear

    def late(folder: Path, bundle_id: str) -> Bundle:
        forgetting.wait(20)
        opened = open_projections(folder, bundle_id)
        loaded.set()
        return opened

    def slow() -> None:
        forgetting.set()
        loaded.wait(20)
        time.sleep(0.5)  # the loading thread does the rest
        clear()

    monkeypatch.setattr(Bundle, "open_projections", late)
    monkeypatch.setattr(model.vectors, "clear", slow)
    loop.inbox.put(Attach(BundlePlace(alike.folder, alike.id)))
    loop.inbox.put(Forget())
    assert loop.receive() == Attached(alike.id)
    assert alike.id in loop.model._vectors
    loop.end(monkeypatch)


def test_a_bundle_that_is_given_up_while_it_is_read_is_not_served(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = tiny_bundle(tmp_path / "alike", rest_seed=7)
    gate, open_projections = threading.Event(), Bundle.open_projections

    def late(folder: Path, bundle_id: str) -> Bundle:
        gate.wait(20)
        return open_projections(folder, bundle_id)

    monkeypatch.setattr(Bundle, "open_projections", late)
    place = BundlePlace(alike.folder, alike.id)
    loop.inbox.put(Attach(place))
    loop.inbox.put(Detach(alike.id))
    loop.inbox.put(Attach(BundlePlace(alike.folder, "0" * 64)))
    gate.set()
    refused = loop.receive()
    assert isinstance(refused, Attached) and "holds bundle" in refused.error
    time.sleep(0.3)
    assert not loop.ours.poll() and alike.id not in loop.model._vectors
    loop.end(monkeypatch)


def test_the_collector_never_looks_through_a_model_that_serves(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gc.get_freeze_count() > 10_000
    started = time.perf_counter()
    gc.collect()
    assert time.perf_counter() - started < 0.1
    loop.end(monkeypatch)
