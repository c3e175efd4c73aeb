"""Hypothesis profiles, and the NumPy binding of the torch-free core, built once per session."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

import flash_attn_det

TESTS = Path(__file__).parent

# pytest --hypothesis-profile=thorough looks further, and elsewhere each time.
hypothesis.settings.register_profile(
    "default",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "thorough", max_examples=3000, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def native():
    """The module of tests/native: the contract's scalar functions and the C API, on NumPy arrays."""
    if shutil.which("make") is None or shutil.which("c++") is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs make, a C++ compiler (c++) and pybind11")
    library = Path(flash_attn_det.__file__).parent / "lib" / "libflash_attn_det.so"
    build = TESTS.parent / "build" / "tests" / "native"
    command = ["make", "-C", str(TESTS / "native"), f"PYTHON={sys.executable}", f"BUILD={build}", f"LIBRARY={library}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
    (path,) = build.glob("fad_native*.so")
    spec = importlib.util.spec_from_file_location("fad_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scan_stride():
    """Step between the floats that error scans try; FLASH_ATTN_DET_EXHAUSTIVE=1 tries every one (minutes)."""
    return 1 if os.environ.get("FLASH_ATTN_DET_EXHAUSTIVE") == "1" else 251
