import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.access.keys import parse_keys
from service.cli import app


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["key", *words])
    return result.exit_code, result.stdout, result.stderr


def test_a_key_is_added_and_printed_once(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    status, shop, _ = run("shop", "--file", str(file))
    assert status == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("# ours\n" + file.read_text().rstrip("\n"))
    _, mail, _ = run("mail", "--file", str(file))
    ring = parse_keys(file.read_text(), "keys")
    for name, secret in (("shop", shop), ("mail", mail)):
        found = ring.find(secret.strip().encode())
        assert found is not None and found.name == name
    assert file.read_text().startswith("# ours\n")
    assert [one.name for one in tmp_path.iterdir()] == ["keys"]


def test_a_file_that_is_there_stays_where_so_asked(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for _ in range(2):
        assert run("shop", "--file", str(file), "--unless-exists") == (0, "", "")
        before = file.read_text()
    assert file.read_text() == before


def test_a_name_that_is_there_or_is_none_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    run("shop", "--file", str(file))
    before = file.read_text()
    for name, message in (("shop", "the name 'shop' stands twice"), ("a shop", "no name of a key"), ("#", "no name")):
        status, printed, error = run(name, "--file", str(file))
        assert (status, printed) == (2, "") and message in error
    assert file.read_text() == before
    assert run("shop", "--file", str(tmp_path / "gone" / "keys"))[0] == 2


def test_a_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "keys", tmp_path / "link"
    run("shop", "--file", str(file))
    file.chmod(0o640)
    link.symlink_to(file)
    assert run("mail", "--file", str(link))[0] == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and link.is_symlink()
    assert {key.name for key in parse_keys(file.read_text(), "keys").keys} == {"shop", "mail"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_writes_belongs_to_who_has_to_read_it(tmp_path: Path) -> None:
    service = 10_001
    os.chown(tmp_path, service, service)
    file = tmp_path / "keys"
    for name in ("new", "added"):
        assert run(name, "--file", str(file))[0] == 0
        assert (file.stat().st_uid, file.stat().st_gid) == (service, service)
    os.chown(file, service, 77)
    os.chown(tmp_path, 0, 0)
    assert run("again", "--file", str(file))[0] == 0
    assert (file.stat().st_uid, file.stat().st_gid, stat.S_IMODE(file.stat().st_mode)) == (service, 77, 0o600)


def test_a_pipe_is_no_key_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    status, _, error = run("shop", "--file", str(tmp_path / "pipe"))
    assert status == 2 and "no regular file" in error
