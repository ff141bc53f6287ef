"""The audit's verdict; its database is never asked here."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "audit.py"
FAKE = """
import os, sys
sys.stdout.write(os.environ["FAKE_OUT"])
sys.stderr.write(os.environ["FAKE_ERR"])
sys.exit(int(os.environ["FAKE_STATUS"]))
"""
CLEAN = '{"dependencies": [{"name": "a", "version": "1", "vulns": []}, {"name": "sella", "skip_reason": "local"}]}'
FOUND = (
    '{"dependencies": [{"name": "a", "version": "1", "vulns":'
    ' [{"id": "PYSEC-1", "fix_versions": ["2"], "aliases": [], "description": ""}]}]}'
)


def test_a_database_that_cannot_be_reached_is_said_and_no_failure(tmp_path: Path) -> None:
    """The real pip-audit, behind a proxy that is not there."""
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, str(SCRIPT), "--seconds", "50"]
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path), **nowhere}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cannot be reached, so nothing was checked" in done.stdout


@pytest.mark.parametrize(
    ("out", "error", "status", "expected", "line"),
    [
        (CLEAN, "", 0, 0, "1 packages, 0 known vulnerabilities"),
        ('{"dependencies": []}', "", 0, 2, "0 packages"),
        ('{"dependencies": [{"name": "a", "skip_reason": "not found"}]}', "", 0, 0, "none of 1 packages is known"),
        (FOUND, "Found 1 known vulnerability", 1, 1, "a 1: PYSEC-1; mended in 2"),
        ("", "usage: pip-audit: error: no such option", 2, 2, "pip-audit failed with status 2"),
        ("", "Traceback\nrequests.exceptions.ConnectionError: Max retries exceeded", 1, 0, "cannot be reached"),
        ("{", "ConnectTimeout", 1, 0, "cannot be reached"),
    ],
)
def test_the_verdict(tmp_path: Path, out: str, error: str, status: int, expected: int, line: str) -> None:
    (tmp_path / "pip_audit.py").write_text(FAKE)
    environment = {
        "PATH": "/usr/bin",
        "PYTHONPATH": str(tmp_path),
        "FAKE_OUT": out,
        "FAKE_ERR": error,
        "FAKE_STATUS": str(status),
    }
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == expected
    assert line in done.stdout + done.stderr
