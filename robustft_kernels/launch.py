"""The parameters of one device as one step of one backend: lists of tensors, a table of hyper-parameters, and what the
step found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from . import ops, state
from .bases import MEASURES, Base, Group, Row
from .methods import method_of, rule_of, segments_of
from .sharding import local

CPU = torch.device("cpu")
Found = dict[Tensor, tuple[Tensor, Tensor]]  # of a parameter, its segments' rows of measures and their alphas
Entries = list[
    tuple[Group, list[int], int]
]  # groups, which of their parameters, and the place of their first among all


def label_of(group: Group, k: int) -> str:
    """How messages call parameter `k` of a group: by its name if it has one."""
    names = group.get("param_names")
    return f"parameter {names[k]!r}" if names else f"parameter {k} (shape {tuple(group['params'][k].shape)})"


def row_of(group: Group) -> Row:
    """A group as the backends ask about it: with the rule of its method and norm."""
    return {**group, "rule": rule_of(group["method"], group["norm"])}


def found_tables(params: list[Tensor], counts: list[int], device: torch.device, found: Found) -> tuple[Tensor, Tensor]:
    """Measures and alphas of a launch, with as many segments of each parameter as `counts` says: where `found` had them
    stand, and what it refers to from now on."""
    measures = torch.zeros(sum(counts), len(MEASURES), dtype=torch.float64, device=device)
    alphas = torch.ones(sum(counts), dtype=torch.float64, device=device)
    for param, *now in zip(params, measures.split(counts), alphas.split(counts), strict=True):
        for new, old in zip(now, found.get(param, ()), strict=False):
            if old.shape == new.shape:
                new.copy_(old)
        found[param] = (now[0], now[1])
    return measures, alphas


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter of a launch. row: of its group; kept: its state; seed: of what is rounded stochastically."""

    group: Group
    row: int
    param: Tensor
    kept: state.ParamState
    seed: int


class Launch:
    """All parameters of one device, prepared for one backend. found: of Plan; takes on where it stood, and comes to
    refer to this.

    measures, alphas: what the last step found, one row a segment; see ops.py.
    """

    def __init__(
        self,
        base: Base,
        entries: Entries,
        kept: Mapping[Tensor, state.ParamState],
        backend: str,
        device: torch.device,
        found: Found,
    ) -> None:
        entries = self._in_order(entries)
        self.base, self.device = base, device
        self.groups = [group for group, _, _ in entries]
        self.rules = [rule_of(group["method"], group["norm"]) for group in self.groups]
        self.members = [
            Member(group, row, group["params"][k], kept[group["params"][k]], group["seed"] << 32 | start + k)
            for row, (group, ks, start) in enumerate(entries)
            for k in ks
        ]
        self.params = [member.param for member in self.members]
        self.backend = ops.choose_backend(
            backend, device, {t.dtype for p in self.params for t in (p, p.grad) if t is not None}
        )
        on_device = ops.keeps_addresses(self.backend)
        for member, label in zip(self.members, [label_of(g, k) for g, ks, _ in entries for k in ks], strict=True):
            row = row_of(member.group)
            state.prepare(member.param, member.kept, base, row, steps_on=device if on_device else CPU)
            if is_anchored(row) and "anchor" not in member.kept:
                raise ValueError(
                    f"{label} has no anchor for method {row['method']!r}: its group was added with a method that needs "
                    "none; choose the method when adding the group"
                )
        counts = [segments_of(self.rules[member.row], member.param.shape) for member in self.members]
        self.measures, self.alphas = found_tables(self.params, counts, device, found)
        self.hyper = torch.zeros(len(entries), len(base.hyper), dtype=torch.float64, device=CPU)
        self._rows: list[list[float]] = []
        # Hyper-parameters that the kernels read from the user's tensors, without a word to the host.
        self._live = {
            (row, column): tensor
            for row, group in enumerate(self.groups if on_device else ())
            for column, tensor in tensors_of(group, base).items()
            if tensor.device == device and tensor.dtype in (torch.float32, torch.float64)
        }
        self._refresh()
        self._run = self._prepare()

    def _in_order(self, entries: Entries) -> Entries:
        return entries

    def _prepare(self) -> ops.Run:
        return self._whole_step(self.rules, self.measures, self.alphas)

    def _whole_step(self, rules: Sequence[str], measures: Tensor, alphas: Tensor) -> ops.Run:
        """The base step over all members, by rules of their groups."""
        width = len(self.base.hyper)
        live = {row * width + self.base.hyper.index(column): tensor for (row, column), tensor in self._live.items()}
        return prepare(self.backend, self.base, self.members, rules, measures, alphas, self.hyper, live)

    def __call__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._refresh()
        self._run(self._grads(), *self._here(grad_scale, found_inf))

    def squared_norm(self) -> Tensor:
        """Σ g² over all gradients, in float64."""
        self._refresh()
        return self._run.squared_norm(self._grads())

    def _grads(self) -> list[Tensor]:
        return [param.grad for param in self.params]  # type: ignore[misc]

    def _here(self, *scaler: Tensor | None) -> list[Tensor | None]:
        return [None if t is None else t.to(self.device, non_blocking=True) for t in scaler]

    def check_capturable(self) -> None:
        """Raises RuntimeError where a CUDA graph must not hold this launch."""
        if not all(group["capturable"] for group in self.groups):
            raise RuntimeError("a CUDA graph is being captured, but the optimizer was made with capturable=False")
        if not ops.keeps_addresses(self.backend):
            raise RuntimeError(f"a CUDA graph is being captured, which the {self.backend} backend does not permit")

    def _refresh(self) -> None:
        rows = [
            [
                0.0 if (row, column) in self._live else float(value)
                for column, value in columns_of(group, self.base).items()
            ]
            for row, group in enumerate(self.groups)
        ]
        if rows != self._rows:
            self._rows = rows
            self.hyper.copy_(torch.tensor(rows, dtype=torch.float64, device=CPU))


def prepare(
    backend: str,
    base: Base,
    members: Sequence[Member],
    rules: Sequence[str],
    measures: Tensor,
    alphas: Tensor,
    hyper: Tensor,
    live: dict[int, Tensor],
) -> ops.Run:
    """A step of `base` over the local parts of these members; rules: by the rows of their groups, all of which have
    members, in their order."""
    anchors, steps = [], []
    lists: dict[str, list[Tensor]] = {key: [] for key, _ in base.state}
    for member in members:
        row = {**member.group, "rule": rules[member.row]}
        if is_anchored(row):
            anchors.append(local(member.kept["anchor"]))
        for key, drawn in base.state:
            if drawn(row, member.param.dtype):
                lists[key].append(local(member.kept[key]))
        if base.counted(row, member.param.dtype):
            steps.append(member.kept["step"])
    used = [(row, len(list(of))) for row, of in groupby(member.row for member in members)]
    return ops.prepare(
        backend, base, [local(member.param) for member in members], anchors, *lists.values(), steps, measures, alphas,
        hyper, [size for _, size in used], [rules[row] for row, _ in used], [member.seed for member in members],
        **({"live": live} if ops.keeps_addresses(backend) else {}),
    )  # fmt: skip


def is_anchored(group: Row) -> bool:
    return method_of(group["method"]).anchored and group["anchor"] != "zero"


def columns_of(group: Row, base: Base) -> dict[str, Any]:
    """A group's row of the table of hyper-parameters, before it becomes numbers."""
    values: dict[str, Any] = {**group, "anchored": is_anchored(group)}
    values["radius_beta1"], values["radius_beta2"] = group["radius_betas"]
    values["radius"] = radius_of(group)
    if "betas" in group:
        values["beta1"], values["beta2"] = group["betas"]
    return {column: values[column] for column in base.hyper}


def radius_of(group: Row) -> float | Tensor:
    radius: float | Tensor | None = group["radius"]
    if group["method"] != "project":
        return 0.0 if radius is None else radius
    if radius is None or not (isinstance(radius, Tensor) or radius > 0):
        raise ValueError(f"method 'project' needs a radius above 0, got radius={radius}")
    return radius


def tensors_of(group: Row, base: Base) -> dict[str, Tensor]:
    """The hyper-parameters of a group that are tensors."""
    return {column: value for column, value in columns_of(group, base).items() if isinstance(value, Tensor)}
