"""Nothing that is read can run: no unpickling, no evaluation, no code from a model's folder."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("models", "training", "service", "deploy", "loadtests")
# Each of these runs what it reads, or may.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pandas.read_pickle",
    "os.system",
    "os.popen",
}
KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}


def test_nothing_that_is_read_is_executed() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, what in dangerous(ast.parse(path.read_text()))
    ]
    assert not found


def test_the_search_finds_each_of_them() -> None:
    source = """
import pickle, numpy as np
from joblib import load
eval("1"); exec("1")
torch.load("x"); yaml.load(f)
np.load("x", allow_pickle=True)
AutoModel.from_pretrained("x", trust_remote_code=True)
subprocess.run("x", shell=True)
"""
    assert [line for line, _ in dangerous(ast.parse(source))] == [2, 3, 4, 4, 5, 5, 6, 7, 8]
    allowed = "re.compile('x'); model.eval(); np.load('x', allow_pickle=False); torch.compile(f)"
    assert not list(dangerous(ast.parse(allowed)))


def dangerous(tree: ast.AST) -> Iterator[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, one.name) for one in node.names if one.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append((node.lineno, node.module or ""))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in NAMES or name in ATTRIBUTES:
                found.append((node.lineno, name))
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in KEYWORDS and not off:
                    found.append((node.lineno, f"{name}({keyword.arg})"))
    yield from sorted(found)
