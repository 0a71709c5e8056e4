"""The door to the Triton kernels, which serve CUDA and ROCm tensors. In Triton's interpreter they serve CPU tensors."""

import importlib.util
import os
import warnings
from functools import cache, partial
from typing import Any

import torch

from ..core.contract import Run, StepTable
from .backend import KERNEL_DTYPES, Backend, first_line, tried
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


def trial(device: torch.device | None = None) -> str:
    """Why a kernel cannot run on a GPU, or "". An empty kernel is compiled and launched there, once a process for
    each GPU.

    This starts CUDA, so it is asked only when tensors on a GPU are to be served, or by `backends()`. It allocates
    nothing and does not wait. None is the current GPU.
    """
    return "" if interpreted() else tried(device, _try_on)


@cache
def _try_on(index: int) -> str:
    try:
        with torch.cuda.device(index):
            _launch_nothing()
    except Exception as error:
        return (
            f"Triton cannot run a kernel on cuda:{index} ({first_line(error)}). It needs a C compiler and Python's "
            "headers: install gcc or clang, or name a compiler in CC"
        )
    return ""


def _launch_nothing() -> None:
    from ..triton_kernels import launch  # noqa: F401 - whether they can be imported, too

    triton: Any = importlib.import_module("triton")
    triton.jit(_nothing)[(1,)](enable_fp_fusion=False)


def _nothing():  # type: ignore[no-untyped-def]
    """A kernel without arguments, which does nothing."""


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
        "needs two to four times as long to start each one",
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
        trial=trial,
        keeps_addresses=True,
        not_chosen=lambda: "its interpreter is for tests" if interpreted() else "",
    )


TWO_LAUNCHES = _form("triton", tickets=False)
ONE_LAUNCH = _form("triton_tickets", tickets=True)
