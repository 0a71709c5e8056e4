"""A GPU that is this machine. Triton compiles for sm_90, and the PTX runs here.

`install()` makes the backends "triton" and "triton_tickets" step CPU tensors by it, for the whole process. Triton must
not be in its interpreter.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from robustft_kernels.triton_kernels import launch, table
from robustft_kernels.triton_kernels.table import Addresses, Entry
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from robustft_kernels.backends import registry

from .program import Program, Schedule, spans_of


@dataclass
class Device:
    """schedule: of all launches. fault: what is done to the PTX first, or None. seen: what launches reported, once
    each. launched: the names of the kernels."""

    schedule: Schedule = field(default_factory=Schedule)
    fault: Any = None
    seen: list[str] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)
    _programs: dict[str, Program] = field(default_factory=dict)

    def started_by(self, kernel: Any, programs: int, fixed: Any, given: Any, table: "WatchedTable") -> Any:
        """Takes the place of `triton_kernels.launch.started_by`."""
        compiled = launch.compiled(kernel, programs, (*fixed, *given), table)
        return lambda *given: self._run(kernel.__name__, compiled, programs, [*fixed, *given], table)

    def _run(self, name: str, compiled: Any, programs: int, args: list[Any], table: "WatchedTable") -> None:
        ptx = compiled.asm["ptx"] if self.fault is None else self.fault(compiled.asm["ptx"])
        if ptx not in self._programs:
            self._programs[ptx] = Program(ptx)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        found = self._programs[ptx](
            programs,
            compiled.metadata.shared,
            [arg.data_ptr() for arg in tensors],
            sorted({span for of in (*tensors, *table.touched()) for span in spans_of(of)}),
            self.schedule,
        )
        self.launched.append(name)
        self.seen += [line for line in found if line not in self.seen]


class WatchedTable(table.Table):
    """A table that knows what its kernels may touch."""

    def __init__(
        self, base: Any, dtypes: Any, entries: list[Entry], grads: list[Tensor], hyper: Tensor, live: Any
    ) -> None:
        super().__init__(base, dtypes, entries, grads, hyper, live)
        self._entries, self._given, self._numbers = entries, grads, list(live.values())

    def upload(self, grads: list[Tensor], hyper: Tensor, addresses: Addresses) -> None:
        """Notes the gradients of this step."""
        self._given = grads
        super().upload(grads, hyper, addresses)

    def touched(self) -> Iterator[Tensor]:
        """The tensors that the table has the addresses of."""
        for entry in self._entries:
            state = entry.of.state.values()
            yield from (of for of in (entry.of.param, entry.of.anchor, entry.of.step, *state) if of is not None)
        yield from (*self._given, *self._relaid.values(), *self._numbers)


class Utils:
    """What Triton asks of a driver's device."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        return name, name, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Driver:
    """Triton's driver of an sm_90 that holds CPU tensors."""

    utils = Utils()

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        return None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def feign(of: Driver) -> None:
    """Makes the Triton backends serve CPU tensors, through a driver without a GPU."""
    driver.set_active(of)
    for name in ("triton", "triton_tickets"):
        registry.BACKENDS[name] = replace(registry.BACKENDS[name], missing=lambda: "", device_type=lambda: "cpu")
    table.gpu_of = lambda _: ("cuda", 90)


def install() -> Device:
    """Puts a device in place of a GPU."""
    if knobs.runtime.interpret:
        raise RuntimeError("Triton is in its interpreter; unset TRITON_INTERPRET")
    device = Device()
    feign(Driver())
    launch.started_by, launch.Table = device.started_by, WatchedTable
    return device
