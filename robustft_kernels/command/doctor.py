"""What is installed, what torch sees, how long a small step takes here, and what would make it faster."""

import os
import platform
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import nn

from ..backends.registry import BACKENDS, backends, objection_to
from ..optim.optimizers import AnchoredAdamW

PACKAGES = ("robustft_kernels", "torch", "triton", "numpy", "safetensors", "click", "tqdm", "matplotlib")
TENSORS, SIZE = 64, 16384  # a small step: a million weights, as of adapters
_ROUNDS = 9
_TORCH = "torch.optim.AdamW(fused=True)"


def report() -> Iterator[str]:
    """The lines of the report, each as soon as it is known. It makes steps on the CPU, and on the GPU if there is
    one."""
    yield "versions"
    yield f"  {'python':<18} {platform.python_version()}, {platform.platform()}"
    for name in PACKAGES:
        yield f"  {name:<18} {_version(name)}"
    ready = backends()
    yield "backends"
    for name, reason in ready.items():
        yield f"  {name:<18} {reason or 'ready'}"
    devices = _devices()
    yield "torch sees"
    yield f"  {'cpu':<18} {torch.get_num_threads()} threads for {_cores()} cores, {_instructions()}"
    for device in devices[1:]:
        yield f"  {device!s:<18} {torch.cuda.get_device_name(device)}"
    yield f"a step of {TENSORS} tensors of {SIZE:,} float32 weights: AdamW with SPD, against torch's AdamW"
    for device in devices:
        yield from _timings(device)
    yield "what would make it faster"
    for line in advice(ready):
        yield f"  {line}"


def advice(ready: dict[str, str]) -> list[str]:
    """What to do for faster steps, one line each.

    ready: as `backends` gives it.
    """
    lines = []
    if ready["native"]:
        lines.append(f"the native backend serves the CPU: {ready['native']}")
    if torch.cuda.is_available():
        reasons = {name: ready[name] for name in ("cuda", "triton")}
        if all(reasons.values()):
            lines += [f"the {name} backend serves the GPU: {reason}" for name, reason in reasons.items()]
    elif Path("/proc/driver/nvidia/version").exists():
        lines.append("there is an NVIDIA driver, and torch sees no GPU: install a torch that is built for CUDA")
    if torch.get_num_threads() < _cores():
        lines.append(f"torch uses {torch.get_num_threads()} of {_cores()} cores: see OMP_NUM_THREADS")
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > _cores():
        lines.append(f"other programs want the cores (load {load:.1f} on {_cores()}), so these times say little")
    if _instructions() == "DEFAULT":
        lines.append("this CPU has no AVX2, and steps are several times slower without")
    return lines or ["nothing that is known: the fastest backend of each device is ready"]


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)  # which also names its build, as in 2.10.0+cu128
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *gpus]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _instructions() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _timings(device: torch.device) -> Iterator[str]:
    """The median of each contender's steps. They take turns, so what slows the machine for a while slows all."""
    contenders = {_TORCH: _contender(device, lambda params: torch.optim.AdamW(params, fused=True))}
    for name, backend in BACKENDS.items():
        if not (backend.not_chosen() or objection_to(name, device, {torch.float32})):
            contenders[f"backend {name}"] = _contender(
                device,
                lambda params, name=name: AnchoredAdamW(params, method="spd", backend=name),  # type: ignore[misc]
            )
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_ROUNDS):
        for name, step in contenders.items():
            times[name].append(step())
    theirs = median(times[_TORCH][1:])
    for name, of in times.items():
        ours = median(of[1:])  # the first builds what later ones use
        yield f"  {device.type:<5} {name:<30} {ours * 1e3:9.3f} ms  {ours / theirs:6.2f} times torch's"


def _contender(
    device: torch.device, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> Callable[[], float]:
    """A function that makes a few steps, and returns the seconds of one."""
    params = [nn.Parameter(torch.zeros(SIZE, device=device)) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says what is slow
        optimizer = make(params)

    def step() -> float:
        steps = 3
        _wait(device)
        start = perf_counter()
        for _ in range(steps):
            optimizer.step()
        _wait(device)
        return (perf_counter() - start) / steps

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
