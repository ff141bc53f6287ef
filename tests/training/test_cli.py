import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from models.loading import Bundle
from tests.training.commands import refused, sella_train
from tests.training.micro import MICRO, Trained
from training.data.dataset import Dataset

TINY = ("--backbone", "tiny")


def config_file(folder: Path, **changes: Any) -> Path:
    path = folder / "micro.json"
    path.write_text(json.dumps({**MICRO, **changes}))
    return path


def test_fit_refuses_what_already_exists(trained: Trained, tmp_path: Path) -> None:
    line = refused("fit", "--data", trained.data, "--out", trained.bundle, "--config", config_file(tmp_path), *TINY)
    assert line == f"error: {trained.bundle} already exists; choose another path or remove it"


def test_fit_of_a_finished_run_resumes_to_its_report(trained: Trained, tmp_path: Path) -> None:
    """A process killed between its last rename and its exit has lost nothing."""
    options = (
        "fit",
        "--data",
        trained.data,
        "--out",
        trained.bundle,
        "--config",
        config_file(tmp_path),
        *TINY,
        "--resume",
    )
    result = sella_train(*options)
    assert result.exit_code == 0, result.output
    assert f"{trained.report['all']['auc']['value']:.4f}" in result.stdout
    assert "on valid, counts of train" in result.stdout and "on valid, live counts" in result.stdout
    assert "another configuration" in refused(*options, "--seed", 5)


def test_a_fit_that_ends_after_a_stage_goes_on_to_the_same_bundle(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    options = ("fit", "--data", trained.data, "--out", out, "--config", config_file(tmp_path), *TINY)
    for stage, left in (("adapt", "align.safetensors"), ("align", "project.safetensors")):
        ended = sella_train(*options, "--resume", "--until", stage)
        assert ended.exit_code == 0, ended.output
        assert f"ended after {stage}" in ended.stdout
        assert not out.exists() and not (tmp_path / "bundle.run" / left).exists()
    assert sella_train(*options, "--resume").exit_code == 0
    assert Bundle.open(out).id == Bundle.open(trained.bundle).id


def test_fit_refuses_a_run_folder_without_resume_and_one_of_another_run_with_it(
    trained: Trained, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    (tmp_path / "bundle.run").mkdir()
    identity = json.loads((trained.folder / "run.json").read_text())
    (tmp_path / "bundle.run" / "run.json").write_text(json.dumps(identity))
    common = ("fit", "--data", trained.data, "--out", out, "--config", config_file(tmp_path), *TINY)
    assert "add --resume" in refused(*common)
    assert "another configuration" in refused(*common, "--resume", "--seed", 5)
    other = identity | {"code": identity["code"] | {"source": "0" * 64}}  # as an upgrade in the middle of the run
    (tmp_path / "bundle.run" / "run.json").write_text(json.dumps(other))
    assert "another code" in refused(*common, "--resume")
    (tmp_path / "bundle.run" / "run.json").write_text(json.dumps(identity))
    assert "another backbone" in refused(*common, "--resume", "--backbone", "Qwen/Qwen2-0.5B")
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data": "nowhere"}, "nowhere: no such folder"),
        ({"--config": "nowhere.json"}, "nowhere.json: No such file"),
        ({"--out": "/proc/nowhere/bundle"}, "error: /proc/nowhere: No such file or directory"),
        ({"--backbone": "./no-model-here"}, "backbone ./no-model-here"),
        ({"--positive-above": "3"}, "--positive-above does not apply"),
        ({"--split-by": "0.8,0.1,0.1"}, "is split already"),
        ({"--split-by": "most of it"}, "most of it"),
    ],
)
def test_what_fit_cannot_use_is_one_line(
    trained: Trained, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    options = {"--data": trained.data, "--out": tmp_path / "b", "--config": config_file(tmp_path), "--backbone": "tiny"}
    flat = [str(part) for option in {**options, **changes}.items() for part in option]
    assert message in refused("fit", *flat)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("fit",), "Missing option '--data'"),
        (("evaluate", "--nonsense"), "No such option: --nonsense"),
        (("nonsense",), "No such command 'nonsense'"),
        (("prepare", "films", "--out", "x", "--users", "many"), "'--users'"),
        (("evaluate", "--bundle", "B", "--data", "D", "--device", "foo"), "--device foo: "),
        (("score", "--bundle", "B", "--pairs", "P", "--out", "o.csv", "--device", "cuda:99"), "--device cuda:99: "),
        (("precision", "--bundle", "B", "--data", "D", "--dtype", "bfloat16", "--device", "foo"), "--device foo: "),
        (("evaluate", "--bundle", "B", "--data", "D", "--live", "--delay", "inf"), "--delay inf: give seconds"),
        (
            ("evaluate", "--bundle", "B", "--data", "D", "--positive-above", "nan"),
            "--positive-above nan: give a number",
        ),
        (("evaluate", "--bundle", "B", "--data", "D", "--columns", "user=u"), "--columns user=u: "),
        (("fit", "--data", "D", "--out", "o", "--seed", 2**40), "'--seed'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    trained: Trained, tmp_path: Path, command: tuple[object, ...], message: str
) -> None:
    places = {"B": trained.bundle, "D": trained.data, "P": tmp_path / "pairs.csv", "o.csv": tmp_path / "o.csv"}
    (tmp_path / "pairs.csv").write_text("user_id,item_id\nu01,m01\n")
    assert message in refused(*(places.get(str(one), one) for one in command))


@pytest.mark.parametrize("value", ["Infinity", "NaN"])
def test_a_configuration_takes_no_number_that_is_not_finite(trained: Trained, tmp_path: Path, value: str) -> None:
    (tmp_path / "c.json").write_text(f'{{"adapt": {{"schedule": {{"epochs": {value}}}}}}}')
    line = refused("fit", "--data", trained.data, "--out", tmp_path / "b", "--config", tmp_path / "c.json", *TINY)
    assert "adapt.schedule.epochs" in line


@pytest.mark.parametrize(
    ("size", "command"),
    [
        (1_000, "fit --data D --out b --config C --backbone tiny"),
        (30_000, "fit --data D --out b --config C --backbone tiny"),
        (200_000, "fit --data D --out b --config C --backbone tiny"),
        (300, "score --bundle B --pairs P --out b.parquet"),
        (300, "prepare synthetic --out b"),
    ],
)
def test_a_disk_that_is_full_is_one_line(trained: Trained, tmp_path: Path, size: int, command: str) -> None:
    """Files can have no more than `size` bytes: the write fails as on a disk without room."""
    (tmp_path / "pairs.csv").write_text("user_id,item_id\n" + "u01,m01\n" * 50)
    places = {"D": trained.data, "C": config_file(tmp_path), "B": trained.bundle, "P": tmp_path / "pairs.csv"}
    places |= {name: tmp_path / name for name in ("b", "b.parquet")}
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); from training.cli import app; app()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(places.get(one, one)) for one in command.split())],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "File too large" in line
    assert not (tmp_path / "b" / "manifest.json").exists() and not (tmp_path / "b.parquet").exists()


def test_one_class_is_refused_before_anything_is_trained(trained: Trained, tmp_path: Path) -> None:
    data = tmp_path / "rated"
    data.mkdir()
    (data / "items.parquet").write_bytes((trained.data / "items.parquet").read_bytes())
    for name in ("train", "valid"):
        rows = pl.read_parquet(trained.data / f"{name}.parquet")
        rows.select("user_id", "item_id", "timestamp", rating=1 + 4 * pl.col("label")).write_parquet(
            data / f"{name}.parquet"
        )
    common = ("fit", "--data", data, "--out", tmp_path / "b", "--config", config_file(tmp_path), *TINY)
    for above, counts in ((5, "0 of label 1, 800 of label 0"), (0, "800 of label 1, 0 of label 0")):
        line = refused(*common, "--positive-above", above)
        assert f"train.parquet: holds one label alone (800 rows, {counts})" in line
        assert not (tmp_path / "b.run").exists()


def test_a_bundle_is_trained_where_no_title_has_a_year_and_valid_is_small(trained: Trained, tmp_path: Path) -> None:
    data = tmp_path / "small"
    data.mkdir()
    (data / "items.csv").write_text("item_id,title\na,The Sea\nb,The Wood\n")
    header = "user_id,item_id,label,timestamp\n"
    (data / "train.csv").write_text(header + "u,a,1,1500000000\nv,b,0,1500000001\n")
    (data / "valid.csv").write_text(header + "u,b,0,1500000010\nv,a,1,1500000011\n")
    result = sella_train("fit", "--data", data, "--out", tmp_path / "b", "--config", config_file(tmp_path), *TINY)
    assert result.exit_code == 0, result.output
    assert "valid.csv: 2 rows, 1 of label 1, are too few to fit the weights of score" in result.stdout
    assert "histories and counts of the bundle hold all 4 rows of train, valid" in result.stdout


def test_evaluate_prints_the_documented_json_and_nothing_else(trained: Trained) -> None:
    result = sella_train("evaluate", "--bundle", trained.bundle, "--data", trained.data, "--split", "test", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    groups = {name: report.pop(name) for name in ("all", "warm", "cold", "new items", "history")}
    assert set(report) == {"scorers", "score minus", "live", "delay"} and report["live"] is False
    assert list(report["scorers"]) == list(report["score minus"]) == ["raw", "collab", "rates", "boosting"]
    for part in report["scorers"].values():
        assert set(part) == {"auc", "uauc", "log_loss", "ece"}
    for part in groups.values():
        assert set(part) == {"auc", "uauc", "log_loss", "ece", "rows"}
        for metric in ("auc", "uauc", "log_loss", "ece"):
            assert set(part[metric]) == {"value", "low", "high"}
            assert part[metric]["low"] <= part[metric]["value"] <= part[metric]["high"]
    rows = {name: part["rows"] for name, part in groups.items()}
    assert rows["all"] == 200 == rows["warm"] + rows["cold"]


def test_evaluate_live_knows_more_with_less_delay(trained: Trained) -> None:
    def evaluated(*more: object) -> dict[str, Any]:
        common = ("evaluate", "--bundle", trained.bundle, "--data", trained.data, "--split", "test", "--json")
        result = sella_train(*common, *more)
        assert result.exit_code == 0, result.output
        report: dict[str, Any] = json.loads(result.stdout)
        return report

    live, late = evaluated("--live"), evaluated("--live", "--delay", 40 * 86_400)
    assert (live["live"], live["delay"], late["delay"]) == (True, 0, 40 * 86_400)
    assert live["scorers"]["rates"] != late["scorers"]["rates"]
    assert live["scorers"]["raw"] != late["scorers"]["raw"]  # a delay holds likes back from histories, too
    common = ("evaluate", "--bundle", trained.bundle, "--data", trained.data)
    assert "add --live" in refused(*common, "--delay", 5)


def test_evaluate_prints_the_verdict(trained: Trained, tmp_path: Path) -> None:
    common = ("evaluate", "--bundle", trained.bundle, "--data", trained.data, "--split")
    shown = sella_train(*common, "test", "--live").stdout
    assert "on test, live counts" in shown and "score minus it" in shown and "…" not in shown
    for name in ("score", "raw", "collab", "rates", "boosting"):
        assert f"│ {name} " in shown
    assert "score loses to " in shown
    assert "chosen on these rows: checkpoints, fusion." in sella_train(*common, "valid").stdout
    for name in ("items", "test"):
        (tmp_path / f"{name}.parquet").write_bytes((trained.data / f"{name}.parquet").read_bytes())
    alone = sella_train("evaluate", "--bundle", trained.bundle, "--data", tmp_path).stdout
    assert "boosting is left out: the data folder has no train split." in alone


def test_evaluate_prints_null_where_a_figure_is_undefined(trained: Trained, tmp_path: Path) -> None:
    for name in ("items", "train"):
        (tmp_path / f"{name}.parquet").write_bytes((trained.data / f"{name}.parquet").read_bytes())
    test = pl.read_parquet(trained.data / "test.parquet")
    test.filter(pl.col("label") == 1).unique("user_id", maintain_order=True).write_parquet(tmp_path / "test.parquet")
    result = sella_train("evaluate", "--bundle", trained.bundle, "--data", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    nothing = {"value": None, "low": None, "high": None}
    found = json.loads(result.stdout)["all"]
    assert found["auc"] == found["uauc"] == nothing and found["log_loss"]["value"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_precision_tells_what_another_type_changes(trained: Trained, dtype: str) -> None:
    arguments = ("--bundle", trained.bundle, "--data", trained.data, "--dtype", dtype)
    report = json.loads(sella_train("precision", *arguments, "--json").stdout)
    assert set(report["difference"]) == {"auc", "uauc", "log_loss"}
    moved = abs(report["difference"]["auc"]["value"] - (report["other"]["auc"] - report["own"]["auc"]))
    assert moved < 1e-9
    assert (report["worst"] == 0) is (dtype == "float32")
    assert report["worst"] < 0.1
    assert f"in {dtype}" in sella_train("precision", *arguments).stdout


def tied(data: Path, folder: Path) -> Path:
    """Write the data again with a negative of the same second behind each row."""
    folder.mkdir()
    (folder / "items.parquet").write_bytes((data / "items.parquet").read_bytes())
    for name in ("train", "valid"):
        rows = pl.read_parquet(data / f"{name}.parquet").head(200).with_row_index("row")
        shadows = rows.with_columns(label=pl.lit(0, rows.schema["label"]))
        both = pl.concat([rows, shadows]).sort("row", maintain_order=True)
        both.drop("row").write_parquet(folder / f"{name}.parquet")
    return folder


def test_fit_describes_the_data_reports_every_stage_and_stores_the_rule_for_ties(
    trained: Trained, tmp_path: Path
) -> None:
    data, out = tied(trained.data, tmp_path / "tied"), tmp_path / "bundle"
    frames = {name: pl.read_parquet(data / f"{name}.parquet") for name in ("train", "valid")}
    options = ("--config", config_file(tmp_path), "--ties", "file-order", *TINY)
    result = sella_train("fit", "--data", data, "--out", out, *options)
    assert result.exit_code == 0, result.output
    told = result.stdout.splitlines()
    for name, frame in frames.items():
        [row] = [line.split() for line in told if line.startswith(f"{name} ")]
        assert row[1:4] == [str(frame.height), *(str(frame[key].n_unique()) for key in ("user_id", "item_id"))]
        assert row[4] == f"{frame['label'].mean():.1%}"
        positives = int(frame["label"].sum())  # the shadow of each has it in its history by file order alone
        assert row[8] == str(positives)
        assert f"ties file-order: {positives} of 400 {name} rows get another history than by strict" in told
    for stage in ("pretrain", "adapt", "align", "project"):
        [first] = [place for place, line in enumerate(told) if line.startswith(f"{stage}: step 0 of ")]
        [last] = [place for place, line in enumerate(told) if line.startswith(f"{stage}: ") and "finished" in line]
        assert first < last and "rows a second" in told[last] and "loss" in told[last]
    assert Bundle.open(out).manifest.training["ties"] == "file-order"

    evaluate = ("evaluate", "--bundle", out, "--data", data, "--split", "valid", "--json")
    own, strict = sella_train(*evaluate), sella_train(*evaluate, "--ties", "strict")
    assert "of 400 valid rows get another history" in own.stderr and strict.stderr == ""
    assert json.loads(own.stdout)["scorers"]["raw"] != json.loads(strict.stdout)["scorers"]["raw"]
    # What fit reports of `score` was cross-fitted; the language model's own score is the same.
    reported = Bundle.open(out).manifest.metrics["scorers"]["raw"]["auc"]
    assert json.loads(own.stdout)["scorers"]["raw"]["auc"] == reported


def test_evaluate_uses_the_strict_rule_of_a_bundle_trained_so(trained: Trained, tmp_path: Path) -> None:
    data = tied(trained.data, tmp_path / "tied")
    common = ("--bundle", trained.bundle, "--data", data, "--split", "valid", "--json")
    own, strict, published = (
        sella_train("evaluate", *common, *more) for more in ((), ("--ties", "strict"), ("--ties", "file-order"))
    )
    assert own.stdout == strict.stdout != published.stdout
    assert own.stderr == "" and "ties file-order" in published.stderr
    told = sella_train("precision", *common, "--dtype", "float32", "--ties", "file-order")
    assert json.loads(told.stdout)["own"]["auc"] == pytest.approx(
        json.loads(published.stdout)["scorers"]["raw"]["auc"]["value"]
    )


def test_evaluate_names_a_split_that_is_not_there(trained: Trained) -> None:
    line = refused("evaluate", "--bundle", trained.bundle, "--data", trained.data, "--split", "tset")
    assert "'tset'" in line


def test_evaluate_shows_every_interval_whole(trained: Trained) -> None:
    shown = sella_train("evaluate", "--bundle", trained.bundle, "--data", trained.data).stdout
    assert "…" not in shown and shown.count("–") >= 12


def test_score_writes_what_it_was_asked_for(trained: Trained, tmp_path: Path) -> None:
    pairs = pl.read_parquet(trained.data / "test.parquet").select("user_id", "item_id").head(30)
    pairs.write_csv(tmp_path / "pairs.csv")
    common = ("score", "--bundle", trained.bundle, "--pairs", tmp_path / "pairs.csv", "--out", tmp_path / "out.parquet")
    result = sella_train(*common, "--chunk", 7)
    assert result.exit_code == 0, result.output
    assert pl.read_parquet(tmp_path / "out.parquet").select("user_id", "item_id").equals(pairs)
    assert "already exists" in refused(*common)


def test_score_refuses_a_word_it_does_not_know(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("user_id,item_id\nu01,gone\n")
    common = ("score", "--bundle", trained.bundle, "--pairs", tmp_path / "pairs.csv", "--out", tmp_path / "out.csv")
    result = sella_train(*common, "--on-unknown", "ignore")
    assert result.exit_code == 2 and "ignore" in result.stderr and "skip" in result.stderr
    assert "'gone'" in refused(*common)
    assert sella_train(*common, "--on-unknown", "skip").exit_code == 0


def test_inspect_shows_what_a_bundle_holds(trained: Trained) -> None:
    bundle = Bundle.open(trained.bundle)
    shown = sella_train("inspect", trained.bundle).stdout
    assert f"bundle {bundle.id}" in shown and f"{bundle.manifest.dimensions.users} users, 80 items" in shown
    assert all(name in shown for name in bundle.manifest.files)
    assert json.loads(sella_train("inspect", trained.bundle, "--json").stdout)["bundle_id"] == bundle.id


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "backbone/model.safetensors",
        "backbone/tokenizer.json",
        "backbone/config.json",
        "collab.safetensors",
        "semantic.safetensors",
        "projection.safetensors",
        "users.parquet",
        "items.parquet",
        "fusion.json",
        "fold_in.json",
    ],
)
def test_one_altered_byte_is_refused_and_its_file_named(copied: Path, name: str) -> None:
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert str(path) in refused("inspect", copied)
    assert str(path) in refused("prompt", "--bundle", copied, "--user", "u01", "--item", "m01")


def test_a_bundle_says_since_when_it_knows_each_user(trained: Trained, bundle: Bundle, dataset: Dataset) -> None:
    """So a service can tell whether all of it is from after a deletion."""
    rows = pl.concat(frame.select("user_id", "timestamp") for frame in dataset.splits.values())
    first = {user_id: float(at) for user_id, at in rows.group_by("user_id").agg(pl.col("timestamp").min()).iter_rows()}
    tables = bundle.tables()
    assert dict(zip(tables.user_ids, tables.user_since_U.tolist(), strict=True)) == first
    user = tables.user(tables.user_ids[0])
    assert user is not None
    assert user.may_be_used(first[user.user_id] - 0.5) and not user.may_be_used(first[user.user_id])


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert f"is {tmp_path} a bundle?" in refused("inspect", tmp_path)


def test_the_installed_command_is_quiet_where_nothing_is_wrong(trained: Trained) -> None:
    """As a user runs it: a process of its own, the console script, no warnings of libraries on stderr."""
    command = [Path(sys.executable).with_name("sella-train"), "prompt", "--bundle", trained.bundle, "--json"]
    done = subprocess.run(
        [*command, "--user", "u01", "--item", "m01"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert 0 < json.loads(done.stdout)["raw_score"] < 1
