import csv
import gzip
import io
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import tables
from training.data.errors import DataError
from training.data.tables import Table, find_table, read_table

# Anything that UTF-8 can hold, with what breaks careless CSV readers drawn often.
NASTY = st.text(st.one_of(st.sampled_from('",\n\r\t \\;|\u2028é日\0\ufeff'), st.characters(codec="utf-8")), max_size=12)


@given(rows=st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=8), end=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=150, deadline=None)
def test_csv_values_come_back_as_they_were_written(rows: list[tuple[str, str]], end: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "items.csv")
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
            writer.writerows([("item_id", "title"), *rows])
        assert read_table(path, ["item_id", "title"]).frame.rows() == rows


@given(rows=st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_csv_written_by_polars_comes_back(rows: list[tuple[str, str]]) -> None:
    frame = pl.DataFrame(rows, schema={"item_id": pl.String, "title": pl.String}, orient="row")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "items.csv")
        frame.write_csv(path, quote_style="non_numeric")
        assert read_table(path, ["item_id", "title"]).frame.rows() == rows


def test_csv_values_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n007,1.0\n1e3,\n")
    assert read_table(path, ["item_id", "title"]).frame.rows() == [("007", "1.0"), ("1e3", "")]


def test_byte_order_mark_blank_lines_and_other_columns_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_bytes(b"\xef\xbb\xbfitem_id,price,title\r\n\r\nA,3,Alpha\r\n\r\n")
    assert read_table(path, ["title", "item_id"]).frame.to_dicts() == [{"title": "Alpha", "item_id": "A"}]


def test_rows_are_read_in_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CSV_ROWS_AT_ONCE", 3)
    path = tmp_path / "items.csv"
    path.write_text("item_id\n" + "".join(f"{row}\n" for row in range(10)))
    assert read_table(path, ["item_id"]).frame["item_id"].to_list() == [str(row) for row in range(10)]


def test_optional_columns_are_read_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("user_id,weight\nu,2\n")
    assert read_table(path, ["user_id"], ["weight", "rating"]).frame.columns == ["user_id", "weight"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv: is empty; its first line names the columns"),
        (b"\xef\xbb\xbf", "t.csv: is empty; its first line names the columns"),
        (b"a,b\n", "t.csv: holds no rows; add rows or remove the file"),
        (b"a,name\n1,2\n", "t.csv: column 'b' is missing; found: a, name"),
        (b"a,b,b\n1,2,3\n", "t.csv: column 'b' appears 2 times; keep one"),
        (b"a,b\n1,2\n\n3,4,5\n", "t.csv: row 2: 3 fields, but the header has 2; put fields that hold a comma"),
        (b'a,b\n1,2\n3,"4\n5,6\n', "t.csv: row 2: unexpected end of data; close each double quote"),
        (b'a,b\n1,"2" 3\n', "t.csv: row 1: ',' expected after '\"'; close each double quote"),
        (b"a,b\n1,2\n3,caf\xe9\n", "t.csv: line 3 is not UTF-8; save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "t.csv: line 1 is not UTF-8; save it as UTF-8"),
    ],
)
def test_csv_problems_name_the_file_and_the_row(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_table(path, ["a", "b"])
    assert str(raised.value).startswith(message)


def test_parquet_with_any_one_byte_changed_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pl.DataFrame({"a": ["x", "y"], "b": [1, 2]}).write_parquet(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_table(path, ["a", "b"])
        except DataError as error:
            assert "\n" not in str(error)
            assert str(error).startswith("t.parquet: ")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_what_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"t\.parquet: is not a readable parquet file"):
        read_table(path, ["a"])


def test_missing_parquet_column_is_told_with_those_found(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": ["A"], "name": ["Alpha"]}).write_parquet(path)
    with pytest.raises(DataError) as raised:
        read_table(path, ["item_id", "title"])
    assert str(raised.value) == "items.parquet: column 'title' is missing; found: item_id, name"


def test_a_table_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    assert find_table(tmp_path, "items") is None
    (tmp_path / "items.csv").touch()
    assert find_table(tmp_path, "items") == tmp_path / "items.csv"
    (tmp_path / "items.parquet").touch()
    with pytest.raises(DataError, match=r"both items\.parquet and items\.csv are there; remove one of them"):
        find_table(tmp_path, "items")


def test_reject_names_the_first_row_and_how_many_share_it() -> None:
    table = Table("train.csv", pl.DataFrame({"label": ["1", "2", "x" * 99]}))
    table.reject("label", pl.Series([False, False, False]), "is bad", "mend it")
    with pytest.raises(DataError) as one:
        table.reject("label", pl.Series([False, False, True]), "is bad", "mend it")
    assert str(one.value) == f"train.csv: column 'label', row 3: '{'x' * 40}'… is bad; mend it"
    with pytest.raises(DataError) as two:
        table.reject("label", pl.Series([False, True, None]), "is bad", "mend it")
    assert str(two.value) == "train.csv: column 'label', row 2: '2' is bad; mend it (2 rows have this problem)"


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".tsv.gz"])
def test_any_usual_delimiter_is_read_plain_or_gzip(tmp_path: Path, delimiter: str, suffix: str) -> None:
    rows = [("A", "All; of | this,\tquoted"), ("B", 'He said "no"\ntwice')]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([("item_id", "title"), *rows])
    path = tmp_path / f"items{suffix}"
    content = ("\ufeff" + text.getvalue()).encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    assert find_table(tmp_path, "items") == path
    assert read_table(path, ["item_id", "title"]).frame.rows() == rows


def test_the_delimiter_is_the_one_that_gives_the_wanted_columns(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id;title;a,b,c,d\nA;Alpha;x\n")
    assert read_table(path, ["item_id", "title"]).frame.rows() == [("A", "Alpha")]


def test_a_damaged_gzip_file_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "items.csv.gz"
    whole = gzip.compress(b"item_id,title\n" + b"A,Alpha\n" * 9999)
    for content in (whole[:-30], b"item_id,title\nA,Alpha\n", whole[:40] + bytes(60) + whole[100:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"items\.csv\.gz: "):
            read_table(path, ["item_id", "title"])
