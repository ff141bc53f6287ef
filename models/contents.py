"""What a bundle's files must hold; a bundle whose files do not is refused with one line that names the file.

A file with the right hash may still hold wrong values: the hash says who wrote it, not what was written.

Shapes: U users, I items, C = d_C, D = d_L.
"""

import io
import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from models.bundle import BundleError, Dimensions
from models.fusion import Fusion
from models.template import TemplateConfig, window_start

Floats = NDArray[np.float32]
Raw = NDArray[np.uint8]

TEXT, FLAG, WHOLE, NUMBER = pl.String(), pl.Boolean(), pl.Int64(), pl.Float64()
Columns = Mapping[str, pl.DataType]
Value = TypeVar("Value")
COUNTS: Columns = {"impressions": WHOLE, "positives": WHOLE}
HISTORY = {"history": "stored items", "history_times": "times"}
OUTCOMES = {"outcome_items": "outcomes", "outcome_labels": "labels", "outcome_times": "times"}
USERS: Columns = {
    "user_id": TEXT,
    "trained": FLAG,
    "history": pl.List(TEXT),
    "history_times": pl.List(NUMBER),
    "history_total": WHOLE,
    "outcome_items": pl.List(TEXT),
    "outcome_labels": pl.List(FLAG),
    "outcome_times": pl.List(NUMBER),
    "train_impressions": WHOLE,
    "since": NUMBER,
    **COUNTS,
}
ITEMS: Columns = {"item_id": TEXT, "title": TEXT, "trained": FLAG, **COUNTS}
HEADER_BYTES = 100 * 2**20  # safetensors' own limit


class FoldIn(BaseModel):
    """The numbers of `UserPrior`, as fold_in.json holds them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: FiniteFloat
    noise: Annotated[FiniteFloat, Field(gt=0)]
    outcome_noise: Annotated[FiniteFloat, Field(gt=0)]
    strength: Annotated[FiniteFloat, Field(ge=0)]
    drift_variance: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    drift_seconds: Annotated[FiniteFloat, Field(gt=0)] = 1.0


def read_users(raw: Raw, path: Path, rows: int, template: TemplateConfig, item_ids: pl.Series) -> pl.DataFrame:
    """Return users.parquet, checked.

    Raises:
        BundleError: a column, a number of rows, an id, a count, a history or an outcome that cannot be served.
    """
    users = _read_frame(raw, path, USERS, rows)
    _check_ids(users["user_id"], path)
    _check_counts(users, path, "user_id", ("history_total", "train_impressions"))
    for columns in (HISTORY, OUTCOMES):
        _check_lists(users, path, columns, item_ids)
    _check_histories(users, path, template)
    return users


def read_items(raw: Raw, path: Path, rows: int) -> pl.DataFrame:
    """Return items.parquet, checked.

    Raises:
        BundleError: a column, a number of rows, an id or a count that cannot be served.
    """
    items = _read_frame(raw, path, ITEMS, rows)
    _check_ids(items["item_id"], path)
    _check_counts(items, path, "item_id", ())
    return items


def read_collab(raw: Raw, path: Path, sizes: Dimensions) -> dict[str, Floats]:
    """Return the tensors of collab.safetensors; raises BundleError as `read_tensors`."""
    users, items, width = sizes.users, sizes.items, sizes.d_collab
    return read_tensors(
        raw,
        path,
        {
            "user_vectors": (users, width),
            "item_vectors": (items, width),
            "fold_vectors": (items, width),
            "prior_mean": (width,),
            "prior_covariance": (width, width),
        },
    )


def read_semantic(raw: Raw, path: Path, sizes: Dimensions) -> dict[str, Floats]:
    """Return the tensors of semantic.safetensors; raises BundleError as `read_tensors`."""
    return read_tensors(
        raw,
        path,
        {
            "vectors": (sizes.items, sizes.d_model),
            "map_center": (sizes.d_model,),
            "map_weight": (sizes.d_model, sizes.d_collab),
            "map_offset": (sizes.d_collab,),
        },
    )


def read_fold_in(raw: Raw, path: Path) -> FoldIn:
    """Return the numbers of fold_in.json; raises BundleError where one cannot be used."""
    return _told(path, lambda: FoldIn.model_validate_json(raw.tobytes()))


def read_fusion(raw: Raw, path: Path) -> Fusion:
    """Return the weights of fusion.json; raises BundleError where one cannot be used."""
    return _told(path, lambda: Fusion.model_validate_json(raw.tobytes()))


def read_tensors(raw: Raw, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats]:
    """Return the named tensors of a safetensors file as views of its bytes.

    Raises:
        BundleError: a tensor is missing, has another shape or type than float32, or holds a value that is not finite.
    """
    header, start = _header(raw, path)
    return {name: _tensor(raw[start:], path, name, header.get(name), shape) for name, shape in shapes.items()}


def _header(raw: Raw, path: Path) -> tuple[dict[str, object], int]:
    """Return a safetensors file's header, and where its data begin."""
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if length <= min(HEADER_BYTES, len(raw) - 8):
        try:
            header = json.loads(raw[8 : 8 + length].tobytes())
            if isinstance(header, dict):
                return header, 8 + length
        except (ValueError, RecursionError):
            pass
    raise BundleError(f"{path}: not a safetensors file")


def _tensor(data: Raw, path: Path, name: str, entry: object, shape: tuple[int, ...]) -> Floats:
    if not isinstance(entry, dict):
        raise BundleError(f"{path}: tensor '{name}' is missing")
    if entry.get("dtype") != "F32" or entry.get("shape") != list(shape):
        found = f"{entry.get('dtype')} of shape {entry.get('shape')}"
        raise BundleError(f"{path}: tensor '{name}' is {found}; the manifest's dimensions ask for F32 {list(shape)}")
    begin, end = entry.get("data_offsets", (0, -1))
    if not 0 <= begin <= end <= len(data) or end - begin != 4 * prod(shape):
        raise BundleError(f"{path}: tensor '{name}' lies outside the file")
    table: Floats = np.frombuffer(data[begin:end].data, np.float32).reshape(shape)
    # NaN passes through both; unlike `isfinite`, they make no table of their own.
    if table.size and not np.isfinite([table.min(), table.max()]).all():
        raise BundleError(f"{path}: tensor '{name}' holds a value that is not finite")
    return table


def _read_frame(raw: Raw, path: Path, columns: Columns, rows: int) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(io.BytesIO(raw.data))
    except Exception as error:  # polars also raises what its Rust code panics with
        raise BundleError(f"{path}: not a parquet file: {(str(error).splitlines() or [''])[0]}") from error
    for name, wanted in columns.items():
        if name not in frame.columns:
            raise BundleError(f"{path}: column '{name}' is missing; train the bundle again")
        if not _alike(frame.schema[name], wanted):
            raise BundleError(f"{path}: column '{name}' is {frame.schema[name]}; expected {wanted}")
    frame = frame.select(pl.col(name).cast(wanted) for name, wanted in columns.items())
    for name in columns:
        if frame[name].null_count():
            row = frame[name].is_null().arg_max()
            raise BundleError(f"{path}: column '{name}', row {(row or 0) + 1}: no value")
    if frame.height != rows:
        raise BundleError(f"{path}: {frame.height} rows; the manifest's dimensions say {rows}")
    return frame


def _alike(found: pl.DataType, wanted: pl.DataType) -> bool:
    """Return whether a column's type is the wanted one but for the number of its bits."""
    if isinstance(wanted, pl.List):
        # A column of empty lists alone has no inner type.
        return isinstance(found, pl.List) and (_alike(_inner(found), _inner(wanted)) or _inner(found) == pl.Null)
    return found == wanted or (wanted == WHOLE and found.is_integer()) or (wanted == NUMBER and found.is_float())


def _inner(lists: pl.List) -> pl.DataType:
    inner = lists.inner
    return inner if isinstance(inner, pl.DataType) else inner()


def _check_ids(ids: pl.Series, path: Path) -> None:
    if ids.n_unique() != len(ids):
        twice = ids.filter(ids.is_duplicated())[0]
        raise BundleError(f"{path}: column '{ids.name}' holds {twice!r} more than once")
    if (ids == "").any():
        raise BundleError(f"{path}: column '{ids.name}' holds an empty id")


def _check_counts(frame: pl.DataFrame, path: Path, id_column: str, others: tuple[str, ...]) -> None:
    for name in (*COUNTS, *others):
        _refuse_rows(frame, path, id_column, frame[name] < 0, f"a negative '{name}'")
    more = frame["positives"] > frame["impressions"]
    _refuse_rows(frame, path, id_column, more, "more positives than impressions")


def _check_lists(users: pl.DataFrame, path: Path, columns: Mapping[str, str], item_ids: pl.Series) -> None:
    """Refuse lists of different lengths, without a value, with a time that is not finite or with an unknown item.

    `columns` says what each column's values are called.
    """
    lengths = users.select("user_id", *(pl.col(name).list.len() for name in columns))
    first, *others = columns
    unlike = lengths.filter(pl.any_horizontal(pl.col(name) != pl.col(first) for name in others))
    if unlike.height:
        user_id, *counted = unlike.row(0)
        *told, last = (f"{count} {noun}" for count, noun in zip(counted, columns.values(), strict=True))
        raise BundleError(f"{path}: user {user_id!r} has {', '.join(told)} and {last}")
    for name, noun in columns.items():
        values = users[name].explode(empty_as_null=False)
        if values.null_count():
            holes = users[name].list.drop_nulls().list.len() != users[name].list.len()
            _refuse_rows(users, path, "user_id", holes, f"{noun} without a value")
        if USERS[name] == pl.List(NUMBER) and not values.is_finite().all():
            wrong = users[name].list.eval(pl.element().is_finite().not_()).list.any()
            _refuse_rows(users, path, "user_id", wrong, f"{noun} that are not finite")
        if USERS[name] == pl.List(TEXT):
            unknown = values.filter(~values.is_in(item_ids.implode()))
            if len(unknown):
                raise BundleError(
                    f"{path}: {noun[:-1].split()[0]} of item {unknown[0]!r}, which is not in items.parquet"
                )


def _check_histories(users: pl.DataFrame, path: Path, template: TemplateConfig) -> None:
    """Refuse a stored history that is too short for the template's window, or longer than the whole."""
    starts = {total: window_start(total, template) for total in users["history_total"].unique().to_list()}
    told = users.select(
        "user_id",
        "history_total",
        stored=pl.col("history").list.len().cast(pl.Int64),
        wanted=pl.col("history_total") - pl.col("history_total").replace_strict(starts, return_dtype=pl.Int64),
    )
    short = told.filter(pl.col("stored") < pl.col("wanted"))
    for user_id, _, stored, wanted in short.head(1).iter_rows():
        raise BundleError(f"{path}: user {user_id!r} has {stored} stored items; the window needs {wanted}")
    long = told["stored"] > told["history_total"]
    _refuse_rows(users, path, "user_id", long, "more stored items than 'history_total'")


def _refuse_rows(frame: pl.DataFrame, path: Path, id_column: str, wrong: pl.Series, told: str) -> None:
    if wrong.any():
        raise BundleError(f"{path}: {id_column.removesuffix('_id')} {frame.filter(wrong)[id_column][0]!r} has {told}")


def _told(path: Path, read: Callable[[], Value]) -> Value:
    """Return what is read; pydantic's error becomes one line."""
    try:
        return read()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path}: {where or 'not JSON'}: {first['msg']}") from error
