"""The door to the Triton kernels, which serve CUDA and ROCm tensors. In Triton's interpreter they serve CPU tensors."""

import importlib.util
import os
import warnings
from functools import cache, partial

import torch

from ..core.contract import Run, StepTable
from .backend import KERNEL_DTYPES, Backend
from .native import MISSING, addresses


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors. That is slow, and meant for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def missing() -> str:
    """Why the kernels cannot run here, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    return ""


def prepare(table: StepTable, *, tickets: bool) -> Run:
    """The step of a table. tickets: whether in one launch. Raises ValueError naming the first tensor that does not
    fit."""
    from ..triton_kernels.launch import PreparedStep

    if MISSING and not interpreted():
        _tell_of_slow_host()
    run: Run = PreparedStep(table, addresses=addresses, tickets=tickets)
    return run


@cache
def _tell_of_slow_host() -> None:
    warnings.warn(
        f"robustft_kernels: the C++ extension is absent ({MISSING}). Steps on the GPU work without it, but the host "
        "needs many times longer to start each one",
        RuntimeWarning,
        stacklevel=2,
    )


def _form(name: str, tickets: bool) -> Backend:
    return Backend(
        name,
        partial(prepare, tickets=tickets),
        missing,
        lambda: "cpu" if interpreted() else "cuda",
        KERNEL_DTYPES,
        keeps_addresses=True,
        not_chosen=lambda: "its interpreter is for tests" if interpreted() else "",
    )


TWO_LAUNCHES = _form("triton", tickets=False)
ONE_LAUNCH = _form("triton_tickets", tickets=True)
