"""A program that builds the C++ extension and the kernels of the CUDA backend in place, unless they are there and no
older than their sources.

python -m benchmarks.bringup.build        needs torch, setuptools and a C++ compiler, and nvcc for the kernels

Without nvcc an existing robustft_kernels/_sweeps.fatbin stays, so one that was compiled elsewhere from the same sources
may be carried here.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

from benchmarks.machine import ROOT

from .facts import told, tools
from .items import Log

IMPORTED = "from robustft_kernels.backends import native; print(native.MISSING)"
ASKED = """
import json
from robustft_kernels.backends.registry import BACKENDS, backends
print(json.dumps([BACKENDS["cuda"].missing(), backends()]))
"""
FOLDER = ROOT / "robustft_kernels"
KERNELS = "_sweeps.fatbin"


def missing() -> str:
    """Why the extension cannot be imported, or "". Asked of a new process, which has not tried it before."""
    run = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        return run.stderr.strip().rpartition("\n")[2]
    return run.stdout.strip()


def has_nvcc() -> bool:
    """Whether the kernels are compiled here."""
    return os.environ.get("ROBUSTFT_CUDA") != "0" and tools()["nvcc"]


def fresh() -> bool:
    """Whether it is there for this Python, and no older than its sources. So are the kernels, if there is nvcc."""
    sources = [ROOT / "setup.py", *(file for file in (ROOT / "csrc").rglob("*") if file.is_file())]
    newest = max(file.stat().st_mtime for file in sources)
    extension = [f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    wanted = [extension, [KERNELS]] if has_nvcc() else [extension]
    files = [[FOLDER / name for name in names if (FOLDER / name).exists()] for names in wanted]
    return all(max((file.stat().st_mtime for file in found), default=0.0) >= newest for found in files)


def build() -> dict[str, Any]:
    """Raises RuntimeError with the reason if a compiler is there, and yet no extension afterwards."""
    if fresh() and not missing():
        return {"did": "nothing, since it is there"}
    if not any(map(shutil.which, compilers := (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        return {"outcome": "skipped", "why": f"no C++ compiler: none of {', '.join(compilers)}"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    run = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    print(run.stderr, file=sys.stderr)
    if why := missing():
        told = [line for line in run.stderr.splitlines() if "WITHOUT" in line] or run.stderr.splitlines()[-1:]
        raise RuntimeError(f"setup.py: {' '.join(told) or why}")
    return {"did": "built it"}


@cache
def ready() -> tuple[str, dict[str, str]]:
    """Why the CUDA backend is not here, or "", and what `backends()` says. Asked of a new process too."""
    run = subprocess.run([sys.executable, "-c", ASKED], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr.strip().rpartition("\n")[2])
    missing_, all_ = json.loads(run.stdout)
    return missing_, all_


def kernels() -> dict[str, Any]:
    """Raises RuntimeError with the reason if the CUDA backend should be ready after the build, and is not. Where there
    is no GPU, or neither nvcc nor a file from elsewhere, it is left out."""
    absent, of = ready()
    if has_nvcc() and not (FOLDER / KERNELS).exists():
        raise RuntimeError(f"setup.py has not compiled them, though there is nvcc: {absent}")
    if absent:
        return {"outcome": "skipped", "why": absent}
    if of["cuda"]:
        raise RuntimeError(of["cuda"])
    return {"did": "loaded them on the GPU"}


if __name__ == "__main__":
    Log().each(
        {
            "C++ extension": build,
            "kernels of the CUDA backend": kernels,
            "backends, after the build": lambda: {"facts": told(ready()[1])},
        }
    )
