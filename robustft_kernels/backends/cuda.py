"""The door to the CUDA backend: the kernels of csrc/cuda, compiled ahead of time, on CUDA tensors."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.contract import Run, StepTable
from . import built, native
from .backend import KERNEL_DTYPES, Backend, first_line, tried

KERNELS = Path(__file__).parents[1] / "_sweeps.fatbin"  # setup.py puts it there


def missing() -> str:
    """Why the kernels cannot run here, or ""."""
    if native.MISSING:
        return native.MISSING
    if not KERNELS.exists():
        why = built.failure("cuda") or f"put nvcc on PATH, and then: {built.command()}"
        return f"its kernels are not compiled: {why}"
    if torch.version.hip is not None:
        return "it serves CUDA, and this torch is built for ROCm, where Triton serves"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def trial(device: torch.device | None = None) -> str:
    """Why the kernels cannot be loaded on a GPU, or "". Asked once a process for each GPU. None is the current GPU.

    This starts CUDA, so it is asked only when tensors on a GPU are to be served, or by `backends()`.
    """
    return tried(device, _try_on)


@cache
def _try_on(index: int) -> str:
    try:
        _load()
        native.try_kernels(index)
    except RuntimeError as error:
        return f"{first_line(error)} (cuda:{index})"
    return ""


@cache
def _load() -> None:
    native.use_kernels(KERNELS.read_bytes())


class PreparedStep:
    """A prepared step, as contract.Run describes it. It goes on torch's current stream of its GPU."""

    def __init__(self, step: Any, device: torch.device) -> None:
        self._step, self._device = step, device

    def __call__(
        self, grads: list[Tensor] | None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        self._step.run(grads, grad_scale, found_inf, _stream(self._device))

    def squared_norm(self, grads: list[Tensor] | None) -> Tensor:
        """Σ g² over all gradients, a float64 on their device."""
        squared: Tensor = self._step.squared_norm(grads, _stream(self._device))
        return squared


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def prepare(table: StepTable) -> Run:
    """The step of a table of CUDA tensors. Raises RuntimeError naming the first tensor that does not fit."""
    if native.MISSING:
        raise RuntimeError(f"backend='cuda' is not available: {native.MISSING}")
    _load()
    device = table.results.device
    return PreparedStep(native.prepare_cuda(table, device.index or 0), device)


BACKEND = Backend(
    "cuda", prepare, missing, lambda: "cuda", KERNEL_DTYPES, trial=trial, keeps_addresses=True, at_once=True
)
