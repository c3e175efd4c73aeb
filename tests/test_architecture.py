"""The house rules that a compiler does not check: who may include whom, what is exported, what is cited."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "flash_attn_det"
CORE_LIBRARY = PACKAGE / "lib" / "libflash_attn_det.so"
TORCH_LIBRARY = PACKAGE / "lib" / "libflash_attn_det_torch.so"

# The arrows of the architecture: a folder of csrc/ and what its files may include besides the system's headers.
HEADER = "flash_attn_det.h"
MAY_INCLUDE = {
    ".": set(),
    "numerics": {"numerics"},
    "core": {"core", "numerics", HEADER},
    "cpu": {"cpu", "core", "numerics", HEADER},
    "cuda": {"cuda", "core", "numerics", HEADER},
    "torch": {"torch", HEADER},
}
C_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".c", ".h", ".inc", ".cu", ".cuh"))

# Python modules that stand above the library: it must not import them.
ABOVE = {"cli", "commands", "integrations", "compat", "compat_packed", "sdpa", "testing", "reference", "audit"} | {
    "reference_backward",
    "reference_steps",
}
# What the library may import besides itself and the standard library. The rest are extras.
BASE_DEPENDENCIES = {"torch"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer(path: Path) -> str:
    """The folder of csrc/ that a file belongs to; the public header is a layer of its own."""
    inside = path.relative_to(CSRC)
    return str(inside) if str(inside) == HEADER else inside.parts[0]


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_includes_point_down(path: Path):
    allowed = MAY_INCLUDE["." if path.name == HEADER else layer(path)]
    for target in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        included = (path.parent / target).resolve()
        assert included.is_file(), f"{relative(path)} includes {target}, which is not beside it"
        assert layer(included) in allowed, f"{relative(path)} must not include {relative(included)}"


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_system_includes_are_those_of_the_compilers(path: Path):
    """C11's own headers, and those of the loader, the instruction sets and CUDA where they belong."""
    headers = set(re.findall(r"^\s*#\s*include\s+<([^>]+)>", path.read_text(), re.MULTILINE))
    c11 = {"fenv.h", "float.h", "limits.h", "math.h", "stdarg.h", "stdatomic.h", "stdbool.h", "stddef.h", "stdint.h"}
    c11 |= {"stdio.h", "stdlib.h", "string.h"}
    own = {"core": {"dlfcn.h"}, "cpu": {"immintrin.h", "arm_neon.h"}, "cuda": {"cuda.h", "cuda_runtime.h", "dlfcn.h"}}
    own["torch"] = {"dlfcn.h"}
    assert headers <= c11 | own.get(layer(path), set())


def imported_names(path: Path) -> set[str]:
    """Top-level packages and, as ".name", sub-modules of ours that a module imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            targets = [node.module]
            if node.module == "flash_attn_det":
                targets = [f"flash_attn_det.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"flash_attn_det.{node.module or alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            names.add("." + parts[1] if parts[0] == "flash_attn_det" and len(parts) > 1 else parts[0])
    return names


LIBRARY_MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem not in {"__init__", *ABOVE})


@pytest.mark.parametrize("path", LIBRARY_MODULES, ids=relative)
def test_library_modules_import_nothing_above_them(path: Path):
    assert not {"." + name for name in ABOVE} & imported_names(path)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=relative)
def test_library_imports_only_torch(path: Path):
    foreign = {name for name in imported_names(path) if not name.startswith(".")} - set(sys.stdlib_module_names)
    assert foreign <= BASE_DEPENDENCIES | {"flash_attn_det"}


def dynamic(library: Path, tag: str) -> list[str]:
    """Values of one tag of the dynamic section."""
    listing = subprocess.run(["readelf", "--dynamic", "--wide", library], capture_output=True, text=True, check=True)
    return re.findall(rf"\({tag}\).*\[(.+)\]", listing.stdout)


def exported_symbols(library: Path) -> list[str]:
    listing = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in listing.stdout.splitlines()]


@pytest.mark.parametrize("library", [CORE_LIBRARY, TORCH_LIBRARY], ids=relative)
def test_exported_symbols_have_the_prefix(library: Path):
    symbols = exported_symbols(library)
    assert symbols
    assert not [symbol for symbol in symbols if not symbol.startswith("fad_")]


def test_header_and_library_agree():
    declared = set(re.findall(r"^FAD_API[^(]*?\b(fad_\w+)\(", (CSRC / HEADER).read_text(), re.MULTILINE))
    assert declared == set(exported_symbols(CORE_LIBRARY))


def test_core_library_needs_only_the_c_library():
    needed = dynamic(CORE_LIBRARY, "NEEDED")
    assert needed
    allowed = ("libc.so", "libm.so", "libdl.so", "ld-linux")
    assert not [name for name in needed if not name.startswith(allowed)]


def test_torch_library_finds_the_core_beside_itself():
    assert "libflash_attn_det.so" in dynamic(TORCH_LIBRARY, "NEEDED")
    assert dynamic(TORCH_LIBRARY, "RUNPATH") + dynamic(TORCH_LIBRARY, "RPATH") == ["$ORIGIN"]


CONTRACT = (CSRC / "numerics" / "contract.h").read_text()
CLAUSES = re.findall(r"^ \* (N\d+) ", CONTRACT, re.MULTILINE)


def cited(text: str) -> set[str]:
    """Clauses named in a text, also as a range (N5-N9)."""
    names = set(re.findall(r"\bN\d+\b", text))
    for first, last in re.findall(r"\bN(\d+)-N(\d+)\b", text):
        names |= {f"N{number}" for number in range(int(first), int(last) + 1)}
    return names


def clauses_under_test() -> set[str]:
    """Clauses in names (test_n4_...) and docstrings of the tests in Python, and in names of the tests in C."""
    names = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                names |= {f"N{number}" for number in re.findall(r"_n(\d+)(?=_|$)", node.name)}
                names |= cited(ast.get_docstring(node) or "")
    for path in (ROOT / "tests").rglob("*.c"):
        names |= {f"N{number}" for number in re.findall(r"\btest_n(\d+)_", path.read_text())}
    return names


def test_contract_numbers_its_clauses_in_order():
    assert len(CLAUSES) >= 11
    assert [f"N{number}" for number in range(1, len(CLAUSES) + 1)] == CLAUSES


@pytest.mark.parametrize("clause", CLAUSES)
def test_clause_is_cited_where_it_is_obeyed(clause: str):
    sources = [path for path in C_FILES if layer(path) in ("core", "cpu")]
    assert any(clause in cited(path.read_text()) for path in sources)


@pytest.mark.parametrize("clause", CLAUSES)
def test_clause_has_a_test(clause: str):
    assert clause in clauses_under_test()


def test_citations_name_clauses_that_exist():
    for path in [*C_FILES, *PACKAGE.rglob("*.py")]:
        assert cited(path.read_text()) <= set(CLAUSES), relative(path)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_contract_compiles_as_cuda(architecture: str, tmp_path: Path):
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-fmad=false", "-Werror", "all-warnings"]
    command += [
        "-Xcompiler",
        "-Wall,-Wextra",
        "-c",
        ROOT / "tests" / "c" / "contract_cuda.cu",
        "-o",
        tmp_path / "contract.o",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
