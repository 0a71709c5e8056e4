"""What `Anchored` does around a step that is not ours: measure before it, measure after it, decide α, pull."""

from collections.abc import Mapping
from itertools import islice
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from . import ops, state
from .bases import MEASURES, STILL, Group
from .decide import decide
from .launch import CPU, Found, found_tables, label_of
from .methods import RULES, rule_of, segments_of
from .sharding import Segments, any_infinite, any_sharded, local, placed_as
from .spread import HALVES, tell

SETTINGS = ("method", "norm", "strength", "radius", "anchor")  # our keys in a group
# What each method reads of its group. The other methods work on the gradient, which here is not ours.
READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "spd": ("strength",),
    "l2sp": ("lr", "strength"),
    "project": ("radius",),
}
LIVE = ("lr", "strength", "radius")  # those that may be tensors
TWICE = ("spd", "spd_rows")  # measured before the step and after it


class Around:
    """Both halves for all groups, prepared: a launch for each device.

    anchors: of each parameter that has one; brought to the layout of the parameter. found: of plan.Plan.

    Raises ValueError or RuntimeError naming a setting or a parameter with which no step can be made.
    """

    def __init__(self, groups: list[Group], anchors: dict[Tensor, Tensor], backend: str, found: Found) -> None:
        by_device: dict[torch.device, list[tuple[Group, list[int]]]] = {}
        for group in groups:
            if missing := [key for key in SETTINGS if key not in group]:
                raise RuntimeError(f"a group has no {missing[0]!r}: add groups with Anchored.add_param_group")
            check_settings(group)
            of_group: dict[torch.device, list[int]] = {}
            for k, param in enumerate(group["params"]):
                if param.grad is not None and group["method"] != "none":
                    _check(group, k, anchors)
                    of_group.setdefault(param.device, []).append(k)
            for device, ks in of_group.items():
                by_device.setdefault(device, []).append((group, ks))
        self.found = dict(found)
        self.launches = [_Launch(of, anchors, backend, device, self.found) for device, of in by_device.items()]
        self._structure, self._fingerprint = _structure(groups), _fingerprint(groups)

    def holds_for(self, groups: list[Group]) -> bool:
        """Whether parameters, gradients (addresses aside) and rules are what they were."""
        return bool(self._fingerprint == _fingerprint(groups) and self._structure == _structure(groups))

    def measure(self, grad_scale: Tensor | None) -> None:
        """What must be known before the step. Gradients are divided by `grad_scale`."""
        for launch in self.launches:
            launch.measure(grad_scale)

    def pull(self, groups: list[Group], found_inf: Tensor | None) -> None:
        """The rest, after the step; nothing where `found_inf` is not 0.

        Raises RuntimeError naming a parameter that the step has replaced, or given another form.
        """
        if self._fingerprint != _fingerprint(groups):
            for launch in self.launches:
                launch.catch_up()
        for launch in self.launches:
            launch.pull(found_inf)


class _Launch:
    """The parameters of one device. First come the groups that are measured before the step too, then the others whose
    α is decided here, because some of a segment may lie in other processes; the rest is measured and pulled at once.

    measures, alphas: what the last step found, one row a segment, over all its parts; see ops.py.
    """

    def __init__(
        self,
        entries: list[tuple[Group, list[int]]],
        anchors: dict[Tensor, Tensor],
        backend: str,
        device: torch.device,
        found: Found,
    ) -> None:
        apart = any_sharded(group["params"][k] for group, ks in entries for k in ks)

        def order(entry: tuple[Group, list[int]]) -> tuple[bool, bool]:
            rule = _rule(entry[0])
            return rule not in TWICE, not (apart and RULES[rule].elsewhere)

        entries = sorted(entries, key=order)
        self._device = device
        self._groups = [group for group, _ in entries]
        self._rules = [_rule(group) for group in self._groups]
        self._places = [(group, k) for group, ks in entries for k in ks]
        self._params = [group["params"][k] for group, k in self._places]
        self._forms = [_form(param) for param in self._params]
        self._sizes = [len(ks) for _, ks in entries]
        self._twice = sum(rule in TWICE for rule in self._rules)
        self._decided = sum(bool(RULES[rule].elsewhere) for rule in self._rules) if apart else self._twice
        rules = [rule for rule, size in zip(self._rules, self._sizes, strict=True) for _ in range(size)]
        counts, here = (
            [segments_of(rule, part.shape) for rule, part in zip(rules, parts, strict=True)]
            for parts in (self._params, map(local, self._params))
        )
        self._counts, self._here = _by_group(counts, self._sizes), _by_group(here, self._sizes)
        decided = sum(self._sizes[: self._decided])
        self._segments = Segments(self._params[:decided], rules[:decided]) if apart else None

        self._backend = ops.choose_backend(backend, device, {t.dtype for p in self._params for t in (p, p.grad)})
        self._anchors: list[Tensor | None] = []
        for group, k in self._places:
            param, kept = group["params"][k], group["anchor"] != "zero"
            if kept:
                anchors[param] = state.beside(param, anchors[param])
            self._anchors.append(anchors[param] if kept else None)
        self.measures, self.alphas = found_tables(self._params, counts, device, found)
        # What the sweeps find here, which is all there is unless there are other parts.
        self._sums, self._known = self.measures, self.alphas
        if apart:
            self._sums = torch.zeros(sum(here), len(MEASURES), dtype=torch.float64, device=device)
            self._known = torch.ones(sum(here), dtype=torch.float64, device=device)

        self._hyper = torch.zeros(len(self._groups), len(STILL.hyper), dtype=torch.float64, device=CPU)
        self._rows: list[list[float]] = []
        # Hyper-parameters that the kernels read from the user's tensors.
        self._live = {
            (row, column): value
            for row, group in enumerate(self._groups if ops.keeps_addresses(self._backend) else ())
            for column, value in enumerate(_columns(group))
            if isinstance(value, Tensor) and value.device == device and value.dtype in (torch.float32, torch.float64)
        }
        self._refresh()
        self._prepare()

    def _prepare(self) -> None:
        observe = [RULES[rule].elsewhere for rule in self._rules[: self._decided]]
        self._observe_before = self._sweep(observe[: self._twice])
        self._observe_or_pull = self._sweep(observe + self._rules[self._decided :])
        self._pull_as_given = self._sweep([HALVES[rule] for rule in observe])

    def _sweep(self, rules: list[str]) -> ops.Run:
        """Over the first groups, as many as there are rules."""
        sizes, segments = self._sizes[: len(rules)], _total(self._here[: len(rules)])
        params = [local(param) for param in self._params[: sum(sizes)]]
        anchors = [local(anchor) for anchor in self._anchors[: sum(sizes)] if anchor is not None]
        live = {row * len(STILL.hyper) + column: t for (row, column), t in self._live.items() if row < len(rules)}
        return ops.prepare(
            self._backend, STILL, params, anchors, [], [], self._sums[:segments], self._known[:segments],
            self._hyper[: len(rules)], sizes, rules, [],
            **({"live": live} if ops.keeps_addresses(self._backend) else {}),
        )  # fmt: skip

    def measure(self, grad_scale: Tensor | None) -> None:
        self._refresh()
        if self._twice:
            params = self._params[: sum(self._sizes[: self._twice])]
            grads = [local(placed_as(param.grad, param)) for param in params]
            self._observe_before(grads, self._to_device(grad_scale), None)
            self._before = self._sums[: _total(self._here[: self._twice]), :2].clone()

    def pull(self, found_inf: Tensor | None) -> None:
        found_inf = self._to_device(found_inf)
        if found_inf is not None:
            found_inf = any_infinite(found_inf, self._params)
        self._observe_or_pull([], None, found_inf)
        if self._decided:
            n = _total(self._here[: self._decided])
            found = self._sums[:n, :3].clone()
            if self._twice:
                dots, before = self._before.T
                found[: len(before)] = torch.stack([dots, before, found[: len(before), 1] - before], dim=1)
            sums = self._segments.whole(found) if self._segments else found
            alphas = self._decide(sums)
            self._known[:n] = self._segments.parts(alphas) if self._segments else alphas
            self._pull_as_given([], None, found_inf)
            self._sums[:n, :3] = found
        else:
            n, sums, alphas = 0, self._sums[:0, :3], self._known[:0]
        if self._segments:
            sums, alphas = torch.cat([sums, self._sums[n:, :3]]), torch.cat([alphas, self._known[n:]])
            tell(self.measures, self.alphas, sums, alphas, found_inf)

    def _decide(self, sums: Tensor) -> Tensor:
        """α of the segments of the first groups, from what is known of all their parts."""
        alphas, first = [], 0
        for group, rule, counts in zip(self._groups, self._rules, self._counts[: self._decided], strict=False):
            strength, radius = (self._scalar(group.get(key)) for key in ("strength", "radius"))
            alphas.append(decide(rule, sums[first : first + sum(counts)], counts, strength, radius))
            first += sum(counts)
        return torch.cat(alphas)

    def catch_up(self) -> None:
        """With parameters whose memory has moved in the step."""
        forms = [_form(param) for param in self._params]
        for (group, k), param, now, then in zip(self._places, self._params, forms, self._forms, strict=True):
            if group["params"][k] is not param or now[1:] != then[1:]:
                done = "changed the form (shape, strides, dtype or device) of"
                raise RuntimeError(
                    f"the wrapped optimizer {done if group['params'][k] is param else 'replaced'} "
                    f"{label_of(group, k)} in its step, so that nothing was pulled; Anchored needs one that writes to "
                    "its parameters in place"
                )
        if forms != self._forms:
            self._forms = forms
            self._prepare()

    def _refresh(self) -> None:
        for group in self._groups:
            check_settings(group)
        rows = [
            [0.0 if (row, column) in self._live else float(value) for column, value in enumerate(_columns(group))]
            for row, group in enumerate(self._groups)
        ]
        if rows != self._rows:
            self._rows = rows
            self._hyper.copy_(torch.tensor(rows, dtype=torch.float64, device=CPU))

    def _to_device(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(self._device, non_blocking=True)

    def _scalar(self, value: float | Tensor | None) -> float | Tensor:
        if value is None:
            return 0.0
        return value.to(self._device, non_blocking=True).reshape(()) if isinstance(value, Tensor) else value


def _by_group(counts: list[int], sizes: list[int]) -> list[list[int]]:
    of = iter(counts)
    return [list(islice(of, size)) for size in sizes]


def _total(by_group: list[list[int]]) -> int:
    return sum(map(sum, by_group))


def rule_around(method: str, norm: str | None) -> str:
    """The rule of a method that can go around a step. Raises ValueError for another."""
    rule = rule_of(method, norm)
    if method not in READS:
        raise ValueError(
            f"method {method!r} works within the step, which is not ours here: use AnchoredAdamW or AnchoredSGD, or "
            f"one of {', '.join(map(repr, READS))}"
        )
    return rule


def check_settings(group: Group) -> None:
    """Raises ValueError naming a setting of a group that is out of its range. Reads no tensor."""
    rule_around(group["method"], group["norm"])
    for key in READS[group["method"]]:
        value = group.get(key)
        if value is None:
            raise ValueError(f"method {group['method']!r} needs {key}, which a group does not have")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{key} must be one number, got a tensor of shape {tuple(value.shape)}")
        if not isinstance(value, Tensor) and not (isfinite(value) and value >= 0 and (value or key != "radius")):
            raise ValueError(f"{key} must be finite and {'above' if key == 'radius' else 'at least'} 0, got {value}")


def _check(group: Group, k: int, anchors: Mapping[Tensor, Tensor]) -> None:
    """Raises RuntimeError where a parameter with a gradient cannot be treated as its group says."""
    param, label, method = group["params"][k], label_of(group, k), group["method"]
    if group["anchor"] != "zero":
        if param not in anchors:
            raise RuntimeError(
                f"{label} has no anchor for method {method!r}: it is new in its group, or its method was 'none' when "
                "the group was added; add a group that has both from the beginning"
            )
        if anchors[param].shape != param.shape:
            raise RuntimeError(f"{label} has shape {tuple(param.shape)}, its anchor {tuple(anchors[param].shape)}")
    if not state.is_dense(local(param)):
        raise RuntimeError(f"{label} has overlapping or gapped memory and cannot be pulled; make it contiguous")
    if method == "spd" and (param.grad.layout != torch.strided or not param.grad.is_floating_point()):
        kind = f"{param.grad.layout} {param.grad.dtype}"
        raise RuntimeError(f"{label} has a {kind} gradient; method 'spd' needs a dense real one")


def _rule(group: Group) -> str:
    return rule_around(group["method"], group["norm"])


def _columns(group: Group) -> list[Any]:
    """A group's row of the table of hyper-parameters, before it becomes numbers; SPD's are read where it decides."""
    reads = READS[group["method"]] if group["method"] != "spd" else ()
    flags = {"maximize": group.get("maximize", False), "anchored": group["anchor"] != "zero"}
    row = {**{key: group[key] for key in reads}, **flags}
    return [row.get(column, 0.0) for column in STILL.hyper]


def _structure(groups: list[Group]) -> object:
    """Equal for groups of the same rules and tensors."""
    return [
        (
            len(group["params"]),
            *(group.get(key) for key in ("method", "norm", "anchor")),
            *((key, id(t), t.data_ptr()) for key in LIVE if isinstance(t := group.get(key), Tensor)),
        )
        for group in groups
    ]


def _fingerprint(groups: list[Group]) -> object:
    return ops.fingerprint([param for group in groups for param in group["params"]], [], False)


def _form(param: Tensor) -> tuple[Any, ...]:
    return local(param).data_ptr(), param.shape, param.stride(), param.dtype, param.device
