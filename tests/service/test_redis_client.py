import re

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


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://host:6379/0",
        "redis://:secret@host/3?db=3",
        "redis://user:se%2Fcret@[::1]:6379/15?socket_timeout=0.5&client_name=sella&max_connections=8",
        "rediss://host?ssl_cert_reqs=none&ssl_check_hostname=false&ssl_min_version=771",
        "unix:///run/redis.sock?db=2&password=secret",
    ],
)
def test_an_address_that_can_be_used_is_taken(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://:secret@host?nonsense=1", "no option 'nonsense'"),
        ("redis://host?decode_responses=true", "no option 'decode_responses'"),
        ("redis://host?retry=3", "no option 'retry'"),
        ("redis://host?db=-1", "db must be a number"),
        ("redis://host?db=", "db must be a number"),
        ("redis://host?socket_timeout=0", "socket_timeout must be seconds"),
        ("redis://host?socket_timeout=nan", "socket_timeout must be seconds"),
        ("redis://host?max_connections=0", "max_connections must be a number"),
        ("redis://host?max_connections=" + "9" * 5000, "max_connections must be a number"),
        ("redis://host?socket_keepalive=maybe", "socket_keepalive must be true or false"),
        ("redis://host?db=1&db=2", "db stands twice"),
        ("redis://host/1?db=2", "names database 1 and the option db names 2"),
        ("redis://host?db", "not of the form"),
        ("redis://host/films", "/films is no database"),
        ("redis://host/-1", "/-1 is no database"),
        ("redis://host/" + "9" * 5000, "is no database"),
        ("redis://host:0/0", "not an address"),
        ("redis://host:99999/0", "not an address"),
        ("redis://host:6379/0\n", "not an address"),
        ("redis://ho st/0", "not an address"),
        ("redis://host/0#1", "percent-encode"),
        ("redis://a..b/0", "no host name"),
        ("redis://" + "h" * 70 + "/0", "no host name"),
        ("redis://host?ssl_cert_reqs=none", "ssl_cert_reqs needs rediss://"),
        ("rediss://host?ssl_cert_reqs=perhaps", "ssl_cert_reqs must be none, optional or required"),
        ("rediss://host?ssl_min_version=1", "ssl_min_version must be 771"),
        ("rediss://host?ssl_ca_certs=/no/such/file", "options cannot be used"),
        ("rediss://host?ssl_ca_path=/no/such/folder", "ssl_ca_path must be a folder"),
        ("rediss://host?ssl_certfile=/etc/hostname", "options cannot be used"),
        ("rediss://host?ssl_keyfile=/no/such/file", "options cannot be used"),
        ("rediss://host?ssl_ciphers=none", "options cannot be used"),
        ("rediss://host?ssl_ca_data=none", "options cannot be used"),
        ("unix://run/redis.sock", "names no socket"),
        ("unix://redis.sock", "names no socket"),
        ("unix:///run/a#b", "percent-encode"),
    ],
)
def test_what_would_fail_at_each_use_is_refused_in_one_line(url: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        check_url(url)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
