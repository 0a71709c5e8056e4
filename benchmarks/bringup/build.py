"""A program that builds the C++ extension in place, unless it is there and no older than its sources.

python -m benchmarks.bringup.build        needs torch, setuptools and a C++ compiler
"""

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

from benchmarks.machine import ROOT

from .items import Log

IMPORTED = "from robustft_kernels.backends import native; print(native.MISSING)"


def missing() -> str:
    """Why the extension cannot be imported, or "". Asked of a new process, which has not tried it before."""
    run = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        return run.stderr.strip().rpartition("\n")[2]
    return run.stdout.strip()


def fresh() -> bool:
    """Whether it is there for this Python, and no older than its sources."""
    built = [ROOT / "robustft_kernels" / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    times = [file.stat().st_mtime for file in built if file.exists()]
    sources = [ROOT / "setup.py", *(file for file in (ROOT / "csrc").rglob("*") if file.is_file())]
    return bool(times) and max(times) >= max(file.stat().st_mtime for file in sources)


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


if __name__ == "__main__":
    Log().each({"C++ extension": build})
