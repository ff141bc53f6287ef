"""`make audit`: are vulnerabilities known of the packages that are installed here?

Ends with 0 if none is known, or if the database cannot be reached, which it says; with 1 if one is; with 2 if the audit
itself fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import distributions

LIMIT_S = 240
# What pip-audit says, or the libraries under it, where there is no way to the database.
UNREACHABLE = (
    "ConnectionError",
    "Connection refused",
    "ConnectTimeout",
    "Could not connect",
    "Failed to establish",
    "Failed to query",
    "Max retries exceeded",
    "Name or service not known",
    "Network is unreachable",
    "ProxyError",
    "ReadTimeout",
    "Temporary failure in name resolution",
    "timed out",
    "Tunnel connection failed",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the audit; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=LIMIT_S, help="give up after so many")
    options = parser.parse_args(arguments)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="sella-audit-", suffix=".txt") as listed:
            listed.write(installed())
            listed.flush()
            done = run_audit(listed.name, options.seconds)
    except subprocess.TimeoutExpired:
        return unreachable(f"no answer within {options.seconds} s")
    report = parsed(done.stdout)
    if report is not None:
        return told(report)
    if any(sign in done.stderr for sign in UNREACHABLE):
        return unreachable((done.stderr.strip().splitlines() or [""])[-1][:300])
    print(f"audit: pip-audit failed with status {done.returncode}:\n{done.stderr.strip()}", file=sys.stderr)
    return 2


def installed() -> str:
    """Return what is installed as a requirements file, our own package left out: it is in no database."""
    versions = {one.metadata["Name"]: one.version.split("+")[0] for one in distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()) if name != "sella")


def run_audit(requirements: str, seconds: float) -> "subprocess.CompletedProcess[str]":
    """Ask pip-audit about exactly these versions: nothing is resolved, downloaded or installed.

    Raises:
        subprocess.TimeoutExpired: it took too long.
    """
    command = [sys.executable, "-m", "pip_audit", "--requirement", requirements, "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def parsed(text: str) -> dict[str, list[dict[str, object]]] | None:
    """Return pip-audit's report, or None if it made none."""
    try:
        report = json.loads(text)
    except json.JSONDecodeError:
        return None
    return report if isinstance(report, dict) and "dependencies" in report else None


def told(report: dict[str, list[dict[str, object]]]) -> int:
    """Print what is known, a line each; returns the exit status."""
    looked_at = [package for package in report["dependencies"] if "vulns" in package]
    if report["dependencies"] and not looked_at:  # what answers in its place is a mirror with packages alone
        return unreachable(f"none of {len(report['dependencies'])} packages is known to it")
    if len(looked_at) < len(report["dependencies"]):
        print(f"audit: {len(report['dependencies']) - len(looked_at)} packages are in no database")
    found = 0
    for package in looked_at:
        vulnerabilities = package["vulns"]
        assert isinstance(vulnerabilities, list)
        for one in vulnerabilities:
            mend = ", ".join(one["fix_versions"]) or "no version yet"
            print(f"audit: {package['name']} {package['version']}: {one['id']}; mended in {mend}")
            found += 1
    print(f"audit: {len(looked_at)} packages, {found} known vulnerabilities")
    if not looked_at:
        return 2  # an audit of nothing is none
    return 1 if found else 0


def unreachable(reason: str) -> int:
    """Say that nothing was learned; returns the exit status."""
    print(f"audit: the database of vulnerabilities cannot be reached, so nothing was checked: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
