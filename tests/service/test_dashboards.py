"""What Prometheus and Grafana are given: rules that fire when they should, dashboards whose queries can be read."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"
GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (of Prometheus) is not installed"
)


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))]


def panels() -> list[dict[str, Any]]:
    return [panel for board in dashboards() for panel in board["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Every query of every panel, annotation and variable aside, as Grafana would send it."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    for name, value in (("$__rate_interval", "1m"), ("$__range", "5m"), ("$bundle", ".*")):
        found = [expression.replace(name, value) for expression in found]
    return found


def rules(kind: str) -> list[dict[str, Any]]:
    files = [yaml.safe_load(path.read_text()) for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"] if kind in rule]


def assert_promtool_passes(*arguments: object, cwd: Path = PROMETHEUS) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_configuration_and_rules_are_accepted_and_every_alert_test_passes() -> None:
    assert_promtool_passes("check", "config", "prometheus.yml")
    assert_promtool_passes("test", "rules", "tests/alerts.yml")


def test_every_alert_is_tested_both_ways_and_says_what_to_do() -> None:
    names = [rule["alert"] for rule in rules("alert")]
    assert len(set(names)) == len(names)
    tested = [test["name"] for test in yaml.safe_load((PROMETHEUS / "tests" / "alerts.yml").read_text())["tests"]]
    assert tested == [f"{name} {word}" for name in names for word in ("fires", "does not fire")]
    anchors = {
        re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", OPERATIONS.read_text(), re.M)
    }
    for rule in rules("alert"):
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
        document, anchor = rule["annotations"]["runbook"].split("#")
        assert (document, anchor) == ("docs/operations.md", rule["alert"].lower())
        assert anchor in anchors, f"docs/operations.md has no heading for {rule['alert']}"


@needs_promtool
def test_every_query_of_every_panel_can_be_read(tmp_path: Path) -> None:
    groups = [{"name": "g", "rules": [{"record": f"r:{i}", "expr": one} for i, one in enumerate(expressions())]}]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    assert_promtool_passes("check", "rules", "--lint=none", "rules.yml", cwd=tmp_path)


def test_what_is_asked_of_recording_rules_is_recorded_and_documented() -> None:
    documented = set(re.findall(r"`(\w+:\w+:\w+)`", OPERATIONS.read_text()))
    recorded = {rule["record"] for rule in rules("record")}
    assert recorded <= documented
    for expression in [*expressions(), *(rule["expr"] for rule in rules("alert"))]:
        assert set(re.findall(r"\w+:\w+:\w+", expression)) <= recorded


def test_every_metric_that_is_asked_for_is_documented() -> None:
    documented = set(re.findall(r"`(sella_\w+)`", OPERATIONS.read_text()))
    asked: set[str] = set()
    for expression in [*expressions(), *(rule["expr"] for kind in ("alert", "record") for rule in rules(kind))]:
        asked |= set(re.findall(r"(?<![:\w])sella_\w+", expression))
    missing = {name for name in asked if {name, re.sub(r"_(bucket|sum|count)$", "", name)}.isdisjoint(documented)}
    assert not missing, f"docs/operations.md does not say what these count: {sorted(missing)}"


def test_dashboards_are_whole_and_named_apart() -> None:
    boards = dashboards()
    assert {board["uid"] for board in boards} == {"sella-overview", "sella-latency", "sella-quality", "sella-redis"}
    assert len({board["title"] for board in boards}) == len(boards)
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    for board in boards:
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        uses_bundle = "$bundle" in json.dumps(board["panels"])
        assert [one["name"] for one in board["templating"]["list"]] == (["bundle"] if uses_bundle else [])
    for panel in panels():
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"] and panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == source["uid"]


def test_panels_do_not_overlap() -> None:
    for board in dashboards():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
            assert at["x"] + at["w"] <= 24 and not cells & taken, (board["title"], panel["title"])
            taken |= cells
