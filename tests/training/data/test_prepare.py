import json
import re
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner, Result

from training.data.dataset import load_dataset
from training.data.films import FilmsConfig, planted_film_probability
from training.data.prepare import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_synthetic_writes_a_folder_and_prints_its_sizes(tmp_path: Path) -> None:
    out = tmp_path / "data"
    sizes = ["--users", 30, "--items", 40, "--train-rows", 200, "--valid-rows", 40, "--test-rows", 40]
    result = run("synthetic", "--out", out, *sizes, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert load_dataset(out).splits["train"].height == 200
    assert "40 items in the catalogue" in " ".join(result.stdout.split())
    assert "200" in result.stdout
    assert "AUC of the planted probabilities on valid, the best to expect: 0." in result.stdout


def test_films_writes_a_folder_and_prints_what_can_be_reached_on_new_films(tmp_path: Path) -> None:
    out = tmp_path / "data"
    sizes = ["--users", 60, "--train-rows", 1500, "--valid-rows", 300, "--test-rows", 300]
    result = run("films", "--out", out, *sizes, "--seed", 3)
    assert result.exit_code == 0, result.output
    dataset = load_dataset(out)
    assert [frame.height for frame in dataset.splits.values()] == [1500, 300, 300]
    test = dataset.splits["test"]
    new = test.join(dataset.splits["train"], on="item_id", how="anti").height
    [line] = [line for line in result.stdout.splitlines() if line.startswith("AUC on test")]
    found = re.search(
        r"planted probabilities (0\.\d+), .* on the (\d+) rows of new films 0\.\d+; popularity alone 0", line
    )
    assert found is not None and int(found[2]) <= new
    best = roc_auc_score(
        test["label"].to_numpy(),
        planted_film_probability(FilmsConfig(users=60, train_rows=1500, valid_rows=300, test_rows=300, seed=3), test),
    )
    assert float(found[1]) == pytest.approx(best, abs=1e-4)


def test_movielens_reports_what_was_dropped(tmp_path: Path) -> None:
    (tmp_path / "movies.dat").write_text("1::Toy of Stone (1995)::Drama\n")
    moments = (956703932, 991400000, 1018000000)
    (tmp_path / "ratings.dat").write_text("".join(f"1::1::5::{moment}\n" for moment in moments))
    result = run("movielens", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "dropped 1 rows: month outside of train, valid and test" in result.stdout
    assert list(load_dataset(tmp_path / "out").splits) == ["train", "valid"]


def test_amazon_takes_its_rules_from_the_options(tmp_path: Path) -> None:
    review = {"reviewerID": "u", "asin": "a", "overall": 4.0, "unixReviewTime": 1451606400}
    (tmp_path / "reviews.json").write_text(json.dumps(review))
    (tmp_path / "meta.json").write_text(json.dumps({"asin": "a", "title": "A"}))
    files = ["--reviews", tmp_path / "reviews.json", "--metadata", tmp_path / "meta.json", "--out", tmp_path / "out"]
    result = run("amazon", *files, "--year", 2016, "--min-interactions", 0, "--threshold", 3, "--halves", "rows")
    assert result.exit_code == 0, result.output
    assert load_dataset(tmp_path / "out", require=("train",)).splits["train"]["label"].to_list() == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("movielens", "nowhere"), "error: nowhere/ratings.dat: no such file; unpack the raw data set there"),
        (("synthetic", "--users", 1), "error: synthetic: users: Input should be greater than or equal to 2"),
        (("films", "--users", 5), "error: films: train_rows 16000 exceed half of"),
        (("synthetic", "--users", 5), "error: synthetic: train_rows 12000 exceed half of"),
        (("amazon", "--reviews", "r", "--metadata", "m"), "error: r: no such file; unpack the raw data set there"),
    ],
)
def test_a_problem_is_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
