"""patches/: additions alone, applied to the published source, which then calls us; undone without a trace."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

import flash_attn_det as fad

ROOT = Path(__file__).resolve().parents[1]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
PATCH = ROOT / "patches" / "flash_attn-2.8.3.patch"
TOOLS = {"patch": ["patch", "-p1", "-i"], "git": ["git", "apply", "--unidiff-zero"]}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_only_adds_lines_and_is_described(patch):
    for line in patch.read_text().splitlines():
        assert re.match(r"\+|--- a/|@@ -\d+,0 \+\d+(,\d+)? @@$", line), line
    assert f"## {patch.name}" in (ROOT / "patches" / "README.md").read_text()


def sdist(requirement: str) -> Path:
    """The published source archive, kept under build/ so that it is fetched once."""
    folder = ROOT / "build" / "tests" / "sdists" / requirement
    if not list(folder.glob("*.tar.gz")):
        # pip runs the setup.py of what it downloads, to learn its name; this one imports torch, packaging and wheel.
        command = [sys.executable, "-m", "pip", "download", requirement, "--dest", folder, "--no-deps", "--quiet"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--retries", "1", "--timeout", "30"]
        environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = " ".join(done.stderr.split())[:300]
            pytest.skip(f"needs the source of {requirement} from a package index, and setuptools and wheel: {reason}")
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder that holds flash_attn/ as published. Tests do not change it."""
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(sdist("flash-attn==2.8.3")) as archive:
        files = [m for m in archive.getmembers() if m.isfile() and "/flash_attn/" in m.name and ".." not in m.name]
        archive.extractall(folder, members=files, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (package,) = folder.glob("*/flash_attn")
    return package.parent


def apply(tool, folder, *options):
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    # Inside a repository git would skip files that it takes for those of another folder.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = [*TOOLS[tool][:2], *options, *TOOLS[tool][2:], PATCH]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tool", TOOLS)
def test_applied_and_undone(tool, published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    apply(tool, folder)
    before, after = contents(published), contents(folder)
    assert [str(path) for path in before if before[path] != after[path]] == ["flash_attn/flash_attn_interface.py"]
    assert before.keys() == after.keys()
    apply(tool, folder, "-R")
    assert contents(folder) == before


USE = """
import sys, torch, flash_attn, flash_attn.flash_attn_interface as interface, flash_attn_det as fad
from flash_attn_det.testing import assert_bits_equal, bits_differ

exported = [name for name in vars(flash_attn) if name.startswith("flash_attn_") and callable(getattr(flash_attn, name))]
assert len(exported) == 7, exported
ours = [name for name in exported if hasattr(fad, name)]
assert len(ours) >= 6
for name in ours:
    assert getattr(flash_attn, name) is getattr(interface, name) is getattr(fad, name), name

q, k, v = torch.randn(2, 9, 4, 24), torch.randn(2, 700, 2, 24), torch.randn(2, 700, 2, 24)
out = flash_attn.flash_attn_func(q, k, v, causal=True)
assert_bits_equal(out, fad.attn(q, k, v, causal=True))
assert bits_differ(flash_attn.flash_attn_func(q, k, v), out) > 0

for name in set(exported) - set(ours):
    try:
        getattr(flash_attn, name)(q, k, v)
    except NotImplementedError as error:
        assert "routed to flash_attn_det" in str(error)
    else:
        raise AssertionError(f"{name} reached a kernel")
"""


def run(code, *folders):
    path = os.pathsep.join(map(str, [*folders, Path(fad.__file__).parent.parent]))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_flash_attn_is_routed_here(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    apply("patch" if shutil.which("patch") else "git", folder)
    result = run(USE, folder)
    assert result.returncode == 0, result.stderr
    unpatched = run(USE, published)
    assert unpatched.returncode != 0, "the test would pass without the patch"


def test_signatures_are_those_of_the_published_source(published):
    """Names, order and defaults of the parameters of every function that flash_attn exports and we have."""
    tree = ast.parse((published / "flash_attn" / "flash_attn_interface.py").read_text())
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    names = [name for name in functions if name.startswith("flash_attn_") and hasattr(fad, name)]
    assert len(names) >= 6
    for name in names:
        arguments = functions[name]
        published_names = [argument.arg for argument in arguments.args]
        defaults = [ast.literal_eval(default) for default in arguments.defaults]
        parameters = inspect.signature(getattr(fad, name)).parameters
        assert list(parameters) == published_names, name
        assert [p.default for p in parameters.values()][-len(defaults) :] == defaults, name
        assert all(p.default is p.empty for p in list(parameters.values())[: -len(defaults)]), name
