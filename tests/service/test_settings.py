from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import SettingsError, load_settings


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
