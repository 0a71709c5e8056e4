"""The launches of a step: what the Triton backends make of a table."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.bases import STATE_DTYPES, state_dtype_of, state_shape_of
from ..core.contract import StepTable, StepTensors, own_gradients
from ..core.eight_bit import is_scale
from ..core.methods import LEARNED
from ..core.staging import staged
from ..core.state import same_layout
from . import norm, row_sweeps, survey, sweeps
from .chunk import INTERPRETED
from .table import Addresses, Entry, Table, entries_of
from .variant import DTYPES, Dtypes, options_of

PROGRAMS = 3  # on each SM, in the one-launch form
LAG = 1  # in that form: rounds of all programs from a segment's last chunk in sweep 1 to its first in sweep 2


def compiled(kernel: Any, programs: int, args: Sequence[Tensor | None], table: Table) -> Any:
    """A kernel as Triton compiles it for the table's variant and GPU."""
    options = options_of(table.variant, table.gpu)
    return kernel.warmup(*args, V=table.variant, grid=(programs,), **options)


def started_by(kernel: Any, programs: int, fixed: Sequence[Tensor | None], given: Sequence[Tensor | None], table: Table
               ) -> Callable[..., None]:  # fmt: skip
    """What starts a kernel with its fixed arguments, when called with the given ones. Every launch comes from here.

    Triton looks a compiled kernel up by the types of all arguments. Here that is done once. Each start passes
    addresses, of tensors that `fixed` must keep.
    """
    variant = table.variant
    if INTERPRETED:
        return lambda *given: kernel[(programs,)](*fixed, *given, V=variant)
    start = compiled(kernel, programs, (*fixed, *given), table)[(programs, 1, 1)]
    addresses = [None if t is None else t.data_ptr() for t in fixed]

    def run(*given: Tensor | None) -> None:
        start(*addresses, *(None if t is None else t.data_ptr() for t in given), variant)

    return run


class Launch:
    """A kernel and what a table has for it. Calls bring the caller's tensors: `grad_scale` and `found_inf`, or None."""

    def __init__(self, kernel: Any, programs: int, *fixed: Tensor | None, table: Table) -> None:
        self.kernel, self._programs, self._fixed, self._table = kernel, programs, fixed, table
        self._started: dict[Any, Callable[..., None]] = {}

    def __call__(self, *given: Tensor | None) -> None:
        kind = (self._table.variant, *(None if t is None else t.dtype for t in given))
        start = self._started.get(kind)
        if start is None:
            start = self._started[kind] = started_by(self.kernel, self._programs, self._fixed, given, self._table)
        start(*given)


class PreparedStep:
    """One step over all tensors of a device. It takes at most two launches for each dtype class, or one with `tickets`.
    Segments that are rows take at most two more. There is one more of either if a rule surveys them.

    Each call brings gradients, with the dtypes and strides of the first call's. `table.live` is read at each step, also
    when a CUDA graph replays it. addresses: writes tensors' addresses to an int64 tensor. Raises ValueError naming the
    first tensor of the table that does not fit.
    """

    def __init__(self, table: StepTable, *, addresses: Addresses, tickets: bool) -> None:
        table.check()
        for k, of in enumerate(table.tensors):
            _check(k, of)
        self._table, self._params = table, [of.param for of in table.tensors]
        self._entries = entries_of(table.base, table.tensors, table.firsts, tickets)
        self._addresses, self._one_launch = addresses, tickets
        self._classes: list[_Class] | None = None
        device = table.results.device
        self._guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def __call__(
        self, grads: list[Tensor] | None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        grads = own_gradients(self._table) if grads is None else grads
        if len(grads) != len(self._params) and (grads or self._table.base.moves):
            raise ValueError(f"robustft: {len(self._params)} params but {len(grads)} grads")
        with self._guard:
            if self._classes is None:
                self._classes = self._build(grads)
            for of in self._classes:
                of.table.upload(grads, self._table.hyper, self._addresses)
                of.step(grad_scale, found_inf)
        torch.autograd.graph.increment_version(self._params)

    def squared_norm(self, grads: list[Tensor] | None) -> Tensor:
        """Σ g² over all gradients, a float64 on their device. It takes one more launch for each dtype class."""
        grads = own_gradients(self._table) if grads is None else grads
        with self._guard:
            if self._classes is None:
                self._classes = self._build(grads)
            for of in self._classes:
                of.table.upload(grads, self._table.hyper, self._addresses)
                of.norm()
            return torch.stack([of.table.squared for of in self._classes]).sum()

    def _build(self, grads: list[Tensor]) -> list["_Class"]:
        step = self._table
        classes: dict[tuple[Dtypes, bool, frozenset[str]], list[Entry]] = {}
        for entry, grad in zip(self._entries, grads or self._params, strict=True):
            param = entry.of.param
            if grad.dtype not in DTYPES or grad.device != param.device or grad.shape != param.shape:
                raise ValueError(
                    f"robustft: grad of {_place(entry.index, entry.of)} must be of shape {tuple(param.shape)} on "
                    f"{param.device} and of {_names(DTYPES)}, got {_described(grad)}"
                )
            classes.setdefault((entry.dtypes(grad.dtype), entry.by_rows, entry.unaligned), []).append(entry)
        return [
            _Class(step, Table(step.base, dtypes, of, grads, step.hyper, step.live), self._one_launch)
            for (dtypes, _, _), of in classes.items()
        ]


class _Class:
    """The launches over one class of tensors."""

    def __init__(self, step: StepTable, table: Table, one_launch: bool) -> None:
        t = self.table = table
        rows, head = t.by_rows, (t.tensors, t.grads, t.owners)
        numbers, outcome = (t.hyper, t.live, t.partials, t.counters), (step.results, step.alphas)
        self._found = []  # the launches that take `found_inf` alone, after those that take `grad_scale` too
        self._scaled = []
        self.norm = Launch(norm.norm_sweep, t.chunks, *head, t.partials, t.counter, t.squared, table=t)
        if rows and t.surveyed:
            self._scaled.append(Launch(row_sweeps.row_survey, t.chunks, *head, *numbers, t.largest, table=t))
        elif t.surveyed:
            self._scaled.append(Launch(survey.survey_sweep, t.chunks, *head, *numbers, table=t))
        if rows:
            self._scaled.append(Launch(row_sweeps.row_step, t.chunks, *head, *numbers, t.largest, *outcome, table=t))
        elif one_launch:
            of = _Tickets(t)
            self._scaled.append(
                Launch(sweeps.ticket_sweep, of.programs, of.schedule, of.cursor, *head, *numbers, of.ready, *outcome,
                       table=t)
            )  # fmt: skip
        else:
            self._scaled.append(Launch(sweeps.step_sweep, t.chunks, *head, *numbers, *outcome, table=t))
        if t.pulled and (rows or not one_launch):
            pull = row_sweeps.row_pull if rows else sweeps.pull_sweep
            self._found.append(Launch(pull, t.pulled, t.tensors, t.owners, step.alphas, table=t))

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for launch in self._scaled:
            launch(grad_scale, found_inf)
        for launch in self._found:
            launch(found_inf)


class _Tickets:
    """What the one-launch form needs beside a table: the order of its tasks, and how far they have come."""

    def __init__(self, table: Table) -> None:
        device = table.tensors.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        tasks = schedule(table.ends, table.pulled, table.chunks, LAG * PROGRAMS * processors)
        self.programs = min(PROGRAMS * processors, len(tasks))
        words = torch.tensor([len(tasks), len(table.tensors), *tasks], dtype=torch.int32, device="cpu")
        self.schedule = staged(words, device)
        self.cursor = torch.zeros(2, dtype=torch.int32, device=device)
        self.ready = torch.zeros(len(table.tensors), dtype=torch.int32, device=device)


def schedule(ends: list[int], pulled: int, chunks: int, lag: int) -> list[int]:
    """The tasks of `ticket_sweep` in their order: 2·chunk steps a chunk, 2·chunk + 1 pulls it.

    ends: the chunk after the last of each tensor that lies in the first `pulled` chunks. The pulls of a tensor follow
    `lag` tasks after its last step. They go backwards, beginning with what was written last.
    """
    tasks: list[int] = []
    due: deque[tuple[int, int]] = deque()  # pulls: after how many tasks, and of which chunk
    begin = 0
    for end in [*ends, chunks]:
        for chunk in range(begin, end):
            tasks.append(2 * chunk)
            while due and due[0][0] <= len(tasks):
                tasks.append(2 * due.popleft()[1] + 1)
        if end <= pulled:
            due.extend((len(tasks) + lag, chunk) for chunk in reversed(range(begin, end)))
        begin = end
    return tasks + [2 * chunk + 1 for _, chunk in due]


def _check(k: int, of: StepTensors) -> None:
    """Raises ValueError naming the first tensor of parameter k that does not fit."""
    param = of.param
    for name, tensor in (("param", param), ("anchor", of.anchor), *of.state.items()):
        if tensor is None:
            continue
        dtypes = set(DTYPES)
        if name not in ("param", "anchor"):
            dtypes = {state_dtype_of(name, param, moment) for moment in STATE_DTYPES}
        shape = state_shape_of(name, param)
        alone = name in LEARNED or is_scale(name)
        lies = tuple(tensor.shape) == shape and (tensor.is_contiguous() if alone else same_layout(tensor, param))
        if tensor.dtype not in dtypes or tensor.device != param.device or not lies:
            where = "" if name == "param" else f"{name} of "
            raise ValueError(
                f"robustft: {where}{_place(k, of)} must be {_names(dtypes)} of shape {shape} on {param.device} and lie "
                f"in memory as the param does, with strides {param.stride()}; got {_described(tensor)}"
            )
    step = of.step
    if step is not None and (step.device != param.device or step.dtype != torch.float32 or step.numel() != 1):
        raise ValueError(
            f"robustft: step of {_place(k, of)} must be one torch.float32 on {param.device}, got {_described(step)}"
        )


def _place(k: int, of: StepTensors) -> str:
    return f"params[{k}], {of.label}," if of.label else f"params[{k}]"


def _names(dtypes: Any) -> str:
    return " or ".join(sorted(map(str, dtypes)))


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
