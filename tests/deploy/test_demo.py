"""The parts of the demo that need no training: the shown user, the messages about weights, the kept bundle."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from models.loading import Bundle
from training.data.films import GENRES, FilmsConfig, draw_film_tables, plant_films
from training.data.folder import write_folder

ROOT = Path(__file__).parents[2]
CONFIG = FilmsConfig()
RUNS = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/ran"
test "$1" != backbone && exit 0
echo "error: no address of the index could be reached" >&2
exit 2
"""


@pytest.fixture
def demo(tmp_path: Path) -> ModuleType:
    """The script, with its `sella-train` replaced by a program that records its arguments and downloads nothing."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "deploy" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BIN = tmp_path
    (tmp_path / "sella-train").write_text(RUNS)
    (tmp_path / "sella-train").chmod(0o755)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("films")
    write_folder(out, draw_film_tables(CONFIG))
    return out


def ran(demo: ModuleType) -> list[str]:
    file = demo.BIN / "ran"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_the_user_shown_likes_the_genres_named_and_the_candidates_are_of_both_sides(
    demo: ModuleType, data: Path
) -> None:
    items, train = pl.read_parquet(data / "items.parquet"), pl.read_parquet(data / "train.parquet")
    user, liked, disliked = demo.clearest_taste(train, items)
    world = plant_films(CONFIG)
    row = world.user_ids.index(user)
    taste = dict(zip(world.titles, world.trait_IT @ world.taste_UT[row], strict=True))
    chosen = demo.candidates(user, liked, disliked, items, data)
    assert len(chosen) == len(set(chosen)) == 2 * demo.FILMS_A_SIDE
    films = items.filter(pl.col("item_id").is_in(chosen)).with_columns(
        new=~pl.col("item_id").is_in(train["item_id"].implode()),
        liked=pl.col("genre").str.split(", ").list.first().is_in(liked),
    )
    # The planted probabilities of the two sides differ clearly, so a reader can judge the ranking.
    sides = {side: [taste[one] for one in films.filter(liked=side)["title"]] for side in (True, False)}
    assert len(sides[True]) == len(sides[False]) == demo.FILMS_A_SIDE
    assert min(sides[True]) > max(sides[False])
    for side in (True, False):
        assert films.filter(liked=side)["new"].sum() == demo.FILMS_A_SIDE // 2
    for split in ("train", "valid", "test"):
        rows = pl.read_parquet(data / f"{split}.parquet").filter(user_id=user)
        assert not set(rows["item_id"]) & set(chosen)


def test_no_candidate_is_of_both_sides(demo: ModuleType, data: Path) -> None:
    items = pl.read_parquet(data / "items.parquet")
    for turn in range(12):
        ring = [*GENRES[turn:], *GENRES[:turn]]
        sides = {*ring[:3]}, {*ring[6:9]}
        chosen = demo.candidates("u001", ring[:3], ring[6:9], items, data)
        for genres in items.filter(pl.col("item_id").is_in(chosen))["genre"].str.split(", "):
            assert sum(not side.isdisjoint(genres) for side in sides) == 1


def test_taste_is_likes_less_dislikes_and_not_how_much_was_seen(demo: ModuleType) -> None:
    clicks = {"much": [(4, 4)] * 3 + [(1, 0)] * 3, "clear": [(2, 0)] * 3 + [(0, 1)] * 3}
    rows = [
        (user, f"m{genre}", label)
        for user, counts in clicks.items()
        for genre, (likes, dislikes) in enumerate(counts)
        for label in [1] * likes + [0] * dislikes
    ]
    train = pl.DataFrame(rows, schema=["user_id", "item_id", "label"], orient="row")
    items = pl.DataFrame(
        {"item_id": [f"m{genre}" for genre in range(6)], "genre": [f"{genre}, x" for genre in "abcdef"]}
    )
    assert demo.clearest_taste(train, items) == ("clear", ["a", "b", "c"], ["d", "e", "f"])


def test_weights_that_cannot_be_fetched_are_one_line_with_the_way_round_and_status_2(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'deploy'); import demo; demo.BIN = Path(sys.argv[1]);"
        " demo.make_bundle(demo.BIN / 'demo', demo.BIN / 'films', 'smollm2-135m')"
    )
    (tmp_path / "sella-train").write_text(RUNS)
    (tmp_path / "sella-train").chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "the weights of smollm2-135m could not be fetched (no address of the index could be reached);"
        " to train a stand-in without knowledge instead: make demo DEMO_BACKBONE=tiny\n"
    )
    assert not any(line.startswith("fit") for line in (tmp_path / "ran").read_text().splitlines())


def test_a_bundle_is_used_again_for_its_own_backbone_alone(demo: ModuleType, bundle: Bundle, tmp_path: Path) -> None:
    folder, data = tmp_path / "demo", tmp_path / "demo.films"
    shutil.copytree(bundle.folder, folder)
    demo.made_with(folder).write_text("tiny")
    demo.make_bundle(folder, data, "tiny")
    assert ran(demo) == [f"prepare films --out {data}"] and (folder / "manifest.json").exists()
    demo.make_bundle(folder, data, "some/model")
    assert not folder.exists()
    assert ran(demo)[1] == f"fit --data {data} --backbone some/model --config demo --out {folder} --resume"


def test_a_run_that_was_stopped_goes_on(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "demo.run").mkdir()
    demo.made_with(tmp_path / "demo").write_text("tiny")
    demo.make_bundle(tmp_path / "demo", tmp_path / "films", "tiny")
    assert (tmp_path / "demo.run").exists() and len(ran(demo)) == 2


def test_a_bundle_of_an_older_format_or_of_an_older_demo_is_made_anew(demo: ModuleType, tmp_path: Path) -> None:
    bundle = tmp_path / "demo"
    for backbone in ("tiny", None):
        bundle.mkdir()
        (bundle / "manifest.json").write_text("{}")
        demo.made_with(bundle).unlink(missing_ok=True)
        if backbone:
            demo.made_with(bundle).write_text(backbone)
        demo.make_bundle(bundle, tmp_path / "films", "tiny")
        assert not bundle.exists()
        assert demo.made_with(bundle).read_text() == "tiny"


def test_the_areas_are_printed_for_all_rows_and_for_new_films(
    demo: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged(value: float | None) -> dict[str, object]:
        return {"rows": 7, "auc": {"value": value, "low": value and value - 0.1, "high": value and value + 0.1}}

    report = {
        "all": judged(0.7),
        "new items": judged(0.6),
        "live": False,
        "scorers": {"rates": judged(0.65), "collab": {**judged(0.64), "new items": judged(None)}},
    }
    demo.print_areas(report)
    first, _, *table = capsys.readouterr().out.splitlines()
    assert first == "AUC on test: 7 rows, 7 of them of new films (0.5 is chance)"
    assert [" ".join(line.split()) for line in table] == [
        "score 0.700 (0.600 to 0.800) 0.600 (0.500 to 0.700)",
        "rates 0.650 (0.550 to 0.750)",
        "collab 0.640 (0.540 to 0.740) –",
    ]
