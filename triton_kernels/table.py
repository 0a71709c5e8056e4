"""The host side: the table of a step's tensors that the kernels read, and what is sent there at each step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core.bases import Base, arithmetic_of
from ..core.contract import StepTensors
from ..core.eight_bit import SCALE
from ..core.methods import RULES
from ..core.staging import staged
from ..core.state import same_layout
from .chunk import CHUNK, COLUMNS, INTERPRETED, LANES, SHORT_CHUNK, WIDTH
from .measure import MEASURES
from .row_sweeps import SURVEYED
from .variant import MAX_STATES, Dtypes, gpu_of, variant_of

Addresses = Callable[[list[Tensor], Tensor], int]


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of a step as the kernels see it: in rows and chunks.

    index: its place among the tensors of the step. segment: its first segment in results and alphas. moments: in their
    order, up to the last that it has. scales: of those in 8 bits. one_launch: whether the form of that name steps it.
    """

    of: StepTensors
    index: int
    segment: int
    moments: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...] = (None,) * MAX_STATES
    one_launch: bool = False

    @property
    def weights(self) -> Tensor:
        """The weights that the step computes: the master, if there is one."""
        return self.of.state.get("master", self.of.param)

    @property
    def working(self) -> Tensor | None:
        """The weights beside a master."""
        return self.of.param if "master" in self.of.state else None

    @property
    def learned(self) -> Tensor | None:
        """The numbers that its rule learns."""
        return self.of.state.get(self.of.spec.rule.learns)

    def dtypes(self, grad: torch.dtype) -> Dtypes:
        """What its launch is compiled for. An absent tensor gets a dtype that goes with the weights."""
        weights = self.weights.dtype
        return Dtypes(
            weights,
            grad,
            weights if self.of.anchor is None else self.of.anchor.dtype,
            self.moments[0].dtype if self.moments else arithmetic_of(weights),
            None if self.working is None else self.working.dtype,
        )

    @property
    def unaligned(self) -> frozenset[str]:
        """{"anchor"} if its anchor is at an address that is no multiple of 16, as variant_of takes it. A gradient may
        move, so the table looks at each step."""
        anchor = self.of.anchor
        return frozenset({"anchor"} if anchor is not None and anchor.data_ptr() % 16 else ())

    @property
    def by_rows(self) -> bool:
        """Whether the kernels for rows serve it."""
        return self.of.spec.rule.crosses_rows

    @property
    def rows(self) -> int:
        return self.of.param.shape[0] if self.by_rows and self.of.param.dim() > 1 else 1

    @property
    def length(self) -> int:
        """The length of a row."""
        return self.of.param.numel() // max(self.rows, 1)

    @property
    def chunk(self) -> int:
        """The most elements of a chunk."""
        return SHORT_CHUNK if self.one_launch and not self.by_rows else CHUNK

    @property
    def chunks(self) -> int:
        """How many: each is part of a row, or several rows. An empty tensor has one too, which counts its steps."""
        if self.length > self.chunk:
            return self.rows * -(-self.length // self.chunk)
        return max(1, -(-self.rows // (self.chunk // max(self.length, 1))))

    @property
    def pulled_later(self) -> bool:
        """Whether its pull is left to sweep 2."""
        rule = self.of.spec.rule
        return rule.waits and (rule.tied or (self.length > self.chunk if self.by_rows else self.chunks > 1))

    def columns(self, first: int, rules: Sequence[str]) -> list[int]:
        """Its row of the table, in the order of COLUMNS. first: its first chunk."""
        absent = [None] * (MAX_STATES - len(self.moments))
        addresses = [
            self.weights, self.working, self.of.anchor, *self.moments, *absent, self.of.state.get("delta"),
            self.learned, self.of.step, *self.scales,
        ]  # fmt: skip
        stride = self.of.param.stride(0) if self.rows > 1 and self.of.param.numel() else max(self.length, 1)
        return [
            *(0 if t is None else t.data_ptr() for t in addresses),
            self.of.param.numel(), self.rows, stride, first, self.chunks,
            self.of.row, rules.index(self.of.spec.rule.name), self.of.seed, self.of.dithered, self.segment, 0,
        ]  # fmt: skip


def entries_of(base: Base, tensors: Sequence[StepTensors], firsts: Sequence[int], one_launch: bool) -> list[Entry]:
    """The tensors of a step as the kernels see them. firsts: each one's first segment."""
    return [
        Entry(
            of,
            index,
            first,
            tuple(of.state[key] for key in base.moments if key in of.state),
            tuple(of.state.get(key + SCALE) for key in (*base.moments, *[""] * MAX_STATES)[:MAX_STATES]),
            one_launch,
        )
        for index, (of, first) in enumerate(zip(tensors, firsts, strict=False))
    ]


class Table:
    """The entries of one class, alike in dtypes and alignment, as the kernels see them.

    Tensors that sweep 2 may pull come first, so that its programs are those of the first `pulled` chunks.
    """

    def __init__(
        self,
        base: Base,
        dtypes: Dtypes,
        entries: list[Entry],
        grads: list[Tensor],
        hyper: Tensor,
        live: Mapping[int, Tensor],
    ) -> None:
        entries = sorted(entries, key=lambda e: not e.pulled_later)
        device = entries[0].of.param.device
        self.gpu = gpu_of(device)
        self.by_rows = entries[0].by_rows
        rules = sorted({e.of.spec.rule.name for e in entries})
        kind = partial(
            variant_of,
            base,
            dtypes,
            states=(min(len(e.moments) for e in entries), max(len(e.moments) for e in entries)),
            rules=tuple(rules),
            stochastic=any(e.of.dithered for e in entries),
            anchored=(all(e.of.anchor is not None for e in entries), any(e.of.anchor is not None for e in entries)),
            has_grads=bool(grads),
            one_launch=entries[0].chunk == SHORT_CHUNK,
            lanes=(64 if self.by_rows else 8) * LANES if INTERPRETED else LANES,
        )
        unaligned = entries[0].unaligned
        self._variants = kind(unaligned=unaligned | {"grad"}), kind(unaligned=unaligned)
        self.variant = self._variants[True]
        counts = torch.tensor([e.chunks for e in entries], device="cpu")
        self.chunks = int(counts.sum())
        self.ends = counts.cumsum(0)[: sum(e.pulled_later for e in entries)].tolist()  # of what sweep 2 may pull
        self.pulled = self.ends[-1] if self.ends else 0
        rows = torch.zeros(len(entries), WIDTH.value, dtype=torch.int64, device="cpu")
        firsts = (counts.cumsum(0) - counts).tolist()
        for row, entry, first in zip(rows, entries, firsts, strict=True):
            row[: len(COLUMNS)] = torch.tensor(entry.columns(first, rules), device="cpu")
        self.tensors = staged(rows, device)
        owners = torch.repeat_interleave(torch.arange(len(entries), dtype=torch.int32, device="cpu"), counts)
        self.owners = staged(owners, device)
        words = max(MEASURES.value, SURVEYED.value) * self.chunks
        self.partials = torch.full((words,), torch.nan, dtype=torch.float64, device=device)
        self.counters = torch.zeros(len(entries), dtype=torch.int32, device=device)
        self.counter = torch.zeros((), dtype=torch.int32, device=device)  # of all chunks
        self.squared = torch.zeros((), dtype=torch.float64, device=device)
        self.surveyed = any(RULES[rule].surveys for rule in rules)
        self.largest = torch.zeros(len(entries) if self.by_rows else 0, dtype=torch.int64, device=device)
        self.live = _live(hyper, live, device) if live else None

        self._pick = [e.index for e in entries]
        self._relaid = {
            k: torch.empty_like(e.of.param, dtype=grads[e.index].dtype, requires_grad=False)
            for k, e in enumerate(entries if grads else ())
            if not same_layout(grads[e.index], e.of.param)
        }
        aligned = len(entries) + len(entries) % 2  # hyper begins at a multiple of 16 bytes
        self._grads = slice(0, len(entries))
        self._hyper = slice(aligned, aligned + hyper.numel())
        self._row = DeviceRow(aligned + hyper.numel(), device)
        self.grads = self._row.device[self._grads]
        self.hyper = self._row.device[self._hyper].view(torch.float64)

    def upload(self, grads: list[Tensor], hyper: Tensor, addresses: Addresses) -> None:
        """Sends the addresses of this step's gradients, and its hyper-parameters, unless they are there already. If one
        address is no multiple of 16, the variant is one that reads gradients in narrow accesses."""
        host = self._row.host()
        if grads:
            here = [grads[k] for k in self._pick]
            for k, buffer in self._relaid.items():
                here[k] = buffer.copy_(here[k])
            self.variant = self._variants[addresses(here, host[self._grads]) % 16 == 0]
        host[self._hyper].view(torch.float64).copy_(hyper.view(-1))
        self._row.send()


SPARES = 8  # buffers for the sends of CUDA graphs; a step sends once for each class of dtypes, and twice if it clips


class DeviceRow:
    """A row of int64 on the device. The host rewrites it without waiting for the copies under way. For this it has a
    ring of pinned buffers, each with an event that tells when its copy is done. The ring grows when none is free.

    A send that a CUDA graph captures keeps its buffer, since its copy runs again at each replay. No memory can be
    pinned under capture, so `SPARES` buffers are kept ready, and replaced by the next step outside of a capture.
    """

    def __init__(self, words: int, device: torch.device) -> None:
        self.device = torch.zeros(words, dtype=torch.int64, device=device)
        self._cuda = device.type == "cuda"
        self._ring = [self._slot() for _ in range(2)]
        self._spares = [self._slot()[0] for _ in range(SPARES if self._cuda else 0)]
        self._sent: Tensor | None = None
        self._captured: list[Tensor] = []
        self.sends = 0

    def host(self) -> Tensor:
        """The buffer to write before `send`. Raises RuntimeError under capture if none is left."""
        if self._capturing():
            if not self._spares:
                raise RuntimeError(
                    f"robustft: CUDA graphs have captured {SPARES} sends of a step's numbers since the last step "
                    "outside of a capture, and no pinned buffer is left; make a step outside between captures"
                )
            return self._spares[-1]
        while self._cuda and len(self._spares) < SPARES:
            self._spares.append(self._slot()[0])
        if self._cuda and not self._ring[0][1].query():
            self._ring.insert(0, self._slot())
        return self._ring[0][0]

    def send(self) -> None:
        """Copies that buffer to the device, in stream order, unless the device has the same already."""
        if self._capturing():
            self._captured.append(self._spares.pop())
            self.device.copy_(self._captured[-1], non_blocking=True)
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

    def _capturing(self) -> bool:
        return self._cuda and torch.cuda.is_current_stream_capturing()

    def _slot(self) -> tuple[Tensor, torch.cuda.Event | None]:
        words = self.device.numel()
        return torch.zeros(
            words, dtype=torch.int64, device="cpu", pin_memory=self._cuda
        ), torch.cuda.Event() if self._cuda else None


def _live(hyper: Tensor, live: Mapping[int, Tensor], device: torch.device) -> Tensor:
    """For each hyper-parameter the address of the tensor that holds it, plus 1 if it is float64, or 0 for the table."""
    addresses = torch.zeros(hyper.numel(), dtype=torch.int64, device="cpu")
    for at, tensor in live.items():
        addresses[at] = tensor.data_ptr() + (tensor.dtype == torch.float64)
    return staged(addresses, device)
