"""The host side: from lists of tensors to the table that the kernels read, and what travels there at each step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..bases import ADAMW, STILL, Base, arithmetic_of, delta_dtype_of
from ..methods import RULES
from ..state import same_layout
from .chunk import ALL, CHUNK, COLUMNS, INTERPRETED, LANES, NONE, SOME, TILE, WIDTH
from .decide import FUNCTIONS
from .sweeps import BASES, Variant

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
MAX_STATES = 3
Addresses = Callable[[list[Tensor], Tensor], None]
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]  # P, G, A, S, W of Variant


@dataclass(frozen=True)
class Entry:
    """One tensor of a step. param: its weights, or their master, and then working: its weights. states: the moments, up
    to the last that it has. dithered: whether its weights are rounded stochastically, by bits of the seed. group: its
    row of hyper; index: among the params; segment: its first of measures and alphas."""

    param: Tensor
    working: Tensor | None
    anchor: Tensor | None
    states: tuple[Tensor, ...]
    delta: Tensor | None
    radius: Tensor | None
    step: Tensor | None
    group: int
    rule: str
    seed: int
    dithered: bool
    index: int
    segment: int

    def dtypes(self, grad: torch.dtype) -> "Dtypes":
        """What its launch is compiled for. What is absent goes with what is there."""
        param = self.param.dtype
        return (
            param,
            grad,
            param if self.anchor is None else self.anchor.dtype,
            self.states[0].dtype if self.states else arithmetic_of(param),
            None if self.working is None else self.working.dtype,
        )

    @property
    def by_rows(self) -> bool:
        """Whether the kernels for rows serve it."""
        return RULES[self.rule].by_rows or self.rule == "mars_sp"

    @property
    def rows(self) -> int:
        return self.param.shape[0] if self.by_rows and self.param.dim() > 1 else 1

    @property
    def length(self) -> int:
        """Of a row."""
        return self.param.numel() // max(self.rows, 1)

    @property
    def chunks(self) -> int:
        """Parts of a row, or several rows each; an empty tensor has one too, which counts its steps."""
        if self.length > CHUNK:
            return self.rows * -(-self.length // CHUNK)
        return max(1, -(-self.rows // (CHUNK // max(self.length, 1))))

    @property
    def pulled_later(self) -> bool:
        """Whether its pull is left to sweep 2."""
        if not RULES[self.rule].elsewhere:
            return False
        return self.rule == "project_mars" or (self.length > CHUNK if self.by_rows else self.chunks > 1)


@cache
def variant_of(
    base: Base,
    dtypes: Dtypes,
    *,
    states: tuple[int, int],
    rules: tuple[str, ...],
    stochastic: bool,
    anchored: tuple[bool, bool],
    graded: bool = True,
    lanes: int = LANES,
) -> Variant:
    """The kernels for tensors of such dtypes; see Variant.

    states: the least and the most that any of them keeps. anchored: whether all of them are, whether any.
    """

    def place(*names: str) -> Any:
        return c(next((k for k, rule in enumerate(rules) if rule in names), -1))

    param, grad, anchor, state, working = dtypes
    read, step = BASES[base.name]
    fewest, most = states
    by_rows = any(RULES[rule].by_rows or rule == "mars_sp" for rule in rules)
    vector = 16 // param.itemsize
    wider = max(grad.itemsize, anchor.itemsize) > param.itemsize
    registers = wider or stochastic or base is not ADAMW or most == MAX_STATES or "l2sp_coupled" in rules or by_rows
    if param.itemsize == 2 and registers:
        vector = 4  # 8-byte accesses of what is 16-bit: with 16 bytes these would spill at their registers
    c = tl.constexpr
    functions = (read, step, *(FUNCTIONS[rule] for rule in rules))
    return Variant(
        READ=read,
        BASE=step,
        STILL=c(base is STILL),
        GRADED=c(graded),
        HYPERS=c(len(base.hyper)),
        LR=c(base.hyper.index("lr")),
        STRENGTH=c(base.hyper.index("strength")),
        RADIUS=c(base.hyper.index("radius")),
        LEARN=c(base.hyper.index("k")),
        STATES=c(most),
        KEPT=ALL if fewest == most else SOME,
        RULES=functions[2:],
        MEASURED=c(sum(RULES[rule].measured for rule in rules)),
        GIVEN=place("given", "given_rows"),
        COUPLED=place("l2sp_coupled"),
        SIGNED=place("mars_sp"),
        TIED=place("project_mars"),
        LEARNED=place("ftp"),
        TRACKED=c(any(RULES[rule].tracks for rule in rules)),
        STOCHASTIC=c(stochastic),
        MASTERED=c(working is not None),
        ANCHORED=ALL if anchored[0] else SOME if anchored[1] else NONE,
        P=c(DTYPES[param]),
        W=c(DTYPES[working or param]),
        G=c(DTYPES[grad]),
        A=c(DTYPES[anchor]),
        S=c(DTYPES[state]),
        D=c(DTYPES[delta_dtype_of(param)]),
        T=c(tl.float64 if param == torch.float64 else tl.float32),
        CHUNK=c(CHUNK),
        LANES=c(lanes),
        ROWS=c(by_rows),
        TILE=c(4 * TILE if INTERPRETED else TILE),
        VECTOR=c(vector),
        CODE=c("" if INTERPRETED else sha256("".join(f.cache_key for f in functions).encode()).hexdigest()),
    )


def options_of(variant: Any, gpu: tuple[str, int]) -> dict[str, Any]:
    """How a variant is compiled for a GPU, ("cuda", 90) or ("hip", 942).

    Without contraction to FMA the bits do not depend on what the compiler fuses. 64 registers a thread let half the
    threads that an SM can hold be resident; the compiler for Blackwell needs 80, as do master weights and bfloat16
    moments, and float64 and the sweeps of rows twice as many, to spill nothing.
    """
    backend, capability = gpu
    options: dict[str, Any] = {"num_warps": LANES // (64 if backend == "hip" else 32), "enable_fp_fusion": False}
    if backend == "cuda":
        double, by_rows = variant.T.value == tl.float64, variant.ROWS.value
        more = variant.MASTERED.value or variant.S.value != variant.T.value or capability >= 100
        options["maxnreg"] = 255 if double and by_rows else 128 if double or by_rows else 80 if more else 64
    return options


def gpu_of(device: torch.device) -> tuple[str, int]:
    """What kernels are compiled for on this device, as options_of takes it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "hip" if torch.version.hip else "cpu", 0
    major, minor = torch.cuda.get_device_capability(device)
    return "cuda", 10 * major + minor


class Table:
    """The entries of one class of dtypes as the kernels see them.

    Tensors that sweep 2 may pull come first, so that its programs are those of the first `pulled` chunks.
    """

    def __init__(
        self,
        base: Base,
        dtypes: Dtypes,
        entries: list[Entry],
        grads: list[Tensor],
        hyper: Tensor,
        live: dict[int, Tensor],
    ) -> None:
        entries = sorted(entries, key=lambda e: not e.pulled_later)
        device = entries[0].param.device
        self.gpu = gpu_of(device)
        used = sorted({e.rule for e in entries}, key=lambda rule: (not RULES[rule].measured, rule))
        self.variant = variant_of(
            base,
            dtypes,
            states=(min(len(e.states) for e in entries), max(len(e.states) for e in entries)),
            rules=tuple(used),
            stochastic=any(e.dithered for e in entries),
            anchored=(all(e.anchor is not None for e in entries), any(e.anchor is not None for e in entries)),
            graded=bool(grads),
            lanes=(32 if entries[0].by_rows else 8) * LANES if INTERPRETED else LANES,
        )
        counts = torch.tensor([e.chunks for e in entries], device="cpu")
        self.chunks = int(counts.sum())
        self.ends = counts.cumsum(0)[: sum(e.pulled_later for e in entries)].tolist()  # of what sweep 2 may pull
        self.pulled = self.ends[-1] if self.ends else 0
        rows = torch.zeros(len(entries), WIDTH.value, dtype=torch.int64, device="cpu")
        firsts = (counts.cumsum(0) - counts).tolist()
        for row, entry, first in zip(rows, entries, firsts, strict=True):
            row[: len(COLUMNS)] = torch.tensor(_row(entry, first, used), device="cpu")
        self.tensors = rows.to(device)
        self.owners = torch.repeat_interleave(torch.arange(len(entries), dtype=torch.int32, device="cpu"), counts).to(
            device
        )
        self.partials = torch.full((3 * self.chunks,), torch.nan, dtype=torch.float64, device=device)
        self.counters = torch.zeros(len(entries), dtype=torch.int32, device=device)
        self.counter = torch.zeros((), dtype=torch.int32, device=device)  # of all chunks
        self.squared = torch.zeros((), dtype=torch.float64, device=device)
        self.by_rows = entries[0].by_rows
        self.surveyed = any(e.rule in ("ftp", "mars_sp") for e in entries)
        self.largest = torch.zeros(len(entries) if self.by_rows else 0, dtype=torch.int64, device=device)
        self.live = _live(hyper, live, device) if live else None

        self._pick = [e.index for e in entries]
        self._relaid = {
            k: torch.empty_like(e.param, dtype=grads[e.index].dtype, requires_grad=False)
            for k, e in enumerate(entries if grads else ())
            if not same_layout(grads[e.index], e.param)
        }
        aligned = len(entries) + len(entries) % 2  # hyper begins at a multiple of 16 bytes
        self._grads = slice(0, len(entries))
        self._hyper = slice(aligned, aligned + hyper.numel())
        self._row = DeviceRow(aligned + hyper.numel(), device)
        self.grads = self._row.device[self._grads]
        self.hyper = self._row.device[self._hyper].view(torch.float64)

    def upload(self, grads: list[Tensor], hyper: Tensor, addresses: Addresses) -> None:
        """Sends the addresses of this step's gradients, and its hyper-parameters, where they are not there already."""
        host = self._row.host()
        if grads:
            here = [grads[k] for k in self._pick]
            for k, buffer in self._relaid.items():
                here[k] = buffer.copy_(here[k])
            addresses(here, host[self._grads])
        host[self._hyper].view(torch.float64).copy_(hyper.view(-1))
        self._row.send()


class DeviceRow:
    """A row of int64 on the device that the host rewrites without waiting for the copies under way: through a ring of
    pinned buffers, each with an event that tells when its copy is done, and longer where none is free."""

    def __init__(self, words: int, device: torch.device) -> None:
        self.device = torch.zeros(words, dtype=torch.int64, device=device)
        self._cuda = device.type == "cuda"
        self._ring = [self._slot() for _ in range(2)]
        self._spare = self._slot()
        self._sent: Tensor | None = None
        self._captured: list[Tensor] = []
        self.sends = 0

    def host(self) -> Tensor:
        """The buffer to write before `send`."""
        if self._cuda and torch.cuda.is_current_stream_capturing():
            return self._spare[0]
        if self._captured and self._captured[-1] is self._spare[0]:
            self._spare = self._slot()
        if self._cuda and not self._ring[0][1].query():
            self._ring.insert(0, self._slot())
        return self._ring[0][0]

    def send(self) -> None:
        """Copies that buffer to the device, in stream order, unless the device has the same already.

        A graph under capture keeps its own buffer, since its copy runs again at each replay.
        """
        if self._cuda and torch.cuda.is_current_stream_capturing():
            self.device.copy_(self._spare[0], non_blocking=True)
            self._captured.append(self._spare[0])
            self._sent = None
            self.sends += 1
            return
        buffer, event = self._ring[0]
        if self._sent is not None and not self._captured and torch.equal(buffer, self._sent):
            return
        self.device.copy_(buffer, non_blocking=True)
        if self._cuda:
            event.record()
        self._sent = buffer
        self._ring.append(self._ring.pop(0))
        self.sends += 1

    def _slot(self) -> tuple[Tensor, torch.cuda.Event | None]:
        words = self.device.numel()
        return torch.zeros(
            words, dtype=torch.int64, device="cpu", pin_memory=self._cuda
        ), torch.cuda.Event() if self._cuda else None


def _row(entry: Entry, first: int, rules: list[str]) -> list[int]:
    """An entry's columns of the table, in the order of COLUMNS."""
    states = [s.data_ptr() for s in entry.states]
    return [
        entry.param.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in (entry.working, entry.anchor)),
        *states, *[0] * (MAX_STATES - len(states)),
        *(0 if t is None else t.data_ptr() for t in (entry.delta, entry.radius, entry.step)),
        entry.param.numel(),
        entry.rows,
        entry.param.stride(0) if entry.rows > 1 and entry.param.numel() else max(entry.length, 1),
        first,
        entry.chunks,
        entry.group,
        rules.index(entry.rule),
        entry.seed,
        entry.dithered,
        entry.segment,
    ]  # fmt: skip


def _live(hyper: Tensor, live: dict[int, Tensor], device: torch.device) -> Tensor:
    """For each hyper-parameter the address of the tensor that holds it, plus 1 if that is float64; 0 for the table."""
    addresses = torch.zeros(hyper.numel(), dtype=torch.int64, device="cpu")
    for at, tensor in live.items():
        addresses[at] = tensor.data_ptr() + (tensor.dtype == torch.float64)
    return addresses.to(device)
