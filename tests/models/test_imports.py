import subprocess
import sys

WITHOUT = """
import sys
for name in ("peft", "polars", "pydantic", "fastapi", "typer"):
    sys.modules[name] = None
import models.scorer, models.scoring_model, models.probe, models.prompt_tree
"""


def test_scoring_needs_torch_and_transformers_alone() -> None:
    """A machine that is lent for measuring has no more."""
    ended = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
