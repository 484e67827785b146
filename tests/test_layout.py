"""The house: which file may import which, and how long files and functions may be."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each row may import from its own and from those below it; a script is imported by nobody, with two exceptions.
LAYERS = [
    {
        "train",
        "evaluate",
        "classify",
        "retrieve",
        "explain",
        "ablate",
        "weights.download",
        "weights.export",
        "docs.figure",
    },
    {"runs", "build", "optimization", "settings", "cli", "encoding", "index"}
    | {"archive", "calibration", "explain", "figures", "pictures", "report", "serve"},
    {"fusion", "lora", "data", "splits", "split_file", "trust", "entrep", "checkpoint", "clip_config", "peft_format"},
    {"model", "tokenizer", "prompts", "images", "augment", "cache", "sides", "kernels", "metrics", "phantom"},
    {"files", "errors", "parallel"},
]
SCRIPTS = [("train", "evaluate"), ("ablate", "train")]
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}
FILES = sorted(path for pattern in ("*.py", "kernels/*.py", "weights/*.py", "docs/*.py") for path in ROOT.glob(pattern))
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else ".".join(parts)


def imports(file):
    """→ the project's modules that the file imports. What a demonstration, `main` of a module, imports does not count:
    it may show the module at work in what is built on it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if LEVEL[module_of(file)] > 0:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & LEVEL.keys() - {module_of(file)}


def test_every_file_has_its_place():
    assert {module_of(file) for file in FILES} == set(LEVEL)


@each_file
def test_no_import_runs_upward(file):
    module = module_of(file)
    for name in imports(file):
        assert LEVEL[name] >= LEVEL[module], f"{module} imports {name}"
        assert LEVEL[name] > 0 or (module, name) in SCRIPTS, f"{module} imports the script {name}"
    if module == "kernels":
        assert imports(file) <= {"errors"}
    if module == "entrep":
        assert "data" not in imports(file)


def test_no_imports_run_in_circles():
    uses = {}
    for file in FILES:
        uses.setdefault(module_of(file), set()).update(imports(file))
    while uses:
        free = {module for module, names in uses.items() if not names & uses.keys()}
        assert free, f"these import each other: {sorted(uses)}"
        uses = {module: names for module, names in uses.items() if module not in free}


@each_file
def test_files_and_functions_are_short(file):
    source = file.read_text(encoding="utf-8")
    if file.name != "phantom.py":
        assert len(source.splitlines()) <= (250 if file.name == "train.py" else 350)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_a_search_does_not_import_the_compiler():
    """Over a second, for nothing."""
    code = "import sys, build, retrieve; build.load_base('phantom'); print('torch._dynamo' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_importing_is_cheap_and_silent(module, tmp_path):
    """Neither Triton nor PyTorch's compiler is imported, nothing is printed, no file is written."""
    code = f"import sys; import {module}; print([name for name in ('triton', 'torch._dynamo') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "[]\n" and not result.stderr and not list(tmp_path.iterdir())
