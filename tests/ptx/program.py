"""A kernel, compiled for this CPU."""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from .translate import Kernel, translate

HERE = Path(__file__).parent
HEADERS = ("arithmetic.h", "races.h", "machine.h")
CACHE = HERE.parents[1] / ".cache" / "ptx"
# Without contraction, as the PTX says itself what is fused.
COMPILER = (
    "g++", "-std=c++20", "-O1", "-g0", "-w", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fno-strict-aliasing",
    "-fwrapv", "-fPIC", "-shared",
)  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """In which order threads come.

    seed: of the order. preempt: the probability that another comes at a plain access. resident: how many programs run
    at a time. limit: of accesses, for a launch without an end.
    """

    seed: int = 0
    preempt: float = 0.02
    resident: int = 8
    limit: int = 10**8


class Program:
    """A kernel of a PTX module as a function of this process. Its C++ is compiled once, and kept in a cache.

    name: of the kernel, if the module has several.
    """

    def __init__(self, ptx: str, name: str | None = None) -> None:
        self.kernel = translate(ptx, name)
        self._library = ctypes.CDLL(str(_compiled(self.kernel)))

    def __call__(
        self,
        programs: int,
        shared: int,
        parameters: Sequence[int] | bytes,
        ranges: Iterable[tuple[int, int]],
        schedule: Schedule,
    ) -> list[str]:
        """Launches so many programs, each with so many bytes of shared memory besides those that the kernel declares.
        parameters: a number for each, of which the last may be left out, or the bytes of all. ranges: of the addresses
        that it may touch. Returns what was seen that should not be."""
        given = parameters if isinstance(parameters, bytes) else self._packed(parameters)
        if len(given) != self.kernel.bytes:
            raise ValueError(f"{self.kernel.name} has {self.kernel.bytes} bytes of parameters, {len(given)} are given")
        spans = [address for span in ranges for address in span]
        report = ctypes.create_string_buffer(1 << 18)
        self._library.run(
            programs, shared + self.kernel.shared, given, len(given), ctypes.c_uint64(schedule.seed),
            ctypes.c_double(schedule.preempt), schedule.resident, (ctypes.c_uint64 * len(spans))(*spans),
            len(spans) // 2, ctypes.c_uint64(schedule.limit), report, len(report),
        )  # fmt: skip
        return report.value.decode().splitlines()

    def _packed(self, numbers: Sequence[int]) -> bytes:
        given = bytearray(self.kernel.bytes)
        for of, place, number in zip(self.kernel.parameters, self.kernel.places, numbers, strict=False):
            given[place : place + of.size] = (number & (1 << 8 * of.size) - 1).to_bytes(of.size, "little")
        return bytes(given)


def spans_of(tensor: Tensor) -> list[tuple[int, int]]:
    """The addresses of a tensor, which is dense."""
    begin = tensor.data_ptr()
    return [(begin, begin + tensor.numel() * tensor.element_size())] if tensor.numel() else []


def source_of(kernel: Kernel) -> str:
    """A file of C++ with the kernel and a function `run` that launches it. A place in memory, of which it is known who
    touched it, is two bytes, or one if the kernel writes single bytes."""
    grain = 1 if any(re.search(r" st\.[\w.]*[bu]8$", site) for site in kernel.sites) else 2
    sites = ", ".join(f'"{site}"' for site in kernel.sites)
    return f"""#define GRAIN {grain}
#include "machine.h"
static const char* const sites[] = {{{sites or '""'}}};
{kernel.source}
extern "C" u64 run(u32 programs, u32 shared, const u8* parameters, u32 bytes, u64 seed, double preempt, u32 resident,
                   const u64* ranges, u32 count, u64 limit, char* report, u32 size) {{
  return launch(kernel, {kernel.threads}, sites, programs, shared, parameters, bytes, seed, preempt, resident, ranges,
                count, limit, report, size);
}}
"""


def _compiled(kernel: Kernel) -> Path:
    source = source_of(kernel)
    asked = [source, *(HERE.joinpath(name).read_text() for name in HEADERS), *COMPILER]
    library = CACHE / f"{kernel.name}-{sha256(''.join(asked).encode()).hexdigest()[:24]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        text = library.with_suffix(f".{os.getpid()}.cpp")
        text.write_text(source)
        fresh = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*COMPILER, f"-I{HERE}", str(text), "-o", str(fresh)], check=True)
        fresh.rename(library)
        text.unlink()
    return library
