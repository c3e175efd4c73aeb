"""Builds the C libraries with make and packs them into a wheel that serves every Python and every torch.

Neither torch nor Python headers are needed: the shim speaks PyTorch's stable C ABI and is loaded through ctypes.
CC and CFLAGS are honoured, as in `CC=clang pip install .`.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

LIBRARIES = ("libflash_attn_det.so", "libflash_attn_det_torch.so")
PACKAGE_LIB = Path("flash_attn_det", "lib")


class BuildLibraries(Command):
    """Sub-command of build: make -C csrc, then copy the libraries into the package (in place if editable)."""

    description = "build the C libraries"
    user_options = ()
    build_lib = None
    build_temp = None
    editable_mode = False

    def initialize_options(self):
        pass

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))

    def run(self):
        objects = Path(self.build_temp, "native").absolute()
        jobs = len(os.sched_getaffinity(0))
        subprocess.run(["make", "-C", "csrc", f"-j{jobs}", f"BUILD={objects}"], check=True)
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        for name in LIBRARIES:
            shutil.copy2(objects / name, target / name)

    def _target(self) -> Path:
        return PACKAGE_LIB if self.editable_mode else Path(self.build_lib, PACKAGE_LIB)

    def get_outputs(self) -> list[str]:
        return [str(self._target() / name) for name in LIBRARIES]

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
