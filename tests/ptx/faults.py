"""Small faults in the PTX of kernels, one at a time, that a step's check should see.

Each barrier in turn is left out. Each order of an atomic access is made weaker. Loads and stores lose their guard, or
go 4 bytes further.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from . import steps
from .device import Device
from .harmless import harmful
from .program import Schedule

SEEDS = (0, 1)
ROWS = {row.backend: row for row in steps.ROWS[:2]}  # a step in two launches, and in one
KERNELS = {"step_sweep": "triton", "ticket_sweep": "triton_tickets"}
KINDS = {
    "no barrier": (r"bar\.sync\s+0;", ""),
    "weaker order": (r"\.(?:acq_rel|release)\b", ".relaxed"),
    "no acquire": (r"ld\.global\.gpu\.acquire", "ld.global"),
    "no guard": (r"@%p\d+ (?=st\.global)", ""),
    "4 bytes further": (r"(ld\.global[\w.:]*\.v4\.b32 \{[^}]*\}, \[ %rd\d+) \+ 0", r"\1 + 4"),
}


@dataclass(frozen=True)
class Fault:
    """One occurrence of a pattern is replaced in the PTX of a kernel."""

    kernel: str
    kind: str
    which: int

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.kind} {self.which}"

    def apply(self, ptx: str) -> str:
        """The PTX with this fault, if it is of this kernel. Another variant of the kernel may have fewer places."""
        pattern, new = KINDS[self.kind]
        places = list(re.finditer(pattern, ptx))
        if f".entry {self.kernel}(" not in ptx or self.which >= len(places):
            return ptx
        found = places[self.which]
        return ptx[: found.start()] + found.expand(new) + ptx[found.end() :]

    def seen(self, device: Device) -> list[str]:
        """What the check of a step says of it, under two schedules."""
        said: list[str] = []
        device.fault = partial(Fault.apply, self)
        try:
            for seed in SEEDS:
                device.schedule = Schedule(seed, limit=10**7)
                said += harmful(steps.check(device, ROWS[KERNELS[self.kernel]]))
                if said:
                    break
        finally:
            device.fault = None
        return said


def all_of(device: Device) -> Iterator[Fault]:
    """The faults of the kernels, by the PTX that a step without any compiles."""
    texts: list[str] = []
    device.fault = lambda ptx: texts.append(ptx) or ptx
    for row in ROWS.values():
        if wrong := harmful(steps.check(device, row)):
            raise AssertionError(f"without a fault: {wrong[0]}")
    device.fault = None
    for kernel in KERNELS:
        ptx = next(text for text in texts if f".entry {kernel}(" in text)
        for kind, (pattern, _) in KINDS.items():
            for which in range(len(re.findall(pattern, ptx))):
                yield Fault(kernel, kind, which)
