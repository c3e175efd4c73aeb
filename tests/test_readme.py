"""The README and docs/ are true: their Python runs as written, their commands and tests exist, links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn_det.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
# Extras that a page may be about; what it needs besides is always there.
OPTIONAL = ("transformers", "diffusers")
# Written by `make results`; a clone may be older than its first run.
GENERATED = {ROOT / "VERIFIED_RESULTS.md"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Words of each line of the bash blocks, without comments."""
    lines = [
        line.split("#")[0].split() for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()
    ]
    return [words for words in lines if words]


PYTHON = [pytest.param(code, id=f"{page.name}-{i}") for page in PAGES for i, code in enumerate(blocks(page, "python"))]


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs_as_written(code: str, tmp_path: Path):
    for name in OPTIONAL:
        if re.search(rf"^(from|import) {name}\b", code, re.MULTILINE) and importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install {name}")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_tests_that_the_pages_name_exist():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+\.py::\w+)`", page.read_text())}
    assert len(named) > 30
    for name in named:
        file, function = name.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_there_is_something_to_run():
    assert len(PYTHON) >= 15
    assert ["make", "verify"] in commands()
    assert ["make", "test"] in commands()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_exist(words: list[str]):
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == "flash-attn-det":
        build_parser().parse_args(arguments)
    else:
        assert words[:2] == ["pip", "install"]


def test_extras_exist():
    """Those that the pages and the messages of the package tell people to install."""
    (table,) = re.findall(
        r"^\[project\.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    extras = set(re.findall(r"^([\w-]+) = ", table, re.MULTILINE))
    texts = [
        path.read_text() for path in (*PAGES, *(ROOT / "flash_attn_det").rglob("*.py"), *ROOT.glob("examples/*.py"))
    ]
    named = {name for text in texts for name in re.findall(r"'(?:\.|flash-attn-det)\[(\w+)\]'", text)}
    assert {"cli", "bench"} <= named
    assert named <= extras


def test_make_targets_in_the_text_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z]+)`", README)) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        path = (page.parent / target).resolve()
        assert path.exists() or path in GENERATED, target


def test_files_in_the_map_exist():
    rows = README.split("## To change X, look at Y")[1].split("\n\n")[1].splitlines()[2:]
    assert len(rows) > 5
    for row in rows:
        names = re.findall(r"`([^`]+)`", row.split("|")[2])
        assert names, row
        folder = (ROOT / names[0]).parent
        for name in names:
            assert list(ROOT.glob(name)) or list(folder.glob(name)), name
