"""Builds the native CPU sweeps where torch and a C++ compiler are at hand; installs without them otherwise."""

import os
import platform
import sys
from multiprocessing.pool import ThreadPool

from setuptools import find_packages, setup

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/cpu/schedule.cpp",
    "csrc/cpu/digest.cpp",
    "csrc/cpu/sweeps_baseline.cpp",
    "csrc/cpu/sweeps_avx2.cpp",
    "csrc/cpu/sweeps_avx512.cpp",
]
# No FMA contraction: every instruction set gives the same bits. OpenMP is compiled but never linked, so that
# at::parallel_for finds torch's own runtime: a second one would make both spin.
FLAGS = [
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # of GCC 12's own intrinsics
]
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []


def native_extension():
    """The keyword arguments that build robustft_kernels._native, or none where torch is absent."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        say_missing(
            f"torch cannot be imported in the build environment ({error}); "
            "install torch first and build with --no-build-isolation"
        )
        return {}

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # whatever a tool chain can do wrong
                say_missing(
                    f"the C++ extension did not build ({type(error).__name__}: {error}); "
                    "a C++20 compiler (g++ or clang++) is needed"
                )
                self.extensions = []  # or an editable install looks for what was not built

        def build_extension(self, extension):
            if not self.use_ninja:  # setuptools compiles one source after another
                self.compiler.compile = at_once(self.compiler.compile)
            super().build_extension(extension)

    extension = CppExtension("robustft_kernels._native", SOURCES, extra_compile_args={"cxx": FLAGS + OPENMP})
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


def at_once(compile_all):
    """The same function of sources, which it compiles on as many cores as there are."""

    def compile_at_once(sources, **options):
        with ThreadPool(os.cpu_count()) as threads:
            return sum(threads.map(lambda source: compile_all([source], **options), sources), [])

    return compile_at_once


def say_missing(what):
    print(f"robustft_kernels: installing WITHOUT the native backend: {what}.", file=sys.stderr)


setup(
    license="MIT",
    packages=[*find_packages(include=["robustft_kernels*"]), "robustft_kernels.triton_kernels"],
    package_dir={"robustft_kernels.triton_kernels": "triton_kernels"},
    **native_extension(),
)
