"""The one gate from Python objects to flat lists. A plan is built once and holds until what it was built from
changes; a step of a valid plan hands the backends new gradients and hyper-parameters, nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import ops, state
from .bases import MEASURES, Base, Group
from .methods import method_of


def label_of(group: Group, k: int) -> str:
    """How messages call parameter `k` of a group: by its name if it has one."""
    names = group.get("param_names")
    return f"parameter {names[k]!r}" if names else f"parameter {k} (shape {tuple(group['params'][k].shape)})"


class Plan:
    """One step over all parameter groups: one launch for each device."""

    def __init__(self, base: Base, groups: list[Group], kept: Mapping[Tensor, state.ParamState], backend: str) -> None:
        self.base = base
        by_device: dict[torch.device, dict[int, list[int]]] = {}
        for row, group in enumerate(groups):
            for k, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                _check(param, label_of(group, k))
                by_device.setdefault(param.device, {}).setdefault(row, []).append(k)
        self.launches = [
            Launch(base, [(groups[row], ks) for row, ks in rows.items()], kept, backend, device)
            for device, rows in by_device.items()
        ]
        self._key = self._key_of(groups, kept)
        self._alive = [tuple(of_param.values()) for of_param in kept.values()]  # or their ids could be used again

    def holds_for(self, groups: list[Group], kept: Mapping[Tensor, state.ParamState]) -> bool:
        """Whether parameters, gradients (addresses aside), anchors, state and methods are what they were."""
        return self._key == self._key_of(groups, kept)

    def run(self) -> None:
        for launch in self.launches:
            launch()

    def _key_of(self, groups: list[Group], kept: Mapping[Tensor, state.ParamState]) -> object:
        structure = [
            (g["method"], g["anchor"], len(g["params"]), *(drawn(g) for _, drawn in self.base.state)) for g in groups
        ]
        return structure, ops.fingerprint([p for group in groups for p in group["params"]], list(kept.values()))


class Launch:
    """All parameters of one device, prepared for one backend.

    measures, alphas: what the last step found, one row a parameter; see ops.py.
    """

    def __init__(
        self,
        base: Base,
        entries: list[tuple[Group, list[int]]],
        kept: Mapping[Tensor, state.ParamState],
        backend: str,
        device: torch.device,
    ) -> None:
        self.base = base
        self.groups = [group for group, _ in entries]
        self.params = [group["params"][k] for group, ks in entries for k in ks]
        dtypes = {t.dtype for p in self.params for t in (p, p.grad)}
        self.backend = ops.choose_backend(backend, device, dtypes)

        anchors: list[Tensor] = []
        lists: dict[str, list[Tensor]] = {key: [] for key, _ in base.state}
        steps: list[Tensor] = []
        for group, ks in entries:
            for k in ks:
                of_param = kept[group["params"][k]]
                state.prepare(group["params"][k], of_param, base, group)
                if _anchored(group):
                    if "anchor" not in of_param:
                        raise ValueError(
                            f"{label_of(group, k)} has no anchor for method {group['method']!r}: its group was added "
                            "with a method that needs none; choose the method when adding the group"
                        )
                    anchors.append(of_param["anchor"])
                for key, drawn in base.state:
                    if drawn(group):
                        lists[key].append(of_param[key])
                if base.counted(group):
                    steps.append(of_param["step"])

        n = len(self.params)
        table_device = device if self.backend == "reference" else torch.device("cpu")
        self.measures = torch.zeros(n, len(MEASURES), dtype=torch.float64, device=table_device)
        self.alphas = torch.ones(n, dtype=torch.float64, device=table_device)
        self.hyper = torch.zeros(len(entries), len(base.hyper), dtype=torch.float64)
        self._rows: list[list[float]] = []
        self._refresh()
        self._run = ops.prepare(
            self.backend, base, self.params, anchors, *lists.values(), steps, self.measures, self.alphas, self.hyper,
            [len(ks) for _, ks in entries], [method_of(group["method"]).rule for group in self.groups],
        )  # fmt: skip

    def __call__(self) -> None:
        self._refresh()
        self._run([param.grad for param in self.params])

    def _refresh(self) -> None:
        rows = [_row(group, self.base) for group in self.groups]
        if rows != self._rows:
            self._rows = rows
            self.hyper.copy_(torch.tensor(rows, dtype=torch.float64))


def _anchored(group: Group) -> bool:
    return method_of(group["method"]).anchored and group["anchor"] != "zero"


def _row(group: Group, base: Base) -> list[float]:
    values: dict[str, Any] = {**group, "anchored": _anchored(group)}
    if "betas" in group:
        values["beta1"], values["beta2"] = group["betas"]
    return [float(values[column]) for column in base.hyper]


def _check(param: Tensor, label: str) -> None:
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(f"{label} has a sparse gradient ({grad.layout}), which is not supported; make it dense")
    if not grad.is_floating_point():
        raise RuntimeError(f"{label} has a {grad.dtype} gradient; a real floating-point gradient is needed")
    if not state.is_dense(param):
        raise RuntimeError(
            f"{label} has overlapping or gapped memory (shape {tuple(param.shape)}, strides {param.stride()}), which "
            "cannot be updated in place; make it contiguous before giving it to the optimizer"
        )
