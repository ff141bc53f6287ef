"""The meaning of each column: text or typed values in, checked values out."""

import re
from datetime import UTC, datetime

import polars as pl

from models.ids import IdError, canonical_id
from models.titles import TitleError, clean_title
from training.data.errors import DataError
from training.data.tables import Table, quoted

# Seconds of the years 1 to 9999. Milliseconds fall outside from 1978 on, and so are told from seconds.
EARLIEST = datetime(1, 1, 1, tzinfo=UTC).timestamp()
LATEST = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
YEAR_1971 = datetime(1971, 1, 1, tzinfo=UTC).timestamp()
YEAR_1990 = datetime(1990, 1, 1, tzinfo=UTC).timestamp()
FLOAT_ID = r"^[+-]?\d+\.0+$"
# Dates that are written as one number, without separators; the years 1900 to 2100 alone.
NUMBER_DATES = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
DATE_DIGITS = r"^(19\d\d|20\d\d|2100)(\d\d)*$"


def parse_ids(table: Table, column: str) -> pl.Series:
    """Return a column of ids in canonical form (see `models.ids.canonical_id`).

    Raises:
        DataError: the column is neither text nor integer, or an id is null, empty or has no canonical form.
    """
    ids = table.frame[column]
    if isinstance(ids.dtype, (pl.Categorical, pl.Enum)) or ids.dtype.is_integer() or ids.dtype == pl.Null:
        ids = ids.cast(pl.String)
    if ids.dtype != pl.String:
        raise DataError(
            f"{table.file}: column '{column}' is of type {ids.dtype}; ids are strings or integers, so cast it"
        )
    table.reject(column, ids.is_null() | (ids == ""), "is no id", "fill it in or drop the row")
    reject_float_ids(table.file, column, bool(ids.str.contains(FLOAT_ID).all()), ids[0])
    for distinct in ids.unique(maintain_order=True):
        try:
            canonical_id(distinct)
        except IdError as error:
            row = (ids == distinct).arg_true()[0] + 1
            raise DataError(f"{table.file}: column '{column}', row {row}: {error}") from None
    return ids.alias(column)


def reject_float_ids(file: str, column: str, all_floats: bool, first: str) -> None:
    """Raise DataError if every id of a column ends in `.0`: a program has written integers as floats.

    No request would find such an id: clients send 123, and the table says "123.0".
    """
    if all_floats:
        raise DataError(
            f"{file}: column '{column}': every id ends in .0, as in {quoted(first)}: a program wrote integers as"
            " floats; write them as integers"
        )


def parse_titles(table: Table, column: str) -> pl.Series:
    """Return titles in the one form of `models.titles.clean_title`.

    Raises:
        DataError: a title is null or blank, or the column is not text.
    """
    titles = table.frame[column]
    if titles.dtype == pl.Null or isinstance(titles.dtype, (pl.Categorical, pl.Enum)):
        titles = titles.cast(pl.String)
    if titles.dtype != pl.String:
        raise DataError(f"{table.file}: column '{column}' is of type {titles.dtype}; give text")
    cleaned = pl.Series(column, [cleaned_title(one) for one in titles.to_list()], dtype=pl.String)
    table.reject(column, cleaned.is_null(), "is no title", "give every item a title or drop the item")
    return cleaned


def cleaned_title(value: object) -> str | None:
    """Return the form of a title that stands in a prompt; None for what is no title, such as a blank cell."""
    try:
        return clean_title(value) if isinstance(value, str) else None
    except TitleError:
        return None


def parse_timestamps(table: Table, column: str) -> pl.Series:
    """Return UTC seconds: Int64 when all are whole, else Float64.

    Numbers, and text that is a number, are seconds since 1970. Other text is ISO 8601; without a zone it is
    UTC. Parquet dates and datetimes are moments, those without a zone in UTC. A column of dates that are written as
    one number (20171130, 201711, 2017) is refused: read as seconds, they all lie in 1970.

    Raises:
        DataError: a timestamp is null, unreadable, outside the years 1 to 9999, or a date as one number.
    """
    values = table.frame[column]
    if values.dtype == pl.String:
        seconds = _parse_number_text(values)
        _reject_number_dates(table, column, seconds)
        texts = values.filter(seconds.is_null())
        parsed = {text: _parse_iso(text) for text in texts.unique() if text is not None}
        iso = pl.Series([parsed.get(text) for text in values], dtype=pl.Float64) if parsed else seconds
        seconds = seconds.fill_null(iso)
    elif values.dtype in (pl.Date, pl.Datetime):
        seconds = values.dt.epoch("us") / 1e6
    else:
        seconds = _parse_numbers(table, column)
        _reject_number_dates(table, column, seconds)
    mend = "give UTC seconds or ISO 8601, as in 2017-11-30T12:00:00Z"
    table.reject(column, seconds.is_null() | ~seconds.is_finite(), "is no timestamp", mend)
    outside = (seconds < EARLIEST) | (seconds > LATEST)
    table.reject(column, outside, "is outside the years 1 to 9999", "give seconds, not milliseconds")
    whole = bool((seconds == seconds.floor()).all())
    return (seconds.cast(pl.Int64) if whole else seconds).alias(column)


def _reject_number_dates(table: Table, column: str, numbers: pl.Series) -> None:
    """Raise DataError for dates written as one number, if the column has them alone or beside real seconds."""
    finite = numbers.filter(numbers.is_finite().fill_null(False))
    digits = finite.filter(finite == finite.floor()).cast(pl.Int64, strict=False).cast(pl.String)
    dates = {text: int(text) for text in digits.unique() if text is not None and _is_number_date(text)}
    if not dates:
        return
    dated = numbers.is_in(list(map(float, dates.values()))).fill_null(False)
    # A column of a few toy seconds may hold such a number by chance; one that reaches to 1990 holds seconds.
    others = finite.filter(~finite.is_in(list(map(float, dates.values()))))
    if len(others) == 0 or bool((others > YEAR_1990).any()):
        mend = "write it with separators, as in 2017-11-30, or give UTC seconds"
        table.reject(column, dated, "reads as a date, not as seconds since 1970", mend)


def _is_number_date(text: str) -> bool:
    form = NUMBER_DATES.get(len(text))
    if form is None or not re.match(DATE_DIGITS, text):
        return False
    try:
        datetime.strptime(text, form)
    except ValueError:
        return False
    return True


def parse_labels(table: Table) -> pl.Series:
    """Return column `label` as Int8 0 or 1; a boolean parquet column is one of labels.

    Raises:
        DataError: a label is anything else.
    """
    if table.frame["label"].dtype == pl.Boolean:
        numbers = table.frame["label"].cast(pl.Float64)
    else:
        numbers = _parse_numbers(table, "label")
    mend = "give 0 or 1, or name the column 'rating' and use --positive-above"
    table.reject("label", ~numbers.is_in([0.0, 1.0]), "is neither 0 nor 1", mend)
    return numbers.cast(pl.Int8).alias("label")


def parse_ratings(table: Table, positive_above: float) -> pl.Series:
    """Return column `label`, Int8: 1 where column `rating` is strictly above `positive_above`.

    Raises:
        DataError: a rating is not a finite number.
    """
    ratings = _parse_numbers(table, "rating")
    table.reject("rating", ~ratings.is_finite(), "is no finite number", "give a number or drop the row")
    return (ratings > positive_above).cast(pl.Int8).alias("label")


def parse_weights(table: Table) -> pl.Series:
    """Return column `weight` as Float32, 1.0 everywhere when the file has none.

    Raises:
        DataError: a weight is not a positive finite number in 32 bits.
    """
    if "weight" not in table.frame.columns:
        return pl.repeat(1.0, table.frame.height, dtype=pl.Float32, eager=True).alias("weight")
    weights = _parse_numbers(table, "weight").cast(pl.Float32)
    usable = weights.is_finite() & (weights > 0)
    table.reject("weight", ~usable, "is no positive finite number", "give a weight above 0 or drop the row")
    return weights.alias("weight")


def _parse_numbers(table: Table, column: str) -> pl.Series:
    """Return Float64 values, null where there is none that can be read."""
    values = table.frame[column]
    if values.dtype == pl.String:
        return _parse_number_text(values)
    if values.dtype.is_numeric() or values.dtype == pl.Null:
        return values.cast(pl.Float64)
    raise DataError(f"{table.file}: column '{column}' is of type {values.dtype}; give numbers")


def _parse_number_text(values: pl.Series) -> pl.Series:
    return values.str.strip_chars().cast(pl.Float64, strict=False)


def _parse_iso(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
