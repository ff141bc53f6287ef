import stat
from pathlib import Path

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
