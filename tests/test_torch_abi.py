"""The C re-declaration of PyTorch's stable ABI, checked against PyTorch: types by a compiler, symbols by the loader."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import flash_attn_det

CSRC = Path(__file__).parent.parent / "csrc"
DECLARATIONS = CSRC / "torch" / "stable_abi.h"
LIBRARIES = Path(flash_attn_det.__file__).parent / "lib"

# The first inclusion declares our functions again beside PyTorch's: compilers refuse conflicting extern "C" functions.
# The second compares each type, so that the test does not rest on what a compiler is willing to refuse.
# USE_CUDA: the headers of every build hold the declarations of CUDA builds, and hide them from others.
PROBE = """
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <type_traits>
#include "{header}"
#undef FAD_TORCH_STABLE_ABI_H
#undef FAD_TORCH_FUNCTION
#undef FAD_TORCH_CUDA_FUNCTION
#define FAD_TORCH_FUNCTION(result, name, ...) \\
    static_assert(std::is_same_v<decltype(name), result(__VA_ARGS__)>, #name " has another type in PyTorch");
#define FAD_TORCH_CUDA_FUNCTION FAD_TORCH_FUNCTION
#include "{header}"
static_assert(AOTI_TORCH_SUCCESS == 0, "the shim takes 0 for success");
"""


def declared_names(macro: str = "FAD_TORCH_FUNCTION") -> list[str]:
    return re.findall(rf"^{macro}\(.*?, (\w+)", DECLARATIONS.read_text(), flags=re.MULTILINE)


def compile_probe(folder: Path, header: Path) -> subprocess.CompletedProcess:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (c++ or $CXX)")
    source = folder / "probe.cpp"
    source.write_text(PROBE.format(header=header))
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    # the ABI version that the shim registers with: functions added to torch later must not be visible
    return subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-fsyntax-only",
            "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
            *includes,
            str(source),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def test_declarations_have_the_types_of_pytorch(tmp_path):
    result = compile_probe(tmp_path, DECLARATIONS)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "name",
    [
        "aoti_torch_get_dim",
        "aoti_torch_empty_strided",
        "torch_get_num_threads",
        "aoti_torch_create_device_guard",
        "aoti_torch_get_current_cuda_stream",
    ],
)
def test_a_wrong_declaration_is_found(tmp_path, name):
    wrong = tmp_path / "wrong.h"
    text = DECLARATIONS.read_text()
    text, count = re.subn(
        rf"^(FAD_TORCH_\w+)\(AOTITorchError, {name},", rf"\1(int64_t, {name},", text, flags=re.MULTILINE
    )
    assert count == 1
    wrong.write_text(text)
    result = compile_probe(tmp_path, wrong)
    assert result.returncode != 0
    assert name in result.stderr


def test_every_declared_function_is_in_libtorch():
    process = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    names = declared_names()
    assert len(names) > 20
    assert [name for name in names if not hasattr(process, name)] == []


def test_every_cuda_function_is_in_libtorch_cuda():
    path = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not path.exists():
        pytest.skip("needs a CUDA build of torch")
    process = ctypes.CDLL(str(path))
    names = declared_names("FAD_TORCH_CUDA_FUNCTION")
    assert names
    assert [name for name in names if not hasattr(process, name)] == []


def test_every_declared_function_is_used():
    sources = "".join(path.read_text() for path in (CSRC / "torch").glob("*.c"))
    names = declared_names() + declared_names("FAD_TORCH_CUDA_FUNCTION")
    assert [name for name in names if name not in sources] == []


def test_kernels_are_registered_for_both_devices():
    for name in ("flash_attn_det::fwd", "flash_attn_det::fwd_partials"):
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def test_the_build_needs_no_torch(tmp_path):
    """setup.py imports none, and the shim compiles and links its stub with no header but our own and the system's."""
    root = CSRC.parent
    imports = re.findall(r"^(?:import|from) +(\w+)", (root / "setup.py").read_text(), flags=re.MULTILINE)
    assert "setuptools" in imports
    assert "torch" not in imports
    if shutil.which("make") is None or shutil.which("cc") is None:
        pytest.skip("needs make and a C compiler (cc)")
    sources = [path.stem for path in (CSRC / "torch").glob("*.c") if path.stem != "stub"]
    objects = [*(tmp_path / "torch" / f"{name}.o" for name in sources), tmp_path / "stub" / "libtorch_cpu.so"]
    environment = {"PATH": os.environ["PATH"]}  # no CFLAGS or CPATH that could lead to torch's headers
    subprocess.run(
        ["make", "-C", CSRC, f"BUILD={tmp_path}", *objects], env=environment, check=True, capture_output=True
    )
    for makefile in (tmp_path / "torch").glob("*.d"):  # -MMD lists every header that is not the system's
        headers = set(re.findall(r"\S+\.h\b", makefile.read_text()))
        assert headers <= {"torch/call.h", "torch/stable_abi.h", "torch/../flash_attn_det.h"}


def test_libraries_need_nothing_of_python_or_cxx():
    """What one binary for every Python and torch rests on: the C library, libm, our core, and torch's SONAME."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    allowed = {
        "libflash_attn_det.so": {"libc", "libm", "libdl", "ld-linux"},
        "libflash_attn_det_torch.so": {
            *("libc", "libm", "libdl", "ld-linux", "libgcc_s"),
            *("libflash_attn_det", "libtorch_cpu"),
        },
    }
    for library, names in allowed.items():
        command = ["readelf", "-d", LIBRARIES / library]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        needed = {re.match(r"ld-linux|\w+", name)[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", listing)}
        assert needed <= names, library


def test_libraries_export_only_their_api():
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    for library, prefix in (("libflash_attn_det.so", "fad_"), ("libflash_attn_det_torch.so", "fad_torch_")):
        listing = subprocess.run(
            ["nm", "-D", "--defined-only", LIBRARIES / library], capture_output=True, text=True, check=True
        ).stdout
        exported = [line.split()[-1] for line in listing.splitlines()]
        assert exported
        assert [name for name in exported if not name.startswith(prefix)] == []
