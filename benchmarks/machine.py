"""The machine that measures: what it is, whether something else keeps it busy, and how much memory is left."""

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import robustft_kernels as rft
from robustft_kernels.backends import native, registry

BUSY = 0.2  # cores that others may use
GLANCE = 0.3  # seconds that it takes to see whether they do
ROOT = Path(__file__).parent.parent
BACKENDS = {"cpu": ("native",), "cuda": ("cuda", "triton", "triton_tickets")}  # those with kernels for a device
SOURCES = ("robustft_kernels", "triton_kernels", "csrc", "benchmarks", "tests")


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package, or ""."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def serving(device: torch.device) -> dict[str, str]:
    """The backends with kernels for a type of device: "" for one that is ready, else why it is not."""
    ready = rft.backends()
    return {name: ready[name] for name in BACKENDS[device.type]}


def refusal(device: torch.device) -> str:
    """Why no backend has kernels for the device here, or ""."""
    found = serving(device)
    return "; ".join(f"{name}: {why}" for name, why in found.items()) if all(found.values()) else ""


def describe(device: torch.device) -> dict[str, Any]:
    """What must stand beside a number for it to mean anything."""
    facts: dict[str, Any] = {"commit": commit(), "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        facts.update(device=torch.cuda.get_device_name(), driver=driver, backend=chosen(device))
        return {**facts, **versions_of(["triton"])}
    name = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {**facts, "device": name or platform.machine(), "cores": os.cpu_count(), "isa": native.ISA}


def chosen(device: torch.device) -> str:
    """The backend that "auto" takes there."""
    return registry.choose_backend("auto", device, {torch.float32}).name


def commit() -> str:
    """What git calls the sources, or their digest if this is no repository."""
    return said("git", "describe", "--always", "--dirty") or f"none, sources {_digest()}"


def said(*command: str) -> str:
    """What a program prints, or "" if it is not there or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return "" if run.returncode else run.stdout.strip()


def _digest() -> str:
    names = [name for folder in SOURCES for name in (ROOT / folder).rglob("*")]
    files = sorted(name for name in names if name.suffix in (".py", ".cpp", ".h", ".inc"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


class Others:
    """How many cores other processes use, from when this is made until it is asked."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.perf_counter(), _ticks() / os.sysconf("SC_CLK_TCK"), time.process_time()

    def cores(self) -> float:
        elapsed, busy, own = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return max(0.0, busy - own) / elapsed if elapsed else 0.0


def wait_until_idle(seconds: float = 60) -> bool:
    """Whether other processes let the machine go within so many seconds."""
    ends = time.monotonic() + seconds
    while True:
        others = Others()
        time.sleep(GLANCE)
        if others.cores() <= BUSY:
            return True
        if time.monotonic() > ends:
            return False


def free_memory(device: torch.device) -> int:
    """In bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    kib = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")), "0")
    return 1024 * int(kib)


def _ticks() -> int:
    """The ticks that all cores together have been at work, 0 if the system does not tell."""
    user, nice, system = map(int, (_lines("/proc/stat") or ["cpu 0 0 0"])[0].split()[1:4])
    return user + nice + system


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if os.path.exists(file) else []
