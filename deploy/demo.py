"""`make demo`: made-up data, a bundle trained through every stage, a running service, one ranked list.

Runs the same commands a user would; the bundle and its data stay in `bundles/` and are reused.
"""

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import polars as pl

from models.bundle import BundleError, read_manifest

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
BUNDLE, DATA = BUNDLES / "demo", BUNDLES / "demo.data"
BIN = Path(sys.executable).parent
CANDIDATES = 12
READY_SECONDS = 120


def main() -> int:
    """Run the demo; returns the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--once", action="store_true", help="stop after the request")
    arguments.add_argument("--port", type=int, default=8000)
    options = arguments.parse_args()
    make_bundle()
    port = options.port if is_free(options.port) else free_port()
    server = subprocess.Popen([BIN / "sella-serve", "run", "--bundle", BUNDLE, "--port", str(port)])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server)
        rank_once(url)
        if not options.once:
            print("serving until Ctrl-C")
            server.wait()
    except KeyboardInterrupt:
        print("stopping")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
    return 0


def make_bundle() -> None:
    """Make the data and train the bundle, unless an earlier run did; a run that was stopped goes on."""
    if not (DATA / "items.parquet").exists():
        print("1/3 making a catalogue of films that never were, and people who watch them")
        subprocess.run([BIN / "sella-train", "prepare", "synthetic", "--out", DATA], check=True)
    if (BUNDLE / "manifest.json").exists():
        try:
            read_manifest(BUNDLE)
        except BundleError as error:  # of an earlier sella: the demo made it and can make it again
            print(f"{error}\nmaking the demo's bundle anew")
            for folder in (BUNDLE, BUNDLE.with_name(f"{BUNDLE.name}.run")):
                shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"using the bundle in {BUNDLE.relative_to(BUNDLES.parent)}")
            return
    print("2/3 training: a small stand-in for a language model, then SeLLa-Rec's three stages")
    command = [BIN / "sella-train", "fit", "--data", DATA, "--backbone", "tiny", "--config", "demo", "--out", BUNDLE]
    subprocess.run([*command, "--resume"], check=True)


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


def rank_once(url: str) -> None:
    """Rank a handful of films, some of them never trained on, for one user, and show how to repeat it."""
    users, items = pl.read_parquet(BUNDLE / "users.parquet"), pl.read_parquet(BUNDLE / "items.parquet")
    user = users.filter(pl.col("trained") & (pl.col("history").list.len() >= 5)).row(0, named=True)
    titles = dict(zip(items["item_id"], items["title"], strict=True))
    unseen = items.filter(~pl.col("item_id").is_in(user["history"])).sample(CANDIDATES, seed=7)
    body = {"user_id": user["user_id"], "candidates": unseen["item_id"].to_list()}
    answer = httpx.post(f"{url}/rank", json=body, timeout=30).raise_for_status().json()
    print(f"\nuser {user['user_id']} lately liked:")
    for item_id in user["history"][-5:]:
        print(f"    {titles[item_id]}")
    print("ranked for them:")
    for result in answer["results"]:
        mark = "  (new: scored from its title)" if result["cold_item"] else ""
        print(f"    {result['rank']:2}. {result['score']:.3f}  {titles[result['item_id']]}{mark}")
    print(f"\nask again:\n    curl -s {url}/rank -H 'content-type: application/json' -d '{json.dumps(body)}'\n")


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
