"""What a backend declares."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core.contract import Run, StepTable

KERNEL_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def tried(device: torch.device | None, try_on: Callable[[int], str]) -> str:
    """What `try_on` says of a GPU, by its index. "" for other devices, and while torch.compile traces. It starts CUDA.
    None is the current GPU."""
    if torch.compiler.is_compiling() or (device is not None and device.type != "cuda"):
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # as in a forked process
        return f"CUDA does not start ({first_line(error)})"
    return try_on(torch.cuda.current_device() if device is None or device.index is None else device.index)


def first_line(error: BaseException) -> str:
    """Its kind, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


@dataclass(frozen=True)
class Backend:
    """One way to execute a step.

    prepare: from a table of tensors to a function of their gradients.
    missing: why it is not ready on this machine, or "".
    device_type: the type of device whose tensors it serves. "" is any.
    dtypes: those that it serves. The empty set is any.
    trial: why it cannot run on a device of that type, found by running it there once, or "". None is the current
        device.
    keeps_addresses: whether a prepared step refers to memory by address, on the device. It then counts steps there, and
        reads hyper-parameters from tensors there. It is void when a tensor of the state has moved.
    at_once: whether a prepared step is one call that no signal interrupts.
    not_chosen: why "auto" passes it over, or "".
    """

    name: str
    prepare: Callable[[StepTable], Run]
    missing: Callable[[], str]
    device_type: Callable[[], str] = lambda: ""
    dtypes: frozenset[torch.dtype] = frozenset()
    trial: Callable[[torch.device | None], str] = lambda _: ""
    keeps_addresses: bool = False
    at_once: bool = False
    not_chosen: Callable[[], str] = lambda: ""
