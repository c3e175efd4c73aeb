"""Builds the C libraries with make and packs them into a wheel that serves every Python and every torch.

Neither torch nor Python headers are needed: the shim speaks PyTorch's stable C ABI and is loaded through ctypes.
CC, CFLAGS and NVCC are honoured, as in `CC=clang pip install .`. CUDA kernels come in if nvcc is found, GPU or not:
FLASH_ATTN_DET_CUDA=1 makes a missing nvcc an error, FLASH_ATTN_DET_CUDA=0 leaves them out, and
FLASH_ATTN_DET_CUDA_ARCHS="80 90" lists the compute capabilities. csrc/Makefile knows the rest.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

PACKAGE_LIB = Path("flash_attn_det", "lib")


def built_libraries() -> list[Path]:
    """What make builds with this environment: the C library, the torch ops, and the CUDA kernels unless left out."""
    command = ["make", "--silent", "--no-print-directory", "-C", "csrc", "libraries"]
    return [Path(path) for path in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


class BuildLibraries(Command):
    """Sub-command of build: make -C csrc, then copy the libraries into the package (in place if editable)."""

    description = "build the C libraries"
    user_options = ()
    build_lib = None
    editable_mode = False

    def initialize_options(self):
        pass

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        jobs = len(os.sched_getaffinity(0))
        subprocess.run(["make", "-C", "csrc", f"-j{jobs}"], check=True)  # says whether CUDA kernels are in, or why not
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        for library in built_libraries():
            new = target / f"{library.name}.new"
            shutil.copy2(library, new)
            new.replace(target / library.name)  # a process that runs the old library keeps it
        for path in {str(path) for path in target.iterdir()} - set(self.get_outputs()):
            os.unlink(path)  # an earlier build's CUDA kernels, if this one has none

    def _target(self) -> Path:
        return PACKAGE_LIB if self.editable_mode else Path(self.build_lib, PACKAGE_LIB)

    def get_outputs(self) -> list[str]:
        return [str(self._target() / library.name) for library in built_libraries()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path) for path in Path("csrc").rglob("*") if path.is_file()]


class Build(build):
    sub_commands = (*build.sub_commands, ("build_libraries", None))


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: machine code, but none that knows a Python version."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    distclass=PlatformDistribution,
    cmdclass={"build": Build, "build_libraries": BuildLibraries, "bdist_wheel": PlatformWheel},
)
