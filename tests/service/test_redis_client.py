import pytest

from service.features.client import check_url, shown


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user:secret@host:6379/0", "redis://host:6379/0"),
        ("rediss://:sec/ret@host:6379/0", "rediss://host:6379/0"),
        ("redis://:sec#ret@host/0", "redis://host/0"),
        ("redis://:sec@ret@host/0", "redis://host/0"),
        ("redis://host/0?password=secret", "redis://host/0"),
        ("redis://host/0?password=sec@ret", "redis://…"),
        ("redis://:sec?ret@host/0", "redis://…"),
        ("redis://[::1/0", "redis://[::1/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_an_address_is_told_without_its_password(url: str, told: str) -> None:
    assert shown(url) == told


@pytest.mark.parametrize("url", ["redis:/:sec@host", "redis://:sec/ret@host:6379/0", "redis://[::1/0", "redis://h:x"])
def test_an_address_that_is_none_is_told_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="not an address of Redis") as error:
        check_url(url)
    assert "sec" not in str(error.value)
