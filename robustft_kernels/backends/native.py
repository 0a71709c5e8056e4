"""The door to the native backend: the sweeps of csrc, on CPU tensors."""

import ctypes
import importlib.util
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from ..core.contract import Run, StepTable
from . import built
from .backend import KERNEL_DTYPES, Backend

_native: Any = None
MISSING = built.objection()
if not MISSING and importlib.util.find_spec("robustft_kernels._native") is None:
    MISSING = f"the C++ extension is not built; {built.command()}"
if not MISSING:
    try:
        from .. import _native
    except ImportError as error:
        MISSING = f"the C++ extension cannot be loaded ({error}); build it anew: {built.command()}"
ISA = "" if MISSING else _native.ISA  # the instruction set of its sweeps


def prepare(table: StepTable) -> Run:
    """The step of a table of CPU tensors. Raises RuntimeError naming the first tensor that does not fit."""
    if MISSING:
        raise RuntimeError(f"backend='native' is not available: {MISSING}")
    run: Run = getattr(_native, f"prepare_{table.base.name}")(table)
    return run


def prepare_cuda(table: StepTable, device: int) -> Any:
    """The step of a table of CUDA tensors, as the CUDA backend calls it: with a stream besides."""
    return getattr(_native, f"prepare_cuda_{table.base.name}")(table, device)


def use_kernels(image: bytes, functions: dict[str, int] | None = None) -> None:
    """Makes this image the kernels of the CUDA backend. functions: addresses of those of a driver that is not CUDA's,
    by name."""
    _native.use_kernels(image, functions)


def try_kernels(device: int) -> None:
    """Loads them on a GPU. Raises RuntimeError saying why it cannot."""
    _native.try_kernels(device)


def addresses(tensors: list[Tensor], out: Tensor) -> int:
    """Writes the address of each tensor's memory to `out`, int64 on the CPU. Returns them or-ed together. A power of
    two that divides this divides each."""
    if _native is not None:
        return int(_native.addresses(tensors, out))
    assert out.is_contiguous()
    assert out.dtype == torch.int64
    all_of: list[Any] = list(map(Tensor.data_ptr, tensors))
    (ctypes.c_int64 * out.numel()).from_address(out.data_ptr())[:] = all_of
    return reduce(or_, all_of, 0)


def digest(flat: Tensor, sizes: list[int], steps: list[int], first: int) -> Tensor | None:
    """What digests.sums_of describes, in C++. None without the extension, and for tensors that are not on the CPU."""
    return None if _native is None or flat.device.type != "cpu" else _native.digest(flat, sizes, steps, first)


def fingerprint(params: list[Tensor], kept: list[dict[str, Any]], addresses: bool, last: bytes | None) -> bytes | None:
    """What step.fingerprint describes, in C++. None without the extension."""
    return None if _native is None else _native.fingerprint(params, kept, addresses, last)


def forms(tensors: list[Tensor], addresses: bool) -> bytes | None:
    """What step.fingerprint describes, in C++. None without the extension."""
    return None if _native is None else _native.forms(tensors, addresses)


BACKEND = Backend("native", prepare, lambda: MISSING, lambda: "cpu", KERNEL_DTYPES, at_once=True)
