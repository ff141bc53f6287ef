import pytest

from service.access.keys import KeyFileError, parse_keys

A, B = "a" * 16, "b" * 16


def test_a_key_is_found_by_itself_alone() -> None:
    ring = parse_keys(f"# clients\n\nshop:{A}\nmail:{B}:2.5  # slow\n", "keys")
    shop, mail = ring.find(A.encode()), ring.find(B.encode())
    assert shop is not None and (shop.name, shop.requests_per_s) == ("shop", None)
    assert mail is not None and (mail.name, mail.requests_per_s) == ("mail", 2.5)
    for other in (b"", A[:-1].encode(), (A + "a").encode(), A.upper().encode(), b"shop", b"\xff" * 16):
        assert ring.find(other) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys: holds no key"),
        ("# nothing\n", "keys: holds no key"),
        ("justaname", "line 1: not of the form"),
        (f"shop:{A}:1:2", "line 1: not of the form"),
        (f"a shop:{A}", "line 1: not of the form"),
        (f":{A}", "line 1: not of the form"),
        (f"x:{A}\nshop:{A[:-1]}", "line 2: the key of 'shop' must have 16"),
        (f"shop:{A}é", "line 1: the key of 'shop' must have 16"),
        (f"shop:{A}:0", "line 1: '0' is no number of requests"),
        (f"shop:{A}:nan", "line 1: 'nan' is no number of requests"),
        (f"shop:{A}:inf", "line 1: 'inf' is no number of requests"),
        (f"shop:{A}:soon", "line 1: 'soon' is no number of requests"),
        (f"shop:{A}\nshop:{B}", "line 2: the name 'shop' stands twice"),
        (f"shop:{A}\nmail:{A}", "line 2: 'mail' has the same key as 'shop'"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_without_its_key(text: str, message: str) -> None:
    with pytest.raises(KeyFileError, match=message) as caught:
        parse_keys(text, "keys")
    assert A[:-1] not in str(caught.value)


def test_a_key_cannot_be_printed() -> None:
    assert A not in repr(parse_keys(f"shop:{A}", "keys"))
