from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from models.features import Floats
from models.loading import Bundle
from models.packs import ScoringGroup
from models.projected import SlotVectors
from models.scoring_model import ScoringModel
from training.batch import score_pairs
from training.data.errors import DataError
from training.evaluate import Scorer
from training.inspection import describe_prompt

Rows = dict[str, list[Any]]


class CountingModel(ScoringModel):
    """The real model, counting its calls; made to stop after `stop` of them."""

    def __init__(self, model: ScoringModel, stop: int | None = None) -> None:
        super().__init__(model.backbone, model.projections)
        self.calls, self.stop = 0, stop

    def logits(
        self, groups: Sequence[ScoringGroup], max_tokens: int = 4096, vectors: Sequence[SlotVectors] | None = None
    ) -> list[Floats]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return super().logits(groups, max_tokens, vectors)


@pytest.fixture(scope="module")
def pairs(scorer: Scorer) -> Rows:
    """Pairs of every kind of user and item the bundle knows, in no order, with repeats, and a user it does not."""
    rng = np.random.default_rng(0)
    users = rng.choice([*scorer.tables.user_ids, "stranger"], 60).tolist()
    return {"user_id": users, "item_id": rng.choice(list(scorer.tables.item_ids), 60).tolist()}


def write(path: Path, rows: Rows) -> Path:
    frame = pl.DataFrame(rows)
    frame.write_csv(path) if path.suffix == ".csv" else frame.write_parquet(path)
    return path


def read(path: Path) -> pl.DataFrame:
    return (
        pl.read_csv(path, schema_overrides={"user_id": pl.String}) if path.suffix == ".csv" else pl.read_parquet(path)
    )


def run(bundle: Bundle, scorer: Scorer, pairs: Path, out: Path, *, skip: bool = False, chunk: int = 20) -> pl.DataFrame:
    score_pairs(bundle, scorer, pairs, out, skip_unknown=skip, chunk=chunk)
    return read(out)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_every_pair_is_scored_as_its_prompt_alone_in_the_files_order(
    bundle: Bundle, scorer: Scorer, pairs: Rows, tmp_path: Path, suffix: str
) -> None:
    scored = run(bundle, scorer, write(tmp_path / f"pairs{suffix}", pairs), tmp_path / f"out{suffix}")
    assert scored.columns == ["user_id", "item_id", "score", "raw_score", "cold_user", "cold_item"]
    assert scored.select("user_id", "item_id").to_dict(as_series=False) == pairs
    for row in scored.head(20).iter_rows(named=True):
        alone = describe_prompt(bundle, scorer, row["user_id"], row["item_id"], None, None)
        assert alone["parts"]["intercept"] == bundle.fusion().live.intercept != bundle.fusion().static.intercept
        assert row["raw_score"] == pytest.approx(alone["raw_score"], abs=1e-5)
        assert row["score"] == pytest.approx(alone["score"], abs=1e-5)
        assert (row["cold_user"], row["cold_item"]) == (alone["cold_user"], alone["cold_item"])
    assert scored["cold_user"].any() and scored["cold_item"].any()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out{suffix}", f"pairs{suffix}"]


@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
def test_the_size_of_a_part_does_not_change_a_score(
    bundle: Bundle, scorer: Scorer, pairs: Rows, tmp_path: Path, chunk: int
) -> None:
    source = write(tmp_path / "pairs.parquet", pairs)
    whole = run(bundle, scorer, source, tmp_path / "whole.parquet", chunk=60)
    parted = run(bundle, scorer, source, tmp_path / "parted.parquet", chunk=chunk)
    np.testing.assert_allclose(parted["raw_score"], whole["raw_score"], atol=1e-5)
    assert parted.drop("raw_score", "score").equals(whole.drop("raw_score", "score"))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_stopped_run_resumes_with_the_same_bytes_and_without_scoring_again(
    bundle: Bundle, scorer: Scorer, pairs: Rows, tmp_path: Path, suffix: str, stop: int
) -> None:
    source = write(tmp_path / f"pairs{suffix}", pairs)
    run(bundle, scorer, source, tmp_path / f"whole{suffix}")
    out = tmp_path / f"out{suffix}"
    with pytest.raises(KeyboardInterrupt):
        run(bundle, replace(scorer, model=CountingModel(scorer.model, stop)), source, out)
    assert not out.exists()
    rest = CountingModel(scorer.model)
    run(bundle, replace(scorer, model=rest), source, out)
    assert rest.calls == 3 - stop
    assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_parts_of_other_pairs_are_not_taken_up(bundle: Bundle, scorer: Scorer, pairs: Rows, tmp_path: Path) -> None:
    source, out = tmp_path / "pairs.parquet", tmp_path / "out.parquet"
    write(source, {"user_id": pairs["user_id"][::-1], "item_id": pairs["item_id"][::-1]})
    with pytest.raises(KeyboardInterrupt):
        run(bundle, replace(scorer, model=CountingModel(scorer.model, 2)), source, out)
    write(source, pairs)
    assert run(bundle, scorer, source, out).select("user_id", "item_id").to_dict(as_series=False) == pairs


def test_parts_of_another_precision_are_not_taken_up(
    bundle: Bundle, scorer: Scorer, pairs: Rows, tmp_path: Path
) -> None:
    source, out = write(tmp_path / "pairs.parquet", pairs), tmp_path / "out.parquet"
    rounded = replace(scorer, model=bundle.model(dtype="bfloat16"))
    with pytest.raises(KeyboardInterrupt):
        run(bundle, replace(rounded, model=CountingModel(rounded.model, 2)), source, out)
    whole = run(bundle, scorer, source, tmp_path / "whole.parquet")
    assert run(bundle, scorer, source, out).equals(whole)


def test_an_unknown_item_with_a_title_is_scored_by_it_and_marked(
    bundle: Bundle, scorer: Scorer, tmp_path: Path
) -> None:
    user, known = scorer.tables.user_ids[0], scorer.tables.item_ids[0]
    rows = {"user_id": [user] * 3, "item_id": ["new", known, "new"], "title": ["A  New\tTitle", None, "A New Title"]}
    scored = run(bundle, scorer, write(tmp_path / "pairs.parquet", rows), tmp_path / "out.parquet")
    alone = describe_prompt(bundle, scorer, user, "new", None, "A New Title")
    assert scored["raw_score"][0] == pytest.approx(alone["raw_score"], abs=1e-5)
    assert scored["raw_score"][2] == scored["raw_score"][0]
    assert scored["cold_item"].to_list() == [True, False, True]


def test_an_unknown_item_without_a_title_is_an_error_that_names_file_row_and_mend(
    bundle: Bundle, scorer: Scorer, pairs: Rows, tmp_path: Path
) -> None:
    rows = {"user_id": pairs["user_id"], "item_id": [*pairs["item_id"][:41], "gone", *pairs["item_id"][42:]]}
    source = write(tmp_path / "some pairs.csv", rows)
    with pytest.raises(
        DataError, match=r"some pairs\.csv: column 'item_id', row 42: 'gone' is not in .*--on-unknown skip"
    ):
        run(bundle, scorer, source, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_skipped_pairs_stay_in_the_file_without_a_score(
    bundle: Bundle, scorer: Scorer, pairs: Rows, tmp_path: Path
) -> None:
    rows = {"user_id": pairs["user_id"][:4], "item_id": [pairs["item_id"][0], "gone", "gone too", pairs["item_id"][3]]}
    scored = run(bundle, scorer, write(tmp_path / "pairs.csv", rows), tmp_path / "out.parquet", skip=True)
    assert scored["raw_score"].is_null().to_list() == scored["score"].is_null().to_list() == [False, True, True, False]
    assert scored["cold_item"].to_list()[1:3] == [True, True]
    whole = run(
        bundle,
        scorer,
        write(tmp_path / "known.csv", {name: [values[0], values[3]] for name, values in rows.items()}),
        tmp_path / "known.parquet",
    )
    np.testing.assert_allclose(scored["raw_score"].drop_nulls(), whole["raw_score"], atol=1e-5)


def test_a_file_of_nothing_but_skipped_pairs_is_written(bundle: Bundle, scorer: Scorer, tmp_path: Path) -> None:
    rows = {"user_id": ["u01", "u02"], "item_id": ["gone", "gone"]}
    scored = run(bundle, scorer, write(tmp_path / "pairs.csv", rows), tmp_path / "out.csv", skip=True)
    assert scored.height == 2 and scored["score"].is_null().all()


def test_ids_of_a_csv_are_text_and_integers_of_a_parquet_their_decimal_form(
    bundle: Bundle, scorer: Scorer, tmp_path: Path
) -> None:
    item = scorer.tables.item_ids[0]
    (tmp_path / "pairs.csv").write_text(f"user_id,item_id\n007,{item}\n")
    write(tmp_path / "pairs.parquet", {"user_id": [7], "item_id": [item]})
    assert run(bundle, scorer, tmp_path / "pairs.csv", tmp_path / "a.parquet")["user_id"].to_list() == ["007"]
    assert run(bundle, scorer, tmp_path / "pairs.parquet", tmp_path / "b.parquet")["user_id"].to_list() == ["7"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.csv", "user_id,item\nu,i\n", r"pairs\.csv: column 'item_id' is missing; found: user_id, item"),
        ("pairs.csv", "user_id,item_id\n", r"pairs\.csv: holds no pairs"),
        ("pairs.csv", "", r"pairs\.csv: is empty; its first line names the columns"),
        ("pairs.csv", "user_id,item_id\nu,i,j\n", r"pairs\.csv: row 1: 3 fields, but the header has 2; put"),
        ("pairs.csv", "user_id,item_id\n,m01\n", r"pairs\.csv: column 'user_id', row 1: id '' has 0"),
        ("pairs.parquet", "no parquet", r"pairs\.parquet: cannot be read: "),
        ("pairs.tsv", "user_id\titem_id\n", r"pairs\.tsv: holds no pairs"),
        ("pairs.txt", "user_id,item_id\n", r"pairs\.txt: give a file that ends in \.parquet, \.csv"),
        ("pairs.csv", "user_id,item_id\n1.0,m01\n2.0,m01\n", r"pairs\.csv: column 'user_id': every id ends in \.0"),
    ],
)
def test_pairs_that_cannot_be_used_are_one_clear_line(
    bundle: Bundle, scorer: Scorer, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        run(bundle, scorer, tmp_path / name, tmp_path / "out.csv")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.csv").exists()


def test_pairs_that_cannot_be_read_leave_nothing(bundle: Bundle, scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("user_id,item_id\n")
    with pytest.raises(DataError, match="no pairs"):
        run(bundle, scorer, tmp_path / "pairs.csv", tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.csv"]


def test_an_unknown_item_under_two_titles_is_refused(bundle: Bundle, scorer: Scorer, tmp_path: Path) -> None:
    rows = {"user_id": ["u", "v", "w"], "item_id": ["new"] * 3, "title": ["A Fog", " A  Fog ", "A Frog"]}
    with pytest.raises(DataError, match=r"column 'title', row 3: 'new' is 'A Frog' here and 'A Fog' above"):
        run(bundle, scorer, write(tmp_path / "pairs.csv", rows), tmp_path / "out.csv")


def test_a_missing_file_and_a_result_that_exists_are_refused(
    bundle: Bundle, scorer: Scorer, pairs: Rows, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file"):
        run(bundle, scorer, tmp_path / "nowhere.csv", tmp_path / "out.csv")
    (tmp_path / "out.csv").write_text("precious")
    with pytest.raises(DataError, match=r"out\.csv already exists"):
        run(bundle, scorer, write(tmp_path / "pairs.csv", pairs), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "precious"


def test_progress_counts_up_to_every_pair(bundle: Bundle, scorer: Scorer, pairs: Rows, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    score_pairs(
        bundle,
        scorer,
        write(tmp_path / "pairs.csv", pairs),
        tmp_path / "out.csv",
        skip_unknown=False,
        chunk=25,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(25, 60), (50, 60), (60, 60)]
