"""`make demo`: train a bundle on generated clicks on real films, serve it, rank films for one user, print its AUC.

It runs the same commands as a user. The bundle and its data stay in `bundles/`, and the next demo uses them again.
`DEMO_BACKBONE` names a language model other than SmolLM2, for example `tiny`; the demo then trains a new bundle.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import polars as pl

from models.bundle import BundleError, read_manifest

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
BIN = Path(sys.executable).parent
# The demo downloads the weights of this backbone; `sella-train fit` finds any other backbone itself.
FETCHED = "smollm2-135m"
LIKED_SHOWN = 8
GENRES_A_SIDE = 3
FILMS_A_SIDE = 6
READY_SECONDS = 120


def main() -> int:
    """Run the demo; returns the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--once", action="store_true", help="stop after the request and the evaluation")
    arguments.add_argument("--port", type=int, default=8000)
    options = arguments.parse_args()
    bundle, data = BUNDLES / "demo", BUNDLES / "demo.films"
    make_bundle(bundle, data, os.environ.get("DEMO_BACKBONE") or FETCHED)
    port = options.port if is_free(options.port) else free_port()
    server = subprocess.Popen([BIN / "sella-serve", "run", "--bundle", bundle, "--port", str(port)])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server)
        body = rank_once(url, bundle, data)
        print_areas(evaluate(bundle, data))
        print(f"\nask again:\n    curl -s {url}/rank -H 'content-type: application/json' -d '{json.dumps(body)}'\n")
        if not options.once:
            print("serving until Ctrl-C")
            server.wait()
    except KeyboardInterrupt:
        print("stopping")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
    return 0


def make_bundle(bundle: Path, data: Path, backbone: str) -> None:
    """Make the data and train the bundle, unless an earlier run did; a stopped run continues.

    Raises:
        SystemExit: a command failed; it has said why.
    """
    if not (data / "items.parquet").exists():
        print("1/3 generating users and their clicks on real films")
        run_or_exit("prepare", "films", "--out", data)
    if is_usable(bundle, backbone):
        print(f"using the bundle in {bundle}")
        return
    if backbone == FETCHED:
        fetch_weights(backbone)
    print(f"2/3 training on the language model {backbone}: SeLLa-Rec's three stages")
    named = made_with(bundle)
    named.parent.mkdir(parents=True, exist_ok=True)
    named.write_text(backbone)
    run_or_exit("fit", "--data", data, "--backbone", backbone, "--config", "demo", "--out", bundle, "--resume")


def made_with(bundle: Path) -> Path:
    """Return the file that names the backbone of the demo's bundle, or of the run that will write it."""
    return bundle.with_name(f"{bundle.name}.backbone")


def is_usable(bundle: Path, backbone: str) -> bool:
    """Return whether a bundle of this backbone exists; remove a bundle of another backbone or format, and its run."""
    named = made_with(bundle)
    same = named.exists() and named.read_text() == backbone
    if same and not (bundle / "manifest.json").exists():
        return False  # a stopped run continues
    try:
        if same:
            read_manifest(bundle)
            return True
    except BundleError as error:
        print(error)
    if bundle.exists():
        print("training a new bundle for the demo")
    for folder in (bundle, bundle.with_name(f"{bundle.name}.run")):
        shutil.rmtree(folder, ignore_errors=True)
    return False


def fetch_weights(backbone: str) -> None:
    """Download the weights, unless they are in the cache.

    Raises:
        SystemExit: with status 2 and one line; the weights cannot be downloaded.
    """
    command = [str(BIN / "sella-train"), "backbone", backbone]
    print(f"fetching the language model {backbone}, unless it is in the cache")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        print(
            f"the weights of {backbone} could not be fetched ({why[0].removeprefix('error: ')});"
            " to train a stand-in without knowledge instead: make demo DEMO_BACKBONE=tiny",
            file=sys.stderr,
        )
        raise SystemExit(2)


def run_or_exit(*arguments: str | Path) -> None:
    """Run `sella-train`; if it fails, end the demo with its status. The command has printed the reason."""
    status = subprocess.run([BIN / "sella-train", *arguments], check=False).returncode
    if status:
        raise SystemExit(status)


def wait_until_ready(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Wait for /readyz.

    Raises:
        SystemExit: the service stopped, or is not ready in time.
    """
    print("3/3 starting the service")
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the service stopped with status {server.returncode}")
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the service was not ready within {READY_SECONDS} seconds")


def rank_once(url: str, bundle: Path, data: Path) -> dict[str, Any]:
    """Rank films that one user has not seen, print them and the user's liked films, and return the request body."""
    items = pl.read_parquet(data / "items.parquet")
    users = pl.read_parquet(bundle / "users.parquet", columns=["user_id", "history"])
    user, liked, disliked = clearest_taste(pl.read_parquet(data / "train.parquet"), items)
    history = users.row(by_predicate=pl.col("user_id") == user, named=True)["history"]
    body = {"user_id": user, "candidates": candidates(user, liked, disliked, items, data)}
    answer = httpx.post(f"{url}/rank", json=body, timeout=60).raise_for_status().json()
    shown = [*history[-LIKED_SHOWN:], *body["candidates"]]
    width = max(map(len, items.filter(pl.col("item_id").is_in(shown))["title"]))
    films = {item_id: f"{title:{width}}  {genre:24}" for item_id, title, genre in items.iter_rows()}
    print(f"\n{user} lately liked:")
    for item_id in history[-LIKED_SHOWN:]:
        print(f"{'':15}{films[item_id]}".rstrip())
    print(f"ranked for {user}, who likes {', '.join(liked)} and dislikes {', '.join(disliked)}:")
    for result in answer["results"]:
        mark = "new: nobody has clicked it" if result["cold_item"] else ""
        print(f"    {result['rank']:2}.  {result['score']:.3f}  {films[result['item_id']]}{mark}".rstrip())
    return body


def clearest_taste(train: pl.DataFrame, items: pl.DataFrame) -> tuple[str, list[str], list[str]]:
    """Return the user whose clicks differ most between genres, with the liked and the disliked genres."""
    balance = (
        train.join(items, on="item_id")
        .with_columns(pl.col("genre").str.split(", ").list.first())
        .group_by("user_id", "genre")
        .agg((2 * pl.col("label").cast(pl.Int32) - 1).sum().alias("balance"))
        .sort("user_id", "balance", "genre", descending=[False, True, False])
    )
    sides = balance.group_by("user_id", maintain_order=True).agg(
        liked=pl.col("genre").head(GENRES_A_SIDE),
        disliked=pl.col("genre").tail(GENRES_A_SIDE),
        gap=pl.col("balance").head(GENRES_A_SIDE).sum() - pl.col("balance").tail(GENRES_A_SIDE).sum(),
    )
    best = sides.sort("gap", descending=True, maintain_order=True).row(0, named=True)
    return best["user_id"], best["liked"], best["disliked"]


def candidates(user: str, liked: list[str], disliked: list[str], items: pl.DataFrame, data: Path) -> list[str]:
    """Return unseen films by id: as many of liked genres as of disliked ones; half of each side nobody has clicked."""
    splits = [pl.read_parquet(data / f"{split}.parquet") for split in ("train", "valid", "test")]
    seen = pl.concat(splits).filter(pl.col("user_id") == user)["item_id"].implode()
    unseen = items.filter(~pl.col("item_id").is_in(seen)).with_columns(
        pl.col("genre").str.split(", "), new=~pl.col("item_id").is_in(splits[0]["item_id"].implode())
    )
    chosen = []
    for side, other in ((liked, disliked), (disliked, liked)):
        first, elsewhere = pl.col("genre").list.first(), pl.col("genre").list.set_intersection(other).list.len()
        films = unseen.filter(
            first.is_in(side), elsewhere == 0
        )  # a film with a liked and a disliked genre is no clear case
        for some in (films.filter("new"), films.filter(~pl.col("new"))):
            chosen.append(some.sample(min(FILMS_A_SIDE // 2, some.height), seed=7))
    return pl.concat(chosen)["item_id"].sort().to_list()


def evaluate(bundle: Path, data: Path) -> dict[str, Any]:
    """Return the report of `sella-train evaluate` on the test split.

    Raises:
        SystemExit: the command failed; it has said why.
    """
    print("\nscoring the test split")
    command: list[str | Path] = [BIN / "sella-train", "evaluate", "--bundle", bundle, "--data", data, "--split", "test"]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def print_areas(report: dict[str, Any]) -> None:
    """Print the AUC of the bundle's score and of the other scorers, over all rows and over the rows of new films."""
    new = report["new items"]
    print(f"AUC on test: {report['all']['rows']:,} rows, {new['rows']:,} of them of new films (0.5 is chance)")
    print(f"    {'':10} {'all rows':26} new films")
    print(f"    {'score':10} {interval(report['all']['auc']):26} {interval(new['auc'])}")
    for name, judged in report.get("scorers", {}).items():
        on_new = judged.get("new items", {}).get("auc")
        print(f"    {name:10} {interval(judged['auc']):26} {interval(on_new) if on_new else ''}".rstrip())


def interval(found: dict[str, float | None]) -> str:
    """Return a figure with its 95 % interval; a dash where there is none."""
    if found["value"] is None:
        return "–"
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def is_free(port: int) -> bool:
    """Return whether nothing listens on a local port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    """Return a port that the system has free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
