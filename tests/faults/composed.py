"""The compose file's services as plain processes: its commands, environment, mounts and ports, without containers."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROGRAMS = {"sella-serve": "service.cli", "sella-train": "training.cli"}


def dockerfile(target: str) -> dict[str, Any]:
    """Return what one stage of the Dockerfile, and those it is made from, say of a container."""
    stages: dict[str, dict[str, Any]] = {}
    stage: dict[str, Any] = {}
    for instruction, words in _instructions((ROOT / "Dockerfile").read_text()):
        if instruction == "FROM":
            base, _, name = words.partition(" AS ")
            known = stages.get(base, {"ENV": {}})
            stage = stages[name] = {**known, "ENV": dict(known["ENV"])}
        elif instruction == "ENV":
            stage["ENV"] |= dict(word.split("=", 1) for word in shlex.split(words))
        else:
            stage[instruction] = words
    return stages[target]


class Composed:
    """docker-compose.yml with its variables filled in, its volumes in a folder, and its names on this machine."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        text = re.sub(
            r"\$\{(\w+):-([^}]*)\}",
            lambda found: variables.get(found[1], found[2]),
            (ROOT / "docker-compose.yml").read_text(),
        )
        self.file: dict[str, Any] = yaml.safe_load(text.replace("$$", "$"))
        self.services: dict[str, dict[str, Any]] = self.file["services"]
        self.folder = folder
        # host:port inside the compose network -> host:port here
        self.ports = {name: _free() for name in ("redis:6379", "sella:8000", "sella:9100", "prometheus:9090")}
        self.image = dockerfile("cpu")

    def place(self, service: str, path: str) -> str:
        """Return a text of the compose file or of a mounted file with its paths and names turned into ours."""
        # In one pass, the longest first: what one mount became must not be taken for another.
        mounts = self.mounts(service)
        targets = "|".join(map(re.escape, sorted(mounts, key=len, reverse=True)))
        if targets:
            path = re.sub(targets, lambda found: str(mounts[found[0]]), path)
        for name, port in self.ports.items():
            path = path.replace(name, f"127.0.0.1:{port}")
        return path

    def mounts(self, service: str) -> dict[str, Path]:
        """Return where a service's mounts are here: a named volume is a folder, a file of the repository is itself."""
        found = {}
        for mount in self.services[service].get("volumes", []):
            source, target = mount.split(":")[:2]
            if source.startswith("."):
                found[target] = ROOT / source
            else:
                found[target] = Path(source) if source.startswith("/") else self.folder / source
                if not found[target].exists():
                    found[target].mkdir()
        return found

    def command(self, service: str) -> list[str]:
        """Return the process that a service's container would run."""
        words = [*self._entrypoint(service), *self._words(service)]
        return [self.place(service, one) for word in words for one in _here(word)]

    def environment(self, service: str) -> dict[str, str]:
        """Return its environment: the image's, then the service's own."""
        image = self.image["ENV"] if "build" in self.services[service] else {}
        given = {**image, **self.services[service].get("environment", {})}
        given = {name: self.place(service, str(value)) for name, value in given.items() if name != "PATH"}
        if "SELLA_PORT" in given:
            given |= {"SELLA_PORT": str(self.ports["sella:8000"]), "HOME": str(self.folder)}
        if "SELLA_METRICS_PORT" in given:
            assert given["SELLA_METRICS_PORT"] == "9100"
            given["SELLA_METRICS_PORT"] = str(self.ports["sella:9100"])
        return given

    def health(self, service: str) -> list[str]:
        """Return the command of its health check."""
        kind, *words = self.services[service]["healthcheck"]["test"]
        words = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        own = {
            "sella": ("8000", "sella:8000"),
            "redis": ("redis-cli", "redis:6379"),
            "prometheus": ("9090", "prometheus:9090"),
        }
        inside, name = own[service]
        outside = f"redis-cli -p {self.ports[name]}" if service == "redis" else str(self.ports[name])
        return [one.replace(inside, outside) for word in words for one in _here(word)]

    def run(self, service: str, seconds: float = 120) -> "subprocess.CompletedProcess[str]":
        """Run a one-shot service to its end."""
        return subprocess.run(
            self.command(service), env=self._whole(service), cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )

    def start(self, service: str, *more: str) -> "subprocess.Popen[bytes]":
        """Start a service that stays; its log is in the folder."""
        with (self.folder / f"{service}.log").open("wb") as log:
            command = [*self.command(service), *more]
            return subprocess.Popen(command, env=self._whole(service), cwd=ROOT, stdout=log, stderr=log)

    def _whole(self, service: str) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), **self.environment(service)}

    def _entrypoint(self, service: str) -> list[str]:
        described = self.services[service]
        if "entrypoint" in described:
            return list(described["entrypoint"])
        if "build" in described:
            return list(yaml.safe_load(self.image["ENTRYPOINT"]))
        # An image of a program alone: its options are the command.
        return [service] if described["command"][0].startswith("-") else []

    def _words(self, service: str) -> list[str]:
        return list(self.services[service].get("command") or yaml.safe_load(self.image["CMD"]))


def _here(word: str) -> list[str]:
    """Turn the programs that the image installs into this interpreter's modules."""
    if word == "python":
        return [sys.executable]
    if word in PROGRAMS:
        return [sys.executable, "-m", PROGRAMS[word]]
    for program, module in PROGRAMS.items():
        word = re.sub(rf"\b{program}\b", f"{sys.executable} -m {module}", word)
    return [word]


def _instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.M))
    lines = [line for line in joined.splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
