"""Small faults in the PTX of kernels, one at a time, that a step's check should see.

Each barrier in turn is left out. Each order of an atomic access is made weaker. Loads and stores lose their guard, or
go 4 bytes further.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import cuda, device, steps
from .harmless import harmful
from .module import Module, code_of, plain
from .program import Schedule

SEEDS, FURTHER = (0, 1), "4 bytes further"
BARRIERS = {"no barrier": (r"bar\.sync\s+0;", ""), "weaker order": (r"\.(?:acq_rel|release)\b", ".relaxed")}


@dataclass(frozen=True)
class Compiler:
    """Whose kernels. rows: for each kernel the row whose step launches it. kinds: patterns, and what takes their place.
    check: of a row's step on a device."""

    install: Callable[[], Any]
    check: Callable[[Any, steps.Row], list[str]]
    rows: dict[str, steps.Row]
    kinds: dict[str, tuple[str, str]]


TRITON = Compiler(
    device.install,
    steps.check,
    {"step_sweep": steps.ROWS[0], "ticket_sweep": steps.ROWS[1]},
    {
        **BARRIERS,
        "no acquire": (r"ld\.global\.gpu\.acquire", "ld.global"),
        "no guard": (r"@%p\d+ (?=st\.global)", ""),
        FURTHER: (r"(ld\.global[\w.:]*\.v4\.b32 \{[^}]*\}, \[ %rd\d+) \+ 0", r"\1 + 4"),
    },
)
CUDA = Compiler(
    cuda.install,
    cuda.check,
    {
        "step_adamw_f32": cuda.ROWS[0],
        "rows_adamw_any": next(row for row in cuda.ROWS if row.name.startswith("ftp mars_rows, adamw, float32, a")),
    },
    {**BARRIERS, FURTHER: (r"(ld\.global\.v4\.u32\s+\{[^}]*\}, \[%rd\d+)\]", r"\1+4]")},
)


@dataclass(frozen=True)
class Fault:
    """One occurrence of a pattern is replaced in the PTX of a kernel, or of a function that it calls."""

    kernel: str
    kind: str
    which: int

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.kind} {self.which}"

    def apply(self, of: Compiler, ptx: str) -> str:
        """The PTX with this fault, if it is of this kernel. Another variant of the kernel may have fewer places."""
        ptx, (pattern, new) = plain(ptx), of.kinds[self.kind]
        found = places(ptx, self.kernel, pattern)
        if self.which >= len(found):
            return ptx
        begin, match = found[self.which]
        return ptx[: begin + match.start()] + match.expand(new) + ptx[begin + match.end() :]

    def seen(self, of: Compiler, device: Any) -> list[str]:
        """What the check of a step says of it, under two schedules."""
        said: list[str] = []
        device.fault = partial(Fault.apply, self, of)
        try:
            for seed in SEEDS:
                device.schedule = Schedule(seed, limit=10**7)
                said += harmful(of.check(device, of.rows[self.kernel]))
                if said:
                    break
        finally:
            device.fault = None
        return said


def in_a_fork(call: Callable[[], list[str]]) -> list[str]:
    """What a call says, made by a process of its own: a fault may also crash."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writes, "\n".join(call())[:4000].encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    return [f"the program died of signal {os.WTERMSIG(status)}"] if os.WIFSIGNALED(status) else said


def places(ptx: str, kernel: str, pattern: str) -> list[tuple[int, re.Match[str]]]:
    """Where a pattern occurs in a kernel and in what it calls: the place of a function, and the match in it."""
    module = Module.parsed(code_of(ptx))
    if kernel not in module.functions:
        return []
    bodies = [of.body for of in module.reached(module.functions[kernel])]
    return [(ptx.index(body), match) for body in bodies for match in re.finditer(pattern, body)]


def all_of(of: Compiler, device: Any) -> Iterator[Fault]:
    """The faults of the kernels, by the PTX that a step without any compiles."""
    texts: list[str] = []
    device.fault = lambda ptx: texts.append(ptx) or ptx
    for row in of.rows.values():
        if wrong := harmful(of.check(device, row)):
            raise AssertionError(f"without a fault: {wrong[0]}")
    device.fault = None
    for kernel in of.rows:
        ptx = plain(next(text for text in texts if f".entry {kernel}(" in text))
        for kind, (pattern, _) in of.kinds.items():
            if kind == FURTHER and kernel.endswith("_any"):
                continue  # most of its loads are of streams that this row's tensors do not have
            for which in range(len(places(ptx, kernel, pattern))):
                yield Fault(kernel, kind, which)
