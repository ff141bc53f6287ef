from pathlib import Path

import pytest
from pydantic import ValidationError

from models.loading import Bundle
from service.app import create_app
from service.settings import SettingsError, load_settings
from tests.service.conftest import client_of, collaborators
from tests.service.echo import EchoEngine


def test_the_environment_sets_and_the_command_line_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELLA_PORT", "9001")
    monkeypatch.setenv("SELLA_MAX_PAIRS", "7")
    settings = load_settings(bundle=Path("b"), port=9002, host=None)
    assert (settings.port, settings.max_pairs, settings.host) == (9002, 7, "127.0.0.1")


def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELLA_MAX_PAIR", "7")
    with pytest.raises(SettingsError, match="SELLA_MAX_PAIR: no such setting"):
        load_settings(bundle=Path("b"))


def test_a_value_out_of_range_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELLA_BATCH_TOKENS", "1")
    with pytest.raises(SettingsError, match=r"SELLA_BATCH_TOKENS: .*greater than or equal to 64"):
        load_settings(bundle=Path("b"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DRAIN_S", "inf"),
        ("FORWARD_LIMIT_S", "1e300"),
        ("HOST", ""),
        ("HOST", "é" * 70),
        ("ENGINE_THREADS", "99999999"),
        ("STORE", "redis://host?nonsense=1"),
        ("STORE", "redis://host/films"),
        ("STORE", "rediss://host?ssl_ca_certs=/no/such/file"),
        ("REDIS_PREFIX", "a:b"),
        ("REDIS_PREFIX", "films*"),
        ("REDIS_PREFIX", "films\n"),
        ("REDIS_PREFIX", ""),
        # Numbers that only overflow in use.
        *((name, "1" + "0" * 400) for name in ("CACHE_MB", "ITEM_CACHE_MB", "BATCH_TOKENS", "QUEUE_TOKENS")),
        *((f"MAX_{name}", "9" * 20) for name in ("PAIRS", "CANDIDATES", "HISTORY", "HISTORIES", "TITLE", "BODY")),
        ("METRICS_PORT", "65536"),
        ("METRICS_HOST", ""),
    ],
)
def test_what_would_only_fail_later_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"SELLA_{name}", value)
    with pytest.raises(SettingsError, match=f"SELLA_{name}: ") as error:
        load_settings(bundle=Path("b"))
    assert "\n" not in str(error.value)


def test_without_a_bundle_there_are_no_settings() -> None:
    with pytest.raises(SettingsError, match="SELLA_BUNDLE: Field required"):
        load_settings()


def test_settings_are_frozen() -> None:
    settings = load_settings(bundle=Path("b"))
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


SMALLEST = {
    "MAX_CANDIDATES": "1",
    "MAX_PAIRS": "1",
    "MAX_HISTORY": "0",
    "MAX_HISTORIES": "0",
    "MAX_TITLE": "1",
    "MAX_INTERACTIONS": "1",
    "MAX_BODY": "1024",
    "BATCH_TOKENS": "64",
    "QUEUE_TOKENS": "64",
    "CACHE_MB": "0",
    "ITEM_CACHE_MB": "0",
    "BATCHES_IN_FLIGHT": "1",
    "BATCH_AHEAD_MS": "0",
    "QUALITY_WINDOW": "100",
    "QUALITY_SCORES": "1000",
    "DRIFT_WINDOW": "1000",
    "DRAIN_S": "0",
    "MAX_CONNECTIONS": "8",
    "KEEP_ALIVE_S": "0.1",
    "DEFAULT_TIMEOUT_MS": "600000",
    "RETENTION_DAYS": "3650",
    "ATTRIBUTION_S": "0.001",
    "QUALITY_AGE_S": "0.001",
    "RATE_BURST_S": "0.001",
    "POINTER_S": "0.001",
    "SHADOW_SHARE": "1",
}


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "value"), SMALLEST.items())
async def test_each_setting_at_its_end_serves(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    monkeypatch.setenv(f"SELLA_{name}", value)
    settings = load_settings(bundle=bundle.folder, interactions=tmp_path / "log.sqlite").model_dump(exclude_unset=True)
    service = collaborators(bundle, EchoEngine(), **{key: one for key, one in settings.items() if key != "bundle"})
    app = create_app(service)
    async with app.router.lifespan_context(app), client_of(service) as client:
        for route, body in (
            ("/rank", {"user_id": "u1", "candidates": ["i1"]}),
            ("/rank", {"user_id": "u0", "candidates": [{"item_id": "new", "title": "T"}], "history": []}),
            ("/score", {"pairs": [{"user_id": "u1", "item_id": "i1"}]}),
            (
                "/interactions",
                {"interactions": [{"event_id": 1, "user_id": "u1", "item_id": "i1", "timestamp": 5, "label": 1}]},
            ),
        ):
            answer = await client.post(route, json=body)
            assert answer.status_code == 200, answer.text
        assert (await client.get("/metrics")).status_code == 200
