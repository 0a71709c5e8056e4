"""The one gate from Python objects to flat lists. A plan is built once and holds until what it was built from
changes; a step of a valid plan hands the backends new gradients and hyper-parameters, nothing else."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import ops, state
from .bases import MEASURES, Base, Group, Row
from .methods import method_of, rule_of, segments_of

CPU = torch.device("cpu")
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_
STRUCTURE = ("rule", "anchor", "stochastic_rounding", "seed", "state_dtype", "capturable")  # a plan is made for these
Found = dict[Tensor, tuple[Tensor, Tensor]]  # of a parameter, its segments' rows of measures and their alphas


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


class Plan:
    """One step over all parameter groups: one launch for each device.

    starts: the place of each group's first parameter among all the optimizer's, if these are not all.
    found: for each parameter ever stepped, its segments' rows of measures and their alphas, as the last step that
    touched it left them.
    """

    def __init__(
        self,
        base: Base,
        groups: list[Group],
        kept: Mapping[Tensor, state.ParamState],
        backend: str,
        found: Found,
        starts: Sequence[int] | None = None,
    ) -> None:
        self.base = base
        self.found = dict(found)
        self.captured = False
        if _capturing():
            raise RuntimeError(
                "this step needs a new plan, which cannot be made while a CUDA graph is captured; take a "
                "step with the same parameters, and gradients for the same of them, before the capture"
            )
        by_device: dict[torch.device, dict[int, list[int]]] = {}
        for row, group in enumerate(groups):
            for k, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                _check(param, label_of(group, k))
                by_device.setdefault(param.device, {}).setdefault(row, []).append(k)
        starts = starts or [0, *accumulate(len(group["params"]) for group in groups)]
        self.launches = [
            Launch(
                base, [(groups[row], ks, starts[row]) for row, ks in rows.items()], kept, backend, device, self.found
            )
            for device, rows in by_device.items()
        ]
        self._addresses = any(ops.keeps_addresses(launch.backend) for launch in self.launches)
        self._key = self._key_of(groups, kept)
        # Or their ids could be used again.
        self._alive = [*(tuple(of.values()) for of in kept.values()), *(_tensors(group, base) for group in groups)]

    def holds_for(self, groups: list[Group], kept: Mapping[Tensor, state.ParamState]) -> bool:
        """Whether parameters, gradients (addresses aside), anchors, state and methods are what they were."""
        return self._key == self._key_of(groups, kept)

    def run(
        self,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        max_grad_norm: float | Tensor | None = None,
    ) -> Tensor | None:
        """One step, with gradients divided by `grad_scale`; none where `found_inf` is not 0. With `max_grad_norm` the
        gradients of all parameters, divided, are scaled down to that norm; returns the norm they had.

        While a CUDA graph is captured it becomes part of it, and whoever replays that needs this plan's memory.
        """
        capturing = _capturing()
        grad_norm = None
        if max_grad_norm is not None and self.launches:
            grad_scale, grad_norm = self._clip(grad_scale, max_grad_norm)
        for launch in self.launches:
            if capturing and launch.device.type == "cuda":
                launch.check_capturable()
            launch(grad_scale, found_inf)
        self.captured |= capturing
        return grad_norm

    def _clip(self, grad_scale: Tensor | None, max_grad_norm: float | Tensor) -> tuple[Tensor, Tensor]:
        """What to divide the gradients by, and their norm, on the device of the first launch."""
        device = self.launches[0].device
        squares = [launch.squared_norm().to(device, non_blocking=True) for launch in self.launches]
        norm = torch.stack(squares).sum().sqrt()
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, torch.float64, non_blocking=True)
            norm = norm / grad_scale
        excess = ((norm + CLIP_EPS) / max_grad_norm).clamp(min=1)
        return (excess if grad_scale is None else excess * grad_scale).float(), norm

    def _key_of(self, groups: list[Group], kept: Mapping[Tensor, state.ParamState]) -> object:
        structure = [
            (
                *(row[key] for key in STRUCTURE),
                len(row["params"]),
                *(drawn(row, torch.bfloat16) for _, drawn in self.base.state),
                *((name, id(t), t.data_ptr()) for name, t in _tensors(row, self.base).items()),
            )
            for row in map(row_of, groups)
        ]
        params = [param for group in groups for param in group["params"]]
        return structure, ops.fingerprint(params, list(kept.values()), self._addresses)


class Launch:
    """All parameters of one device, prepared for one backend. entries: groups, which of their parameters, and the place
    of their first among all the optimizer's. found: of Plan; takes on where it stood, and comes to refer to this.

    measures, alphas: what the last step found, one row a segment; see ops.py.
    """

    def __init__(
        self,
        base: Base,
        entries: list[tuple[Group, list[int], int]],
        kept: Mapping[Tensor, state.ParamState],
        backend: str,
        device: torch.device,
        found: Found,
    ) -> None:
        self.base, self.device = base, device
        self.groups = [group for group, _, _ in entries]
        self.params = [group["params"][k] for group, ks, _ in entries for k in ks]
        dtypes = {t.dtype for p in self.params for t in (p, p.grad)}
        self.backend = ops.choose_backend(backend, device, dtypes)

        anchors: list[Tensor] = []
        lists: dict[str, list[Tensor]] = {key: [] for key, _ in base.state}
        steps: list[Tensor] = []
        seeds: list[int] = []
        on_device = ops.keeps_addresses(self.backend)
        for group, ks, start in entries:
            row = row_of(group)
            for k in ks:
                of_param = kept[group["params"][k]]
                state.prepare(group["params"][k], of_param, base, row, steps_on=device if on_device else CPU)
                if _anchored(group):
                    if "anchor" not in of_param:
                        raise ValueError(
                            f"{label_of(group, k)} has no anchor for method {group['method']!r}: its group was added "
                            "with a method that needs none; choose the method when adding the group"
                        )
                    anchors.append(of_param["anchor"])
                for key, drawn in base.state:
                    if drawn(row, group["params"][k].dtype):
                        lists[key].append(of_param[key])
                if base.counted(row, group["params"][k].dtype):
                    steps.append(of_param["step"])
                seeds.append(group["seed"] << 32 | start + k)

        rules = [rule_of(group["method"], group["norm"]) for group in self.groups]
        of_rule = [rule for (_, ks, _), rule in zip(entries, rules, strict=True) for _ in ks]
        counts = [segments_of(rule, p.shape) for rule, p in zip(of_rule, self.params, strict=True)]
        self.measures, self.alphas = found_tables(self.params, counts, device, found)
        self.hyper = torch.zeros(len(entries), len(base.hyper), dtype=torch.float64, device=CPU)
        self._rows: list[list[float]] = []
        # Hyper-parameters that the kernels read from the user's tensors, without a word to the host.
        self._live = {
            (row, column): tensor
            for row, group in enumerate(self.groups if on_device else ())
            for column, tensor in _tensors(group, base).items()
            if tensor.device == device and tensor.dtype in (torch.float32, torch.float64)
        }
        self._refresh()
        width = len(base.hyper)
        live = {row * width + base.hyper.index(column): tensor for (row, column), tensor in self._live.items()}
        self._run = ops.prepare(
            self.backend, base, self.params, anchors, *lists.values(), steps, self.measures, self.alphas, self.hyper,
            [len(ks) for _, ks, _ in entries], rules, seeds,
            **({"live": live} if on_device else {}),
        )  # fmt: skip

    def __call__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._refresh()
        scaler = (None if t is None else t.to(self.device, non_blocking=True) for t in (grad_scale, found_inf))
        self._run([param.grad for param in self.params], *scaler)

    def squared_norm(self) -> Tensor:
        """Σ g² over all gradients, in float64."""
        self._refresh()
        return self._run.squared_norm([param.grad for param in self.params])

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
                for column, value in _columns(group, self.base).items()
            ]
            for row, group in enumerate(self.groups)
        ]
        if rows != self._rows:
            self._rows = rows
            self.hyper.copy_(torch.tensor(rows, dtype=torch.float64, device=CPU))


def _anchored(group: Row) -> bool:
    return method_of(group["method"]).anchored and group["anchor"] != "zero"


def _columns(group: Row, base: Base) -> dict[str, Any]:
    """A group's row of the table of hyper-parameters, before it becomes numbers."""
    values: dict[str, Any] = {**group, "anchored": _anchored(group)}
    values["radius_beta1"], values["radius_beta2"] = group["radius_betas"]
    values["radius"] = _radius(group)
    if "betas" in group:
        values["beta1"], values["beta2"] = group["betas"]
    return {column: values[column] for column in base.hyper}


def _radius(group: Row) -> float | Tensor:
    radius: float | Tensor | None = group["radius"]
    if group["method"] != "project":
        return 0.0 if radius is None else radius
    if radius is None or not (isinstance(radius, Tensor) or radius > 0):
        raise ValueError(f"method 'project' needs a radius above 0, got radius={radius}")
    return radius


def _tensors(group: Row, base: Base) -> dict[str, Tensor]:
    """The hyper-parameters of a group that are tensors."""
    return {column: value for column, value in _columns(group, base).items() if isinstance(value, Tensor)}


def _capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


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
