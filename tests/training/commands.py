"""Runs `sella-train` in this process."""

from typer.testing import CliRunner, Result

from training.cli import app


def sella_train(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def refused(*arguments: object) -> str:
    """Return the one line on stderr with which a command leaves, exit status 2 and nothing on stdout."""
    result = sella_train(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line
