"""What docker-compose.yml starts, started without containers; so it cannot drift from what works."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from models.loading import Bundle
from tests.faults.composed import ROOT, Composed, dockerfile
from tests.serving import wait_for

pytestmark = pytest.mark.timeout(280)

BODY = {"user_id": "u0", "candidates": ["i1", "i2", "i39"]}
OURS = ("sella", "sella-gpu", "keys", "bundle", "publish", "backup")


@pytest.fixture(scope="module")
def composed(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Composed:
    folder = tmp_path_factory.mktemp("compose")
    shutil.copytree(bundle.folder, folder / "bundles" / "tiny")
    return Composed(folder, {"BUNDLE": "tiny", "BUNDLES_DIR": str(folder / "bundles")})


@pytest.fixture(scope="module")
def running(composed: Composed) -> Iterator[Composed]:
    """Everything that `docker compose up` starts, in the order of its conditions."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.append(composed.start("redis", "--port", str(composed.ports["redis:6379"])))
        wait_for(lambda: healthy(composed, "redis"))
        for one_shot in ("keys", "bundle", "publish"):
            done = composed.run(one_shot)
            assert done.returncode == 0, (one_shot, done.stdout, done.stderr)
        processes.append(composed.start("sella"))
        processes.append(start_prometheus(composed))
        wait_for(lambda: healthy(composed, "sella") and healthy(composed, "prometheus"))
        yield composed
        processes[1].send_signal(signal.SIGTERM)
        assert processes[1].wait(60) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start_prometheus(composed: Composed) -> "subprocess.Popen[bytes]":
    """Its configuration names the service and itself; here they have other addresses, and it scrapes each second."""
    folder = composed.folder / "etc"
    shutil.copytree(ROOT / "deploy" / "prometheus", folder)
    config = composed.place("prometheus", (folder / "prometheus.yml").read_text())
    own = f"127.0.0.1:{composed.ports['prometheus:9090']}"
    (folder / "prometheus.yml").write_text(config.replace("localhost:9090", own).replace("15s", "1s"))
    composed.services["prometheus"]["volumes"] = [
        mount.replace("./deploy/prometheus", str(folder)) for mount in composed.services["prometheus"]["volumes"]
    ]
    return composed.start("prometheus", f"--web.listen-address={own}")


def healthy(composed: Composed, service: str) -> bool:
    return subprocess.run(composed.health(service), capture_output=True, timeout=30).returncode == 0


def url(composed: Composed, name: str) -> str:
    return f"http://127.0.0.1:{composed.ports[name]}"


def test_it_scores_from_redis_for_who_has_the_key_that_was_made(running: Composed) -> None:
    service = url(running, "sella:8000")
    assert httpx.post(f"{service}/rank", json=BODY).status_code == 401
    [line] = (running.folder / "keys" / "api_keys").read_text().splitlines()
    headers = {"X-API-Key": line.split(":")[1]}
    wait_for(lambda: httpx.get(f"{service}/readyz").status_code == 200)
    answer = httpx.post(f"{service}/rank", json=BODY, headers=headers)
    assert answer.status_code == 200 and len(answer.json()["results"]) == 3
    assert httpx.delete(f"{service}/users/u0", headers=headers).status_code == 403
    assert httpx.get(f"{service}/metrics").status_code == 401
    metrics = httpx.get(f"{url(running, 'sella:9100')}/metrics").text.splitlines()
    [looked_up] = [line for line in metrics if line.startswith('sella_store_lookup_seconds_count{source="redis"}')]
    assert float(looked_up.split()[1]) >= 1


def test_the_log_is_backed_up_beside_the_service_again_and_again(running: Composed) -> None:
    service = url(running, "sella:8000")
    [line] = (running.folder / "keys" / "api_keys").read_text().splitlines()
    headers = {"X-API-Key": line.split(":")[1]}
    copy = running.folder / "state" / "backup.sqlite"
    for number in (1, 2):
        event = {"event_id": f"e{number}", "user_id": "u9", "item_id": "i1", "timestamp": 1.7e9, "label": True}
        answer = httpx.post(f"{service}/interactions", json={"interactions": [event]}, headers=headers)
        assert answer.status_code == 200, answer.text
        done = running.run("backup")
        assert done.returncode == 0 and f"{number} events" in done.stdout, done.stderr
        assert copy.stat().st_mode & 0o777 == 0o600


def test_prometheus_scrapes_it_with_the_rules_that_are_mounted(running: Composed) -> None:
    address = url(running, "prometheus:9090")

    def up() -> bool:
        answer = httpx.get(f"{address}/api/v1/query", params={"query": 'up{job="sella"}'}).json()
        return [one["value"][1] for one in answer["data"]["result"]] == ["1"]

    wait_for(up)
    assert httpx.get(f"{address}/api/v1/rules").json()["data"]["groups"]


def test_the_one_shots_change_nothing_the_second_time(running: Composed) -> None:
    files = [running.folder / "keys" / name for name in ("api_keys", "admin_keys")]
    before = [file.read_text() for file in files]
    assert running.run("keys").returncode == 0 and running.run("bundle").returncode == 0
    assert [file.read_text() for file in files] == before
    again = running.run("publish")
    assert again.returncode == 0 and "already" in again.stdout


def test_a_bundle_that_is_not_there_is_named_and_no_demo_is_put_in_its_place(tmp_path: Path) -> None:
    done = Composed(tmp_path, {"BUNDLE": "mine"}).run("bundle")
    assert done.returncode == 1 and "no bundle" in done.stdout


@pytest.mark.parametrize(
    ("variables", "backbone"), [({}, "/opt/backbones/smollm2-135m"), ({"DEMO_BACKBONE": "tiny"}, "tiny")]
)
def test_the_demo_is_trained_on_the_weights_that_the_image_got_when_it_was_built(
    tmp_path: Path, variables: dict[str, str], backbone: str
) -> None:
    composed = Composed(tmp_path, variables)
    # Training takes minutes: a program of the same name records its arguments instead.
    note = tmp_path / "sella-train"
    note.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/ran\n')
    note.chmod(0o755)
    [script] = composed.services["bundle"]["command"]
    script = composed.place("bundle", script)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([*composed.services["bundle"]["entrypoint"], script], env=environment, check=True, timeout=30)
    bundles = tmp_path / "bundles"
    assert (tmp_path / "ran").read_text().splitlines() == [
        f"prepare films --out {bundles}/demo.films",
        f"fit --data {bundles}/demo.films --backbone {backbone} --config demo --out {bundles}/demo --resume",
    ]
    # Both images are made from the stage `runtime`.
    runtime = (ROOT / "Dockerfile").read_text().partition(" AS runtime\n")[2].partition("\nFROM ")[0]
    assert "\nCOPY --from=backbone /opt/backbones /opt/backbones\n" in runtime
    assert '--out "/opt/backbones/${DEMO_BACKBONE}"' in dockerfile("backbone")["RUN"]
    for service in ("bundle", "sella", "sella-gpu"):
        assert composed.services[service]["build"]["args"]["DEMO_BACKBONE"] == Path(backbone).name


def test_grafanas_files_are_where_they_are_mounted(composed: Composed) -> None:
    mounts = composed.mounts("grafana")
    provisioning = mounts["/etc/grafana/provisioning"]
    [source] = yaml.safe_load(next((provisioning / "datasources").glob("*.y*ml")).read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load(next((provisioning / "dashboards").glob("*.y*ml")).read_text())["providers"]
    dashboards = mounts[provider["options"]["path"]]
    assert len([json.loads(file.read_text()) for file in dashboards.glob("*.json")]) >= 4
    home = composed.services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(composed.place("grafana", home)).exists()


@pytest.mark.parametrize("name", list(yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]))
def test_every_service_is_hardened_bounded_and_reached_from_this_machine_alone(composed: Composed, name: str) -> None:
    service: dict[str, Any] = composed.services[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"] and service["pids_limit"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "privileged" not in service
    if name in OURS:
        target = service["build"]["target"]
        assert dockerfile(target)["USER"] == "10001:10001"
    else:
        assert ":" in service["image"] and not service["image"].endswith(":latest")
    if service["restart"] != "no":
        assert service["healthcheck"]["test"]


def test_the_image_has_a_health_check_and_stops_as_the_service_expects(composed: Composed) -> None:
    for target in ("cpu", "gpu"):
        image = dockerfile(target)
        assert image["STOPSIGNAL"] == "SIGTERM" and "/livez" in image["HEALTHCHECK"] and image["EXPOSE"] == "8000"
    # What is baked into the image is known to the service: an unknown variable would stop it.
    settings = {name for name in dockerfile("cpu")["ENV"] if name.startswith("SELLA_")}
    assert settings == {
        "SELLA_HOST", "SELLA_PORT", "SELLA_BUNDLE", "SELLA_INTERACTIONS", "SELLA_VLLM_WEIGHTS", "SELLA_LOG_FORMAT"
    }  # fmt: skip
    assert composed.services["sella"]["stop_grace_period"] == "45s"


def test_redis_is_reached_by_the_services_that_need_it_alone(composed: Composed) -> None:
    on_store = {name for name, service in composed.services.items() if "store" in service.get("networks", [])}
    assert on_store == {"sella", "sella-gpu", "publish", "redis"}
    assert composed.file["networks"]["store"] == {"internal": True}
    assert "ports" not in composed.services["redis"]
