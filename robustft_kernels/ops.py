"""The contract between optimizers and backends.

One op a base, one overload a backend:

    robustft::adamw_.native(Tensor(a!)[] params, Tensor[] grads, Tensor[] anchors, Tensor(b!)[] exp_avgs, ...) -> ()

Each does a whole step for all its tensors: base step, measure, decide, pull. `group_sizes` says how many consecutive
params share a row of `hyper` (float64, on the CPU, columns `Base.hyper`) and a rule. A list that only some params need
(anchors, max_exp_avg_sqs, ...) has entries for those params alone, in their order; seeds has one for each param, or
none where nothing is rounded stochastically. Where a param has a master, that is stepped, and the param shows it,
rounded; a param that is not its master rounded has been written by somebody, and counts. What the step
found goes to `measures` (float64, one row ⟨g,d⟩, |d|, |c|−|d| a segment, |·| being ‖·‖² of a tensor and Σ|·| of a row;
nan where the rule needs none; then a count that grows where α ≠ 1) and `alphas`, segment after segment; rules "given"
read `alphas` instead. Gradients are divided by `grad_scale`; where `found_inf` is not 0, nothing is written. The base
"still" makes no step, and takes no gradients if it is to find no ⟨g,d⟩.

The op is for tracing; a step runs `prepare(...)`, the same implementation with its lists already taken in. The
dispatcher costs a third of a microsecond for each tensor of each list: 4 ms a step for 2,000 tensors.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from . import reference
from .bases import BASES, Base
from .sharding import is_dtensor, local, placement_of

try:
    from . import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    NATIVE_MISSING = f"the C++ extension cannot be imported ({error}); reinstall with a C++ compiler and torch at hand"
else:
    NATIVE_MISSING = ""


class Run(Protocol):
    """A step prepared."""

    def __call__(
        self, grads: list[Tensor], grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None: ...

    def squared_norm(self, grads: list[Tensor]) -> Tensor:
        """Σ g² over all gradients, a float64 on their device; the host does not wait for it. ("still" has none.)"""
        ...


def _prepare_triton(
    base: Base, tickets: bool, params: list[Tensor], *args: Any, live: dict[int, Tensor] | None = None
) -> Run:
    from .triton_kernels.launch import PreparedStep

    run: Run = PreparedStep(base, params, *args, live=live or {}, addresses=addresses, tickets=tickets)
    return run


# From the op's arguments without `grads`, `grad_scale` and `found_inf` to a function of those.
PREPARE: dict[str, dict[str, Callable[..., Run]]] = {
    "triton": {base.name: partial(_prepare_triton, base, False) for base in BASES},
    "triton_tickets": {base.name: partial(_prepare_triton, base, True) for base in BASES},
    "reference": {base.name: partial(reference.PreparedStep, base) for base in BASES},
}
if _native is not None:
    PREPARE["native"] = {base.name: getattr(_native, f"prepare_{base.name}") for base in BASES}

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FASTEST_FIRST = ("triton", "triton_tickets", "native", "reference")


def backends() -> dict[str, str]:
    """Each backend's name, fastest first, with "" if it is ready here, else why it is not.

    "triton_tickets" is the form of "triton" that makes both sweeps in one launch.
    """
    triton = _triton_missing()
    missing = {"triton": triton, "triton_tickets": triton, "native": NATIVE_MISSING, "reference": ""}
    return {name: missing[name] for name in FASTEST_FIRST}


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors, which is slow and for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton_missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    return ""


def objection_to(backend: str, device: torch.device, dtypes: set[torch.dtype]) -> str:
    """Why `backend` cannot serve such tensors, or ""."""
    if missing := backends()[backend]:
        return missing
    if backend == "reference":
        return ""
    serves = "cpu" if backend == "native" or interpreted() else "cuda"
    if device.type != serves:
        return f"it serves {serves.upper()} tensors, not {device.type}"
    if others := dtypes.difference(KERNEL_DTYPES):
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
        if objection := objection_to(backend, device, dtypes):
            raise RuntimeError(f"backend={backend!r} cannot serve these parameters: {objection}; use backend='auto'")
        return backend
    objections = {name: objection_to(name, device, dtypes) for name in FASTEST_FIRST if name != "triton_tickets"}
    if interpreted():
        objections["triton"] = "its interpreter is for tests"
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


def keeps_addresses(backend: str) -> bool:
    """Whether a prepared step refers to memory by address, on the device: it then counts steps there, takes
    hyper-parameters in tensors, and no longer holds once a tensor of the state has moved."""
    return backend.startswith("triton")


def prepare(backend: str, base: Base, params: list[Tensor], *args: Any, **live: dict[int, Tensor]) -> Run:
    """A step over `params` that takes their gradients. `args`: the op's, from `anchors` on. `live`, where the backend
    takes it: tensors on the params' device that hold hyper-parameters, by their flat place in `hyper`."""
    return PREPARE[backend][base.name](params, *args, **live)


def addresses(tensors: list[Tensor], out: Tensor) -> None:
    """Writes where each tensor's memory begins to `out`, int64 on the CPU."""
    if _native is not None:
        _native.addresses(tensors, out)
    else:
        out.copy_(torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device="cpu"))


def fingerprint(params: list[Tensor], kept: list[dict[str, Any]], addresses: bool) -> object:
    """Equal for two calls iff a plan made at the first still holds at the second.

    Covers identity, address, shape, strides, dtype and device of each parameter; all but the address of its gradient,
    or that it has none; and which objects the state in `kept` is, with `addresses` also where their memory is. The
    caller keeps those objects alive.
    """
    if _native is not None and not any(map(is_dtensor, params)):
        return _native.fingerprint(params, kept, addresses)
    of_params = [
        (id(p), local(p).data_ptr(), _metadata(p), None if p.grad is None else _metadata(p.grad)) for p in params
    ]
    of_state = [(key, id(value), addresses and _address(value)) for of in kept for key, value in of.items()]
    return of_params, of_state


def _address(value: object) -> int:
    return local(value).data_ptr() if isinstance(value, Tensor) else 0


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.layout == torch.strided else None
    return tensor.dtype, tensor.device, tensor.layout, tensor.shape, strides, placement_of(tensor)


def _define(library: torch.library.Library, base: Base, backend: str) -> None:
    def run(params: list[Tensor], grads: list[Tensor], *args: Any) -> None:
        lists = len(base.state) + 8  # anchors to seeds; the dispatcher leaves out what has its default after them
        prepare(backend, base, params, *args[:lists])(grads, *args[lists:])

    def fake(*_: Any) -> None:
        return None

    name = f"{base.name}_.{backend}"
    library.define(base.schema(backend))
    library.impl(name, run, "CPU" if backend == "native" else "CompositeExplicitAutograd")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"robustft::{name}", fake, lib=library)


_library = torch.library.Library("robustft", "DEF")
for _backend in PREPARE:
    for _base in BASES:
        _define(_library, _base, _backend)
