"""Builds the native CPU sweeps where torch and a C++ compiler are at hand; installs without them otherwise."""

import json
import os
import platform
import shutil
import subprocess
import sys
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

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
# Or GCC, short of registers in a loop, makes integer constants anew in each round, by three instructions each.
GCC_X86 = ["-mtune-ctrl=^inter_unit_moves_to_vec"]
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []

# The kernels of the CUDA backend. They need nvcc, and no CUDA in torch. ROBUSTFT_CUDA=0 leaves them out.
# ROBUSTFT_CUDA_ARCHITECTURES="90 120" replaces the GPUs that they are compiled for. A GPU runs what was compiled for
# its own major version. Newer ones compile the PTX of the last.
KERNELS = Path("csrc/cuda/sweeps.cu")
ARCHITECTURES = (80, 90, 100)
# No contraction here either, so the bits are those of the CPU. Exact roots and divisions are nvcc's defaults.
NVCC_FLAGS = ["--options-file", "csrc/cuda/nvcc.options", "-Xfatbin=-compress-all"]


# Kernels and host were compiled from the same sources, or the kernels are refused: they share the layout of memory.
CSRC = sorted(path for path in Path("csrc").rglob("*") if path.is_file())
SIGNATURE = "s" + sha256(b"".join(path.read_bytes() for path in CSRC)).hexdigest()[:16]


def signed():
    """The folder of a header with the signature. It is written if it is new, so that only what includes it is built
    again."""
    header, text = Path("build", "signature", "robustft_signature.h"), f"#define ROBUSTFT_SOURCES {SIGNATURE}\n"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return str(header.parent.resolve())


def gcc_flags():
    """What GCC alone understands."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    try:
        told = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return GCC_X86 if "Free Software Foundation" in told else []


def nvcc():
    """The path of nvcc, or None where it is not, or not wanted."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    places = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return None if os.environ.get("ROBUSTFT_CUDA") == "0" else shutil.which("nvcc", path=os.pathsep.join(places))


def compile_kernels(folder):
    """Compiles the kernels into a folder. Says so if it cannot; the rest is installed all the same."""
    target = Path(folder) / "_sweeps.fatbin"
    compiler, asked = nvcc(), os.environ.get("ROBUSTFT_CUDA_ARCHITECTURES", "").split()
    if compiler is None:
        if os.environ.get("ROBUSTFT_CUDA") == "0":
            target.unlink(missing_ok=True)
        return say_missing("cuda", "there was no nvcc, or ROBUSTFT_CUDA=0")
    try:
        known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        wanted = asked or [str(k) for k in ARCHITECTURES if f"compute_{k}\n" in known]
        codes = [f"-gencode=arch=compute_{k},code=sm_{k}" for k in wanted]
        codes.append("-gencode=arch=compute_{0},code=compute_{0}".format(wanted[-1]))
        flags = ["-fatbin", "--threads=0", *NVCC_FLAGS, f"-DROBUSTFT_SOURCES={SIGNATURE}", *codes]
        subprocess.run([compiler, *flags, str(KERNELS), "-o", str(target)], check=True)
    except (OSError, IndexError, subprocess.CalledProcessError) as error:
        target.unlink(missing_ok=True)
        say_missing("cuda", f"nvcc did not compile its kernels ({error})")


def native_extension():
    """The keyword arguments that build robustft_kernels._native, or none where torch is absent."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        say_missing("native", f"torch could not be imported in the build environment ({error})")
        return {}

    class OptionalBuild(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.force = True  # or, without ninja, what was built here for another torch passes for up to date

        def run(self):
            folder = Path(self.get_ext_fullpath("robustft_kernels._native")).parent
            try:
                super().run()
                compile_kernels(folder)
            except Exception as error:  # whatever a tool chain can do wrong
                told = (str(error).splitlines() or [""])[0]
                say_missing("native", f"{type(error).__name__}: {told}; a C++20 compiler (g++ or clang++) is needed")
                self.extensions = []  # or an editable install looks for what was not built
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_built.json").write_text(json.dumps({"torch": torch.__version__, **MISSING}))

        def build_extension(self, extension):
            if not self.use_ninja:  # setuptools compiles one source after another
                self.compiler.compile = at_once(self.compiler.compile)
            super().build_extension(extension)

    flags = {"cxx": FLAGS + OPENMP + gcc_flags()}
    extension = CppExtension("robustft_kernels._native", SOURCES, include_dirs=[signed()], extra_compile_args=flags)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


def at_once(compile_all):
    """The same function of sources, which it compiles on as many cores as there are."""

    def compile_at_once(sources, **options):
        with ThreadPool(os.cpu_count()) as threads:
            return sum(threads.map(lambda source: compile_all([source], **options), sources), [])

    return compile_at_once


MISSING = {}  # the backends that are left out, and why


def say_missing(backend, what):
    MISSING[backend] = what
    print(f"robustft_kernels: installing WITHOUT the {backend} backend: {what}.", file=sys.stderr)


setup(
    license="MIT",
    packages=[*find_packages(include=["robustft_kernels*"]), "robustft_kernels.triton_kernels"],
    package_dir={"robustft_kernels.triton_kernels": "triton_kernels"},
    **native_extension(),
)
