"""A small valid data folder, to be spoiled in one place by each test."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

ITEMS = "item_id,title\nA,Alpha\nB,Beta\nC,Gamma\n"
TRAIN = "user_id,item_id,label,timestamp\nu,A,1,10\nu,B,0,20\nv,A,1,15\n"
VALID = "user_id,item_id,label,timestamp\nu,C,1,30\nw,A,0,31\n"

DataFolder = Callable[..., Path]


@pytest.fixture
def data_folder(tmp_path: Path) -> DataFolder:
    """Write a data folder: files by name (`train_csv="…"`), text or a table; None leaves a default file out."""

    def write(**files: str | bytes | pl.DataFrame | None) -> Path:
        for name, content in {"items_csv": ITEMS, "train_csv": TRAIN, "valid_csv": VALID, **files}.items():
            path = tmp_path / name.replace("_", ".")
            if isinstance(content, pl.DataFrame):
                content.write_parquet(path)
            elif content is not None:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path

    return write
