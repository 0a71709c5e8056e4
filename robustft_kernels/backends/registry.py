"""The backends in a table, and the choice among them.

To add one, write a module with a `Backend`, and add that to `BACKENDS`.
"""

import warnings

import torch

from ..core.contract import Run, StepTable
from . import cuda, native, reference, triton
from .backend import Backend

BACKENDS: dict[str, Backend] = {  # the fastest first
    backend.name: backend
    for backend in (cuda.BACKEND, triton.TWO_LAUNCHES, triton.ONE_LAUNCH, native.BACKEND, reference.BACKEND)
}


def backends() -> dict[str, str]:
    """Each backend's name, the fastest first. The value is "" if it is ready here, else why it is not.

    "triton_tickets" is the form of "triton" that makes both sweeps in one launch. If torch sees a GPU, those that serve
    it are tried on the current one, which starts CUDA.
    """
    return {name: backend.missing() or backend.trial(None) for name, backend in BACKENDS.items()}


def objection_to(name: str, device: torch.device, dtypes: set[torch.dtype]) -> str:
    """Why a backend cannot serve tensors of these dtypes on this device, or ""."""
    backend = BACKENDS[name]
    if missing := backend.missing():
        return missing
    serves = backend.device_type()
    if serves and device.type != serves:
        return f"it serves {serves.upper()} tensors, not {device.type}"
    if backend.dtypes and (others := dtypes.difference(backend.dtypes)):
        return f"it does not serve {', '.join(sorted(map(str, others)))}"
    return backend.trial(device)


def check_backend(name: str) -> None:
    """Raises ValueError for an unknown backend, and RuntimeError for one that is asked for by name and not ready
    here."""
    if name != "auto" and name not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"unknown backend {name!r}: choose one of {names}")
    if name != "auto" and (missing := BACKENDS[name].missing()):
        raise RuntimeError(f"backend={name!r} is not available: {missing}")


_warned: set[str] = set()


def choose_backend(name: str, device: torch.device, dtypes: set[torch.dtype]) -> Backend:
    """The backend that serves tensors of these dtypes on this device.

    "auto" takes the fastest. If that is the reference, a RuntimeWarning says why, once for each type of device. Raises
    RuntimeError if a backend was asked for by name and cannot serve.
    """
    if name != "auto":
        if objection := objection_to(name, device, dtypes):
            raise RuntimeError(f"backend={name!r} cannot serve these parameters: {objection}; use backend='auto'")
        return BACKENDS[name]
    objections = {
        name: backend.not_chosen() or objection_to(name, device, dtypes)
        for name, backend in BACKENDS.items()
        if name != triton.ONE_LAUNCH.name
    }
    chosen = next(name for name, objection in objections.items() if not objection)
    if chosen == reference.BACKEND.name and device.type not in _warned:
        _warned.add(device.type)
        reasons = "; ".join(f"{name}: {why}" for name, why in objections.items() if why)
        warnings.warn(
            f"robustft_kernels: the slow reference backend serves the {device.type} parameters ({reasons})",
            RuntimeWarning,
            stacklevel=2,
        )
    return BACKENDS[chosen]


def prepare(name: str, table: StepTable) -> Run:
    """The step of a table on a backend."""
    return BACKENDS[name].prepare(table)
