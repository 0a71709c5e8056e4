"""The contract between optimizers and backends.

One op a base, one overload a backend:

    robustft::adamw_.native(Tensor(a!)[] params, Tensor[] grads, Tensor[] anchors, Tensor(b!)[] exp_avgs, ...) -> ()

Each does a whole step for all its tensors: base step, measure, decide, pull. `group_sizes` says how many consecutive
params share a row of `hyper` (float64, on the CPU, columns `Base.hyper`) and a rule. A list that only some groups need
(anchors, max_exp_avg_sqs, ...) has entries for the params of those groups alone, in their order. What the step found
goes to `measures` (float64, one row ⟨g,d⟩, ‖d‖², ‖c‖²−‖d‖² a tensor; nan where the rule needs none) and `alphas`.

The op is for tracing; a step runs `prepare(...)`, the same implementation with its lists already taken in. The
dispatcher costs a third of a microsecond for each tensor of each list: 4 ms a step for 2,000 tensors.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .bases import ADAMW, SGD, Base

try:
    from . import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    NATIVE_MISSING = f"the C++ extension cannot be imported ({error}); reinstall with a C++ compiler and torch at hand"
else:
    NATIVE_MISSING = ""

Run = Callable[[list[Tensor]], None]

# From the op's arguments without `grads` to a function of them.
PREPARE: dict[str, dict[str, Callable[..., Run]]] = {
    "reference": {"adamw": reference.prepare_adamw, "sgd": reference.prepare_sgd},
}
if _native is not None:
    PREPARE["native"] = {"adamw": _native.prepare_adamw, "sgd": _native.prepare_sgd}

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FASTEST_FIRST = ("triton", "native", "reference")


def backends() -> dict[str, str]:
    """Each backend's name, fastest first, with "" if it is ready here, else why it is not."""
    missing = {"triton": "the Triton kernels are not part of this version", "native": NATIVE_MISSING, "reference": ""}
    return {name: missing[name] for name in FASTEST_FIRST}


def _objection(backend: str, device: torch.device, dtypes: set[torch.dtype]) -> str:
    """Why `backend` cannot serve such tensors, or ""."""
    if missing := backends()[backend]:
        return missing
    if backend == "native" and device.type != "cpu":
        return f"it serves CPU tensors, not {device.type}"
    if backend == "native" and (others := dtypes.difference(NATIVE_DTYPES)):
        return f"it does not serve {', '.join(sorted(map(str, others)))}"
    return ""


def check_backend(backend: str) -> None:
    """Raises ValueError for a backend nobody has heard of, or one asked for by name that is not ready here."""
    if backend not in ("auto", *FASTEST_FIRST):
        names = ", ".join(map(repr, ("auto", *FASTEST_FIRST)))
        raise ValueError(f"unknown backend {backend!r}: choose one of {names}")
    if backend != "auto" and (missing := backends()[backend]):
        raise RuntimeError(f"backend={backend!r} is not available: {missing}")


_warned: set[str] = set()


def choose_backend(backend: str, device: torch.device, dtypes: set[torch.dtype]) -> str:
    """The backend that serves tensors of these dtypes on this device.

    "auto" takes the fastest; where that is the reference, a RuntimeWarning says why, once for a kind of device.
    Raises RuntimeError where a backend was asked for by name and cannot.
    """
    if backend != "auto":
        if objection := _objection(backend, device, dtypes):
            raise RuntimeError(f"backend={backend!r} cannot serve these parameters: {objection}; use backend='auto'")
        return backend
    objections = {name: _objection(name, device, dtypes) for name in FASTEST_FIRST}
    chosen = next(name for name, objection in objections.items() if not objection)
    if chosen == "reference" and device.type not in _warned:
        _warned.add(device.type)
        reasons = "; ".join(f"{name}: {why}" for name, why in objections.items() if why)
        warnings.warn(
            f"robustft_kernels: the slow reference backend serves the {device.type} parameters ({reasons})",
            RuntimeWarning,
            stacklevel=2,
        )
    return chosen


def prepare(backend: str, base: Base, params: list[Tensor], *args: Any) -> Run:
    """A step over `params` that takes their gradients. `args`: the op's, from `anchors` on."""
    return PREPARE[backend][base.name](params, *args)


def fingerprint(params: list[Tensor], kept: list[dict[str, Any]]) -> object:
    """Equal for two calls iff a plan made at the first still holds at the second.

    Covers identity, address, shape, strides, dtype and device of each parameter; all but the address of its gradient,
    or that it has none; and which objects the state in `kept` is. The caller keeps those objects alive.
    """
    if _native is not None:
        return _native.fingerprint(params, kept)
    of_params = [(id(p), p.data_ptr(), _metadata(p), None if p.grad is None else _metadata(p.grad)) for p in params]
    return of_params, [(key, id(value)) for of_param in kept for key, value in of_param.items()]


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.layout == torch.strided else None
    return tensor.dtype, tensor.device, tensor.layout, tensor.shape, strides


def _define(library: torch.library.Library, base: Base, backend: str) -> None:
    def run(params: list[Tensor], grads: list[Tensor], *args: Any) -> None:
        prepare(backend, base, params, *args)(grads)

    def fake(*_: Any) -> None:
        return None

    name = f"{base.name}_.{backend}"
    library.define(base.schema(backend))
    library.impl(name, run, "CPU" if backend == "native" else "CompositeExplicitAutograd")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"robustft::{name}", fake, lib=library)


_library = torch.library.Library("robustft", "DEF")
for _backend in PREPARE:
    for _base in (ADAMW, SGD):
        _define(_library, _base, _backend)
