import gzip
from pathlib import Path

import pytest

from training.data.errors import DataError
from training.data.raw import open_raw, read_json_lines, read_lines, require_files


def test_plain_and_gzip_files_give_the_same_rows_whatever_they_are_called(tmp_path: Path) -> None:
    content = "erste\r\n\nzwölfte\n".encode("latin-1")
    (tmp_path / "plain.gz").write_bytes(content)
    (tmp_path / "zipped").write_bytes(gzip.compress(content))
    for name in ("plain.gz", "zipped"):
        assert list(read_lines(tmp_path / name, "latin-1")) == [(1, "erste"), (3, "zwölfte")]


def test_a_file_is_read_as_its_rows_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "large.dat"
    path.write_bytes(b"a line of a large file\n" * 1_000_000)
    opened = []

    def watched(path: Path):  # type: ignore[no-untyped-def]
        opened.append(open_raw(path))
        return opened[0]

    rows = read_lines(path, "latin-1", watched)
    assert next(rows) == (1, "a line of a large file")
    assert opened[0].tell() <= 1 << 20
    rows.close()  # type: ignore[attr-defined]
    assert opened[0].closed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "r.json: row 2 is not JSON (Expecting value"),
        (b"[1]\n", "r.json: row 1 is not a JSON object; give one object a line"),
        (b'{"a": 1}\n\xff\n', "r.json: row 2 is not utf-8; get the file again"),
        (gzip.compress(b'{"a": 1}\n' * 9)[:-9], "r.json: row "),
        (b"\x1f\x8bnot gzip", "r.json: row 1: cannot be read ("),
    ],
)
def test_damaged_files_are_told_with_the_row(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        list(read_json_lines(path))
    assert str(raised.value).startswith(message)


def test_missing_files_are_told_before_any_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: no such file; unpack the raw data set there or give its path"):
        require_files(tmp_path / "none")
