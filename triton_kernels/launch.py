"""The launches of a step: what `ops.prepare` returns for the Triton backends."""

from collections import deque
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..bases import MEASURES, STILL, Base
from ..methods import RULES, segments_of
from ..state import dtype_of, same_layout
from . import norm, row_sweeps, sweeps
from .table import DTYPES, Addresses, Dtypes, Entry, Table, options_of

PROGRAMS = 4  # of the one-launch form, on each SM
LAG = 2  # in that form, rounds of all programs between a segment's last chunk of sweep 1 and its first of sweep 2


def launch(kernel: Any, programs: int, *args: Any, table: Table) -> None:
    """Every launch of this backend goes through here."""
    kernel[(programs,)](*args, V=table.variant, **options_of(table.variant, table.gpu))


class PreparedStep:
    """One step over all tensors of a device: at most two launches for each dtype class, or one with `tickets`; as many
    again for segments that are rows, and one more where FTP or MARS-SP survey them.

    Takes the op's lists, as ops.py has them, but for the gradients: each call brings those, with the dtypes and strides
    of the first call's. live: tensors on the device that hold hyper-parameters, by their flat place in `hyper`; they
    are read at each step, also when a CUDA graph replays it. addresses: writes tensors' addresses to an int64 tensor.
    """

    def __init__(
        self, base: Base, params: list[Tensor], *args: Any, live: dict[int, Tensor], addresses: Addresses, tickets: bool
    ) -> None:
        *lists, measures, alphas, hyper, group_sizes, rules, seeds = args
        device = params[0].device if params else measures.device
        _check_table("hyper", hyper, (len(group_sizes), len(base.hyper)), torch.device("cpu"))
        self._entries = _entries(base, params, lists, hyper, group_sizes, rules, seeds)
        segments = sum(segments_of(e.rule, e.param.shape) for e in self._entries)
        _check_table("measures", measures, (segments, len(MEASURES)), device)
        _check_table("alphas", alphas, (segments,), device)
        self._base, self._params, self._measures, self._alphas, self._hyper = base, params, measures, alphas, hyper
        self._live, self._addresses, self._tickets = live, addresses, tickets
        self._tables: list[tuple[Table, _Tickets | None]] | None = None
        self._guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def __call__(self, grads: list[Tensor], grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        if len(grads) != len(self._params) and (grads or self._base is not STILL):
            raise ValueError(f"robustft: {len(self._params)} params but {len(grads)} grads")
        with self._guard:
            if self._tables is None:
                self._tables = self._build(grads)
            for table, tickets in self._tables:
                table.upload(grads, self._hyper, self._addresses)
                if table.by_rows:
                    self._sweep_rows(table, grad_scale, found_inf)
                elif tickets is None:
                    self._sweep(table, grad_scale, found_inf)
                else:
                    self._draw(table, tickets, grad_scale, found_inf)
        torch.autograd.graph.increment_version(self._params)

    def squared_norm(self, grads: list[Tensor]) -> Tensor:
        """Σ g² over all gradients, a float64 on their device: one launch more for each dtype class."""
        with self._guard:
            if self._tables is None:
                self._tables = self._build(grads)
            for t, _ in self._tables:
                t.upload(grads, self._hyper, self._addresses)
                launch(
                    norm.norm_sweep, t.chunks, t.tensors, t.grads, t.owners, t.partials, t.counter, t.squared, table=t
                )
            return torch.stack([t.squared for t, _ in self._tables]).sum()

    def _build(self, grads: list[Tensor]) -> list[tuple[Table, "_Tickets | None"]]:
        classes: dict[tuple[Dtypes, bool], list[Entry]] = {}
        for entry, grad in zip(self._entries, grads or self._params, strict=True):
            if grad.dtype not in DTYPES or grad.device != entry.param.device or grad.shape != entry.param.shape:
                raise ValueError("robustft: a gradient has not the device and shape of its param, or is not of floats")
            classes.setdefault((entry.dtypes(grad.dtype), entry.by_rows), []).append(entry)
        tables = [Table(self._base, dtypes, of, grads, self._hyper, self._live) for (dtypes, _), of in classes.items()]
        return [(table, _Tickets(table) if self._tickets and not table.by_rows else None) for table in tables]

    def _sweep(self, t: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        launch(
            sweeps.step_sweep, t.chunks, t.tensors, t.grads, t.owners, t.hyper, t.live, t.partials, t.counters,
            self._measures, self._alphas, grad_scale, found_inf, table=t,
        )  # fmt: skip
        if t.pulled:
            launch(sweeps.pull_sweep, t.pulled, t.tensors, t.owners, self._alphas, found_inf, table=t)

    def _sweep_rows(self, t: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if t.surveyed:
            launch(
                row_sweeps.row_survey, t.chunks, t.tensors, t.grads, t.owners, t.hyper, t.live, t.partials, t.counters,
                t.largest, grad_scale, found_inf, table=t,
            )  # fmt: skip
        launch(
            row_sweeps.row_step, t.chunks, t.tensors, t.grads, t.owners, t.hyper, t.live, t.partials, t.counters,
            t.largest, self._measures, self._alphas, grad_scale, found_inf, table=t,
        )  # fmt: skip
        if t.pulled:
            launch(row_sweeps.row_pull, t.pulled, t.tensors, t.owners, self._alphas, found_inf, table=t)

    def _draw(self, t: Table, tickets: "_Tickets", grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        launch(
            sweeps.ticket_sweep, tickets.programs, tickets.schedule, tickets.cursor, t.tensors, t.grads, t.owners,
            t.hyper, t.live, t.partials, t.counters, tickets.ready, self._measures, self._alphas, grad_scale, found_inf,
            table=t,
        )  # fmt: skip


class _Tickets:
    """What the one-launch form needs beside a table: the order of its tasks, and how far they are."""

    def __init__(self, table: Table) -> None:
        device = table.tensors.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        tasks = schedule(table.ends, table.pulled, table.chunks, LAG * PROGRAMS * processors)
        self.programs = min(PROGRAMS * processors, len(tasks))
        self.schedule = torch.tensor([len(tasks), len(table.tensors), *tasks], dtype=torch.int32, device=device)
        self.cursor = torch.zeros(2, dtype=torch.int32, device=device)
        self.ready = torch.zeros(len(table.tensors), dtype=torch.int32, device=device)


def schedule(ends: list[int], pulled: int, chunks: int, lag: int) -> list[int]:
    """The tasks of `ticket_sweep` in their order: 2·chunk steps a chunk, 2·chunk + 1 pulls it.

    ends: the chunk after the last of each tensor that lies in the first `pulled` chunks. The pulls of a tensor follow
    `lag` tasks after its last step, and go backwards, from what was written last.
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


def _entries(
    base: Base,
    params: list[Tensor],
    lists: list[list[Tensor]],
    hyper: Tensor,
    group_sizes: list[int],
    rules: list[str],
    seeds: list[int],
) -> list[Entry]:
    """The tensors of the op's lists one by one. Raises ValueError where a list does not fit."""
    anchors, *states, steps = lists
    names = ("params", "anchors", *(f"{key}s" for key, _ in base.state), "steps")
    feeds = {name: _Feed(name, of) for name, of in zip(names, (params, anchors, *states, steps), strict=True)}
    if seeds and len(seeds) != len(params):
        raise ValueError(f"robustft: seeds has {len(seeds)} entries for {len(params)} params; give one each, or none")
    out: list[Entry] = []
    segment = 0
    for group, (values, size, rule) in enumerate(zip(hyper.tolist(), group_sizes, rules, strict=True)):
        if rule not in RULES:
            raise ValueError(f"robustft: the Triton backend knows no rule {rule!r}")
        row = {**dict(zip(base.hyper, values, strict=True)), "rule": rule}
        for _ in range(size):
            param = feeds["params"].next()
            anchor = feeds["anchors"].next() if row["anchored"] else None
            kept = {key: feeds[f"{key}s"].next() for key, drawn in base.state if drawn(row, param.dtype)}
            step = feeds["steps"].next() if base.counted(row, param.dtype) else None
            _check(param, anchor, kept, step)
            delta, radius, master = (kept.pop(key, None) for key in ("delta", "radius_state", "master"))
            out.append(Entry(
                param if master is None else master, None if master is None else param, anchor, tuple(kept.values()),
                delta, radius, step, group=group, rule=rule, seed=seeds[len(out)] if seeds else 0,
                dithered=bool(row["stochastic_rounding"]) and param.dtype == torch.bfloat16 and master is None,
                index=len(out), segment=segment,
            ))  # fmt: skip
            segment += segments_of(rule, param.shape)
    for feed in feeds.values():
        feed.check_all_taken()
    return out


class _Feed:
    """A list whose entries are taken one by one, because not every parameter has one."""

    def __init__(self, name: str, entries: list[Any]) -> None:
        self._name, self._entries, self._at = name, entries, 0

    def next(self) -> Any:
        if self._at == len(self._entries):
            raise ValueError(f"robustft: {self._name} has {self._at} entries, too few for the groups")
        self._at += 1
        return self._entries[self._at - 1]

    def check_all_taken(self) -> None:
        if self._at < len(self._entries):
            raise ValueError(f"robustft: {self._name} has {len(self._entries)} entries; the groups take {self._at}")


def _check_table(name: str, table: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if table.device != device or table.dtype != torch.float64 or tuple(table.shape) != shape:
        raise ValueError(f"robustft: {name} must be a float64 tensor of shape {shape} on {device}")


def _check(param: Tensor, anchor: Tensor | None, kept: dict[str, Tensor], step: Tensor | None) -> None:
    for name, tensor, dtypes in (
        ("params", param, DTYPES),
        ("anchors", anchor, DTYPES),
        *(
            (
                "radius_states" if key == "radius_state" else "the state",
                of,
                {dtype_of(key, param.dtype, moments) for moments in (torch.float32, torch.bfloat16)},
            )
            for key, of in kept.items()
        ),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise ValueError(f"robustft: the Triton backend does not take {tensor.dtype} for {name}")
        alike = name == "radius_states" or (tensor.shape == param.shape and same_layout(tensor, param))
        if tensor.device != param.device or not alike:
            raise ValueError(f"robustft: a tensor of {name} has not the device, shape and strides of its param")
    if step is not None and (step.device != param.device or step.dtype != torch.float32 or step.numel() != 1):
        raise ValueError("robustft: a step count must be one float32 on the device of its param")
