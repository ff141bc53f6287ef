"""The whole path as a user walks it: made-up data, a fit, a server, requests, and the prompt that explains a score."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from tests.training.micro import MICRO, SIZES

SCRIPTS = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "SELLA_ENGINE_THREADS": "1"}


def sella_train(*arguments: object) -> str:
    """Run the installed command to its end; returns what it printed."""
    command = [str(SCRIPTS / "sella-train"), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data prepared and a bundle fitted, by the two commands."""
    folder = tmp_path_factory.mktemp("path")
    sizes = [part for name, size in SIZES.items() for part in (f"--{name.replace('_', '-')}", size)]
    sella_train("prepare", "synthetic", "--out", folder / "data", *sizes)
    items = pl.read_parquet(folder / "data" / "items.parquet")
    never = pl.DataFrame(
        {"item_id": [f"never-{one}" for one in range(20)], "title": [f"Unseen {one}" for one in range(20)]}
    )
    pl.concat([items, never], how="diagonal").write_parquet(folder / "data" / "items.parquet")
    (folder / "micro.json").write_text(json.dumps(MICRO))
    options = ("--config", folder / "micro.json", "--backbone", "tiny", "--out", folder / "bundle")
    sella_train("fit", "--data", folder / "data", *options)
    return folder


@dataclass(frozen=True)
class Server:
    """A served bundle."""

    process: subprocess.Popen[str]
    client: httpx.Client


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    command = [str(SCRIPTS / "sella-serve"), "run", "--bundle", str(folder / "bundle"), "--port", "0"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"on (http://[\d.]+:\d+)", process.stdout.readline())
        assert found, (folder / "server.log").read_text()
        with httpx.Client(base_url=found[1], timeout=60) as client:
            until = time.monotonic() + 120
            while client.get("/readyz").status_code != 200:
                assert process.poll() is None and time.monotonic() < until, (folder / "server.log").read_text()
                time.sleep(0.1)
            yield Server(process, client)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def explained(folder: Path, user_id: str, item_id: str, *more: str) -> dict[str, Any]:
    """Return what `sella-train prompt` says of a pair."""
    pair = ("--user", user_id, "--item", item_id, *more)
    described: dict[str, Any] = json.loads(sella_train("prompt", "--bundle", folder / "bundle", *pair, "--json"))
    return described


def test_what_was_trained_is_served_and_explained_with_one_score(folder: Path, server: Server) -> None:
    train, test = (pl.read_parquet(folder / "data" / f"{split}.parquet") for split in ("train", "test"))
    items = pl.read_parquet(folder / "data" / "items.parquet")["item_id"].to_list()
    warm_user = train["user_id"][0]
    cold_item = next(item for item in items if item not in set(train["item_id"]))
    new = {"item_id": "brand new", "title": "A Brand New Title"}
    candidates: list[Any] = [train["item_id"][0], cold_item, new, "never-7"]  # the last without any interaction

    ranked = server.client.post("/rank", json={"user_id": warm_user, "candidates": candidates})
    assert ranked.status_code == 200, ranked.text
    results = ranked.json()["results"]
    assert sorted(one["item_id"] for one in results) == sorted([candidates[0], cold_item, "brand new", "never-7"])
    assert [one["score"] for one in results] == sorted((one["score"] for one in results), reverse=True)

    pairs = [
        {"user_id": test["user_id"][0], "item_id": test["item_id"][0]},
        {"user_id": "nobody", "item_id": items[0], "history": items[1:4]},
    ]
    scored = server.client.post("/score", json={"pairs": pairs})
    assert scored.status_code == 200, scored.text

    by_item = {one["item_id"]: one for one in results}
    assert by_item["never-7"]["cold_item"] and not by_item["never-7"]["unknown_item"]
    answers = scored.json()["results"]
    for answer, described in (
        (by_item[candidates[0]], explained(folder, warm_user, candidates[0])),
        (by_item["never-7"], explained(folder, warm_user, "never-7")),
        (by_item["brand new"], explained(folder, warm_user, "brand new", "--title", "A Brand New Title")),
        (answers[0], explained(folder, pairs[0]["user_id"], pairs[0]["item_id"])),
        (answers[1], explained(folder, "nobody", items[0], "--history", ",".join(items[1:4]))),
    ):
        assert answer["raw_score"] == pytest.approx(described["raw_score"], abs=1e-5)
        assert answer["score"] == pytest.approx(described["score"], abs=1e-5)

    assert ranked.json()["bundle_id"] == scored.json()["bundle_id"]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
