import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from training.data.amazon import prepare_amazon
from training.data.dataset import DataError, load_dataset

TITLES = {"0001": "One, “quoted”", "0002": "Two é", "0003": "Three"}


def day(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def review(user: str, item: str, date: str, overall: float = 5.0) -> dict[str, Any]:
    """Return a review with the fields of the 2018 release."""
    return {
        "overall": overall,
        "verified": True,
        "reviewTime": date,
        "reviewerID": user,
        "asin": item,
        "style": {"Format:": " Hardcover"},
        "reviewText": "A long text.\nIn lines.",
        "unixReviewTime": day(date),
    }


def product(item: str, title: str | None) -> dict[str, Any]:
    return {"category": ["Books"], "asin": item} | ({} if title is None else {"title": title})


class Raw:
    """The two raw files, and where the folder goes."""

    def __init__(self, folder: Path) -> None:
        self.reviews, self.metadata, self.out = folder / "Books_5.json.gz", folder / "meta.json", folder / "out"
        self.products = [product(*pair) for pair in TITLES.items()]

    def write(self, reviews: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(one) + "\n" for one in reviews)
        self.reviews.write_bytes(gzip.compress(lines.encode()))
        self.metadata.write_text("".join(json.dumps(one) + "\n" for one in self.products))

    def prepare(self, reviews: list[dict[str, Any]], **options: Any) -> dict[str, int]:
        self.write(reviews)
        report = prepare_amazon(self.reviews, self.metadata, self.out, **{"min_interactions": 0, **options})
        return dict(report.dropped)

    def rows(self, split: str) -> list[tuple[str, str, int, int]]:
        return pl.read_parquet(self.out / f"{split}.parquet").rows()


@pytest.fixture
def raw(tmp_path: Path) -> Raw:
    return Raw(tmp_path)


def test_months_are_cut_11_to_a_half_to_a_half_and_other_years_dropped(raw: Raw) -> None:
    dates = [
        "2016-12-31",
        "2017-01-01",
        "2017-11-30",
        "2017-12-01",
        "2017-12-15",
        "2017-12-16",
        "2017-12-31",
        "2018-01-01",
    ]
    dropped = raw.prepare([review("u", "0001", date) for date in dates])
    times = [[row[3] for row in raw.rows(split)] for split in ("train", "valid", "test")]
    assert times == [[day(date) for date in dates[start : start + 2]] for start in (1, 3, 5)]
    assert dropped["review outside of 2017"] == 2


def test_half_of_decembers_rows_is_an_equal_count_in_time_then_file_order(raw: Raw) -> None:
    dates = ["2017-12-03", "2017-12-02", "2017-12-02", "2017-12-02", "2017-12-01"]
    raw.prepare([review(f"u{row}", "0001", date) for row, date in enumerate(dates)], halves="rows")
    assert [row[0] for row in raw.rows("valid")] == ["u4", "u1"]
    assert [row[0] for row in raw.rows("test")] == ["u2", "u3", "u0"]


def test_positive_is_above_four_stars_unless_told_otherwise(raw: Raw) -> None:
    reviews = [review("u", "0001", "2017-05-01", stars) for stars in (3.0, 4.0, 5.0)]
    raw.prepare(reviews)
    assert [row[2] for row in raw.rows("train")] == [0, 0, 1]
    raw.prepare(reviews, threshold=3)
    assert [row[2] for row in raw.rows("train")] == [0, 1, 1]


def test_users_need_over_20_reviews_of_titled_items_within_the_year(raw: Raw) -> None:
    def reviews(user: str, count: int, item: str = "0001", year: int = 2017) -> list[dict[str, Any]]:
        return [review(user, item, f"{year}-03-01")] * count

    dropped = raw.prepare(
        [
            *reviews("over", 21),
            *reviews("at", 20),
            *reviews("elsewhen", 20),
            *reviews("elsewhen", 1, year=2016),
            *reviews("untitled", 20),
            *reviews("untitled", 1, item="9999"),
        ],
        min_interactions=20,
    )
    assert {row[0] for row in raw.rows("train")} == {"over"}
    assert dropped == {
        "review outside of 2017": 1,
        "item without a title in the metadata": 1,
        "user or item with too few interactions": 60,
    }


def test_items_can_be_held_to_a_number_of_reviews_too_counted_before_users_are_dropped(raw: Raw) -> None:
    reviews = [review(user, item, "2017-03-01") for user, item in ("a1", "a1", "a2", "b1", "c3")]
    reviews = [{**one, "asin": f"000{one['asin']}"} for one in reviews]
    raw.prepare(reviews, min_interactions=1, min_item_interactions=2)
    assert [(row[0], row[1]) for row in raw.rows("train")] == [("a", "0001"), ("a", "0001")]


def test_items_without_a_usable_title_are_dropped_and_the_last_title_counts(raw: Raw) -> None:
    raw.products += [
        product("blank", " "),
        product("none", None),
        product("script", "<script>var d = new Date().getTime();"),
        product("0003", "Three, second edition"),
        product("0003", ""),
        product("unread", "Nobody reviewed this"),
    ]
    reviews = [review("u", item, "2017-03-01") for item in ("0003", "blank", "none", "script", "absent", "0002")]
    assert raw.prepare(reviews)["item without a title in the metadata"] == 4
    assert pl.read_parquet(raw.out / "items.parquet").rows() == [("0003", "Three, second edition"), ("0002", "Two é")]


def test_what_is_written_is_a_data_folder_that_keeps_ids_titles_and_repeats(raw: Raw) -> None:
    dates = ["2017-02-01", "2017-02-01", "2017-12-02"]
    raw.prepare([review("007", "0001", date) for date in dates])
    dataset = load_dataset(raw.out)
    assert dataset.items.rows() == [("0001", "One, “quoted”")]
    assert dataset.splits["train"].select("user_id", "item_id").rows() == [("007", "0001")] * 2
    assert "test" not in dataset.splits


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"unixReviewTime": None}, "Books_5.json.gz: column 'unixReviewTime', row 2: None is no number"),
        ({"overall": "five"}, "Books_5.json.gz: column 'overall', row 2: 'five' is no number"),
        ({"reviewerID": ""}, "Books_5.json.gz: column 'reviewerID', row 2: id '' has 0 characters"),
        ({"asin": 1.5}, "Books_5.json.gz: column 'asin', row 2: id 1.5 is a float; give a string or an integer"),
    ],
)
def test_spoilt_fields_are_told_with_file_column_and_row(raw: Raw, spoilt: dict[str, Any], message: str) -> None:
    good = review("u", "0001", "2017-03-01")
    with pytest.raises(DataError) as raised:
        raw.prepare([good, {**good, **spoilt}])
    assert str(raised.value).startswith(message)


def test_nothing_left_is_told_with_where_it_went(raw: Raw) -> None:
    with pytest.raises(DataError) as raised:
        raw.prepare([review("u", "0001", "2017-03-01"), review("u", "9999", "2017-03-01")], min_interactions=20)
    assert str(raised.value) == (
        "Books_5.json.gz: of 2 reviews none is left: 2 in 2017, 1 of these of items with a title, none of these of "
        "users and items with enough interactions; check --year, --min-interactions and the metadata"
    )


def test_missing_metadata_is_told_before_the_reviews_are_read(raw: Raw) -> None:
    raw.reviews.write_bytes(b"not JSON")
    with pytest.raises(DataError, match=r"meta\.json: no such file"):
        prepare_amazon(raw.reviews, raw.metadata, raw.out)


def test_the_release_of_2023_has_other_names_and_milliseconds(raw: Raw) -> None:
    def rating(user: str, item: str, date: str, stars: float) -> dict[str, Any]:
        return {
            "rating": stars,
            "title": "The title of a review, not of the product",
            "asin": "B0-A-VARIANT",
            "parent_asin": item,
            "user_id": user,
            "timestamp": day(date) * 1000 + 417,
            "helpful_vote": 0,
            "verified_purchase": True,
        }

    raw.products = [
        {"main_category": "Books", "title": title, "parent_asin": item, "average_rating": 4.5}
        for item, title in TITLES.items()
    ]
    ratings = [
        rating("u", "0001", "2017-03-01", 5.0),
        rating("v", "0002", "2017-12-02", 4.0),
        rating("u", "0003", "2017-12-20", 5.0),
        rating("u", "0003", "2023-01-01", 5.0),
    ]
    assert raw.prepare(ratings)["review outside of 2017"] == 1
    assert raw.rows("train") == [("u", "0001", 1, day("2017-03-01"))]
    assert raw.rows("valid") == [("v", "0002", 0, day("2017-12-02"))]
    assert raw.rows("test") == [("u", "0003", 1, day("2017-12-20"))]
    assert pl.read_parquet(raw.out / "items.parquet").rows() == sorted(TITLES.items())


def test_the_table_of_ratings_alone_of_2023_is_read(raw: Raw, tmp_path: Path) -> None:
    raw.write([])
    reviews = tmp_path / "Books.csv.gz"
    rows = f"u,0001,5.0,{day('2017-03-01') * 1000}\nv,0002,2.0,{day('2017-12-02') * 1000}\n"
    reviews.write_bytes(gzip.compress(f"user_id,parent_asin,rating,timestamp\n{rows}".encode()))
    prepare_amazon(reviews, raw.metadata, raw.out, min_interactions=0)
    assert raw.rows("train") == [("u", "0001", 1, day("2017-03-01"))]
    assert raw.rows("valid") == [("v", "0002", 0, day("2017-12-02"))]
    reviews.write_bytes(gzip.compress(f"user_id,parent_asin,rating,timestamp\n{rows}w,0002,,x\n".encode()))
    with pytest.raises(DataError, match=r"Books\.csv\.gz: column 'timestamp', row 3: None is no number"):
        prepare_amazon(reviews, raw.metadata, raw.out, min_interactions=0)


def test_the_metadata_of_2014_are_python_literals_and_are_not_run(raw: Raw) -> None:
    raw.write([review("u", item, "2017-03-01") for item in ("0001", "0002")])
    raw.metadata.write_text("{'asin': '0001', 'title': \"One's\", 'price': 3.5}\n{'asin': '0002', 'title': 'Two'}\n")
    prepare_amazon(raw.reviews, raw.metadata, raw.out, min_interactions=0)
    assert pl.read_parquet(raw.out / "items.parquet").rows() == [("0001", "One's"), ("0002", "Two")]
    raw.metadata.write_text("{'asin': __import__('os').getcwd(), 'title': 'Two'}\n")
    with pytest.raises(DataError, match=r"meta\.json: row 1 is not JSON"):
        prepare_amazon(raw.reviews, raw.metadata, raw.out, min_interactions=0)


def test_a_file_of_another_kind_is_told_with_what_it_holds(raw: Raw) -> None:
    with pytest.raises(DataError) as raised:
        raw.prepare([{"asin": "0001", "stars": 5, "timestamp": day("2017-03-01")}])
    assert str(raised.value) == (
        "Books_5.json.gz: row 1 has neither reviewerID nor user_id; found: asin, stars, timestamp; give reviews and"
        " metadata"
    )
