"""A program that tells what the machine is, and which tools it has.

python -m benchmarks.bringup.facts cuda
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

import robustft_kernels as rft
from benchmarks.machine import describe, versions_of

from .items import Log

PACKAGES = ("torch", "triton", "numpy", "pytest", "setuptools", "ninja", "pytest-benchmark", "pytest-xdist")
TOOLS = ("c++", "g++", "cc", "gcc", "ninja", "make", "nvidia-smi", "ptxas", "nvcc", "compute-sanitizer")


def machine(device: str) -> dict[str, Any]:
    facts = describe(torch.device(device))
    if device == "cuda":
        facts.update(gpu_facts())
    facts["header of Python"] = Path(sysconfig.get_path("include"), "Python.h").exists()
    return facts


def tools() -> dict[str, bool]:
    """Which are there, on PATH or where setup.py looks for nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return {name: bool(shutil.which(name, path=places)) for name in TOOLS}


def told(backends: dict[str, str]) -> dict[str, str]:
    """What `backends()` says, in words."""
    return {name: f"is not ready ({why})" if why else "is ready" for name, why in backends.items()}


def gpu_facts() -> dict[str, Any]:
    of = torch.cuda.get_device_properties()
    return {
        "capability": f"{of.major}.{of.minor}",
        "memory, GB": round(of.total_memory / 1e9, 1),
        "processors": of.multi_processor_count,
        "L2, MB": round(getattr(of, "L2_cache_size", 0) / 1e6, 1),
        "peak, GB/s": round(peak() / 1e9),
        "CUDA": torch.version.cuda,
    }


def peak() -> float:
    """The bytes a second of the GPU's memory by its clock and width, 0 if torch does not tell them."""
    of = torch.cuda.get_device_properties()
    clock, width = getattr(of, "memory_clock_rate", 0), getattr(of, "memory_bus_width", 0)  # kHz, bits
    return 2 * clock * 1e3 * width / 8


def main(device: str) -> None:
    log = Log()
    if device == "cuda" and not torch.cuda.is_available():
        log.begin("a GPU")
        log.end("a GPU", "failed", why="torch sees no GPU")
        return
    log.each(
        {
            "machine": lambda: {"facts": machine(device)},
            "packages": lambda: {"facts": versions_of(PACKAGES)},
            "tools": lambda: {"facts": tools()},
            "backends, before the build": lambda: {"facts": told(rft.backends())},
        }
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
