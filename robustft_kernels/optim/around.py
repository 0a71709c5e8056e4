"""What `Anchored` does around the step of another optimizer: measure before it, measure after it, decide α, pull."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from ..core import state
from ..core.bases import NO_STEP, RANGES, Group, GroupSpec, is_anchored
from ..core.contract import StepTensors, empty_results
from ..core.exchange import Reach, any_infinite
from ..core.memory import in_memory, without_memory
from ..core.methods import GATES, MEASURES, METHODS, RULES, Rule, rule_of, rule_of_group
from ..core.ranges import check_number
from ..core.sharding import local, placed_as, spec_of_shards
from ..finetune.by_radius import is_one
from ..step.agreement import Agreement
from ..step.decide import Terms
from ..step.fingerprint import fingerprint
from ..step.hyper import HyperTable, identities_of, terms_of
from ..step.launch import Share, label_of, shard_of, split_by_reach
from ..step.no_step import NoStep, half_of, observed, pulled
from ..step.peers import Part, Peers
from ..step.plan import check_whole
from ..step.results import Results

SETTINGS = ("method", "norm", "gate", "strength", "radius", "anchor")  # our keys in a group
METHODS_AROUND = [name for name, of in METHODS.items() if all(RULES[rule].goes_around for rule in of.all_rules)]
BEFORE, GAIN = (MEASURES.index(name) for name in ("before", "gain"))


class Around:
    """Both halves for all groups, prepared, with one launch for each device.

    anchors: of each parameter that has one. They are brought to the parameter's memory layout.
    results: of all parameters.

    moved: whether a step has moved the memory of parameters. It then serves no other step.

    Raises ValueError or RuntimeError naming a setting or a parameter with which no step can be made.
    """

    def __init__(self, groups: list[Group], anchors: dict[Tensor, Tensor], backend: str, results: Results) -> None:
        by_device: dict[torch.device, list[Share]] = {}
        for group in groups:
            check_settings(group)
            of_group: dict[torch.device, list[int]] = {}
            for k, param in enumerate(group["params"]):
                if param.grad is not None and group["method"] != "none":
                    _check(group, k, anchors)
                    of_group.setdefault(param.device, []).append(k)
            for device, places in of_group.items():
                by_device.setdefault(device, []).append(Share(group, _spec(group), places))
        self._results = results
        self.launches = [_Launch(of, anchors, backend, device, results) for device, of in by_device.items()]
        tensors = [of for launch in self.launches for of in launch.tensors]
        self._agreement = Agreement(groups, list(map(_spec, groups)), tensors)
        self.addresses = any(launch.backend.keeps_addresses for launch in self.launches)
        self.key: tuple[Hashable, ...] = ()
        self.key = self.key_of(groups, self)
        self.moved = False
        params = [param for group in groups for param in group["params"]]
        self._alive = [spec_of_shards(t) for param in params for t in (param, param.grad)]

    @staticmethod
    def key_of(groups: list[Group], last: "Around | None") -> tuple[Hashable, ...]:
        """What it depends on: parameters, gradients (addresses aside) and rules. Of the last one it takes whether a
        backend keeps the addresses of hyper-parameters in tensors."""
        known = last.key[-1] if last is not None and last.key else None
        return _structure(groups, last is not None and last.addresses), _fingerprint(groups, known)

    def take_over(self) -> None:
        """Makes ready for a step after one of another plan."""
        for launch in self.launches:
            self._results.lend(launch.tables)
        self._agreement.renew()

    def measure(self, grad_scale: Tensor | None) -> None:
        """Measures what must be known before the step. Gradients are divided by `grad_scale`.

        Raises RuntimeError if processes with shards do not make the same step.
        """
        self._agreement.check()
        for launch in self.launches:
            launch.measure(grad_scale)

    def pull(self, groups: list[Group], found_inf: Tensor | None) -> None:
        """Measures the rest after the step, and pulls. Does nothing when `found_inf` is not 0.

        Raises RuntimeError naming a parameter that the step has replaced, or given another form.
        """
        if self.key[-1] != _fingerprint(groups, self.key[-1]):
            self.moved = True
            for launch in self.launches:
                launch.catch_up()
        for launch in self.launches:
            launch.pull(found_inf)


class _Launch:
    """The parameters of one device, in three parts.

    First come those that are measured before the step too. Then come the others whose α is decided here, because other
    processes may have shards of them. The rest is measured and pulled in one sweep.

    tables: what the last step found.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        anchors: dict[Tensor, Tensor],
        backend: str,
        device: torch.device,
        results: Results,
    ) -> None:
        shares = sorted(split_by_reach(shares), key=lambda of: (not of.spec.rule.compares, not _is_decided(of)))
        self._device, self._shares = device, shares
        self._places = [(share.group, k) for share in shares for k in share.places]
        params = [group["params"][k] for group, k in self._places]
        self._forms = [_form(param) for param in params]
        self.backend = registry.choose_backend(backend, device, {t.dtype for p in params for t in (p, p.grad)})
        for param in (param for share in shares if share.spec.anchored for param in share.params):
            anchors[param] = state.beside(param, anchors[param])
        self.tensors = [
            StepTensors(share.spec, row, param, anchors[param] if share.spec.anchored else None)
            for row, share in enumerate(shares)
            for param in share.params
        ]
        self._twice = [of for of in self.tensors if of.spec.rule.compares]
        self._decided = [of for of in self.tensors if _is_decided(shares[of.row])]
        self._peers = Peers(shares, sum(map(_is_decided, shares)), device)
        self.tables = self._peers.tables(results, device)
        # If the sweep decides all, it writes what is kept.
        self._all_at_once = not self._decided and all(share.reach is Reach.HERE for share in shares)
        self._sums, self._known = self.tables.results, self.tables.alphas
        if not self._all_at_once:
            self._sums, self._known = empty_results(sum(shard_of(of).segments for of in self.tensors), device)
        groups = [share.group for share in shares]
        # The sweeps read no hyper-parameters of rules that are decided here.
        specs = [half_of(share.spec) if _is_decided(share) else share.spec for share in shares]
        self._hyper = HyperTable(NO_STEP, groups, specs, device, addresses=self.backend.keeps_addresses)
        self._prepare()

    def _prepare(self) -> None:
        rest = self.tensors[len(self._decided) :]
        self._observe_before = self._sweep(observed(self._twice))
        self._observe_or_pull = self._sweep([*observed(self._decided), *rest], self._sums, self._known)
        self._pull_as_given = self._sweep(pulled(self._decided))

    def _sweep(self, tensors: Sequence[StepTensors], *tables: Tensor) -> NoStep:
        return NoStep(self.backend, list(map(shard_of, tensors)), self._hyper.table, self._hyper.live, *tables)

    def measure(self, grad_scale: Tensor | None) -> None:
        for share in self._shares:
            check_settings(share.group)
        self._hyper.refresh()
        if self._twice:
            grads = [in_memory(local(placed_as(of.param.grad, of.param))) for of in self._twice]  # type: ignore[arg-type]
            self._observe_before(grads, self._to_device(grad_scale))
            self._before = self._observe_before.results[:, : len(MEASURES)].clone()

    def pull(self, found_inf: Tensor | None) -> None:
        found_inf = self._to_device(found_inf)
        if found_inf is not None:
            found_inf = any_infinite(found_inf, [of.param for of in self.tensors])
        self._observe_or_pull(found_inf=found_inf)
        if self._all_at_once:
            return
        found = self._sums[:, : len(MEASURES)].clone()
        if self._twice:
            twice = len(self._before)
            after = found[:twice, BEFORE].clone()
            found[:twice] = self._before
            found[:twice, GAIN] = after - self._before[:, BEFORE]
        decision = self._peers.decide(found, self._known, self._terms)
        if self._decided:
            self._pull_as_given.alphas.copy_(decision.alphas[: self._peers.decided])
            self._pull_as_given(found_inf=found_inf)
        decision.write(self.tables, found_inf)

    def _terms(self, part: Part) -> Terms:
        return terms_of(part.share.group, NO_STEP, part.share.spec, self._device)

    def catch_up(self) -> None:
        """Prepares anew if the step has moved the memory of a parameter."""
        forms = [_form(of.param) for of in self.tensors]
        for (group, k), of, now, then in zip(self._places, self.tensors, forms, self._forms, strict=True):
            if group["params"][k] is not of.param or now[1:] != then[1:]:
                done = "changed the form (shape, strides, dtype or device) of"
                raise RuntimeError(
                    f"the wrapped optimizer {done if group['params'][k] is of.param else 'replaced'} "
                    f"{label_of(group, k)} in its step, so that nothing was pulled; Anchored needs one that writes to "
                    "its parameters in place"
                )
        if forms != self._forms:
            self._forms = forms
            self._prepare()

    def _to_device(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(self._device, non_blocking=True)


def _is_decided(share: Share) -> bool:
    """Whether α is decided in torch, and not by the sweep."""
    return share.spec.rule.waits and bool(share.spec.rule.compares or share.together)


def rule_around(method: str, norm: str | None, gate: str) -> Rule:
    """The rule of a method that can go around a step. Raises ValueError for a method that cannot."""
    rule = rule_of(method, norm, gate)
    if not rule.goes_around:
        raise ValueError(
            f"method {method!r} works within the step, which is not ours here: use AnchoredAdamW or AnchoredSGD, or "
            f"one of {', '.join(map(repr, METHODS_AROUND))}"
        )
    return rule


def check_settings(group: Group) -> None:
    """Raises ValueError naming a setting of a group that is out of its range. Reads no tensor."""
    if not is_one(group.get("radius")):
        raise ValueError(
            "radius must be one number for a group of another optimizer; make the optimizer of "
            "rft.by_radius(model.named_parameters(), radius), which has a group for each radius"
        )
    for key in rule_around(group["method"], group["norm"], group.get("gate", GATES[0])).reads:
        check_number(key, group.get(key), RANGES[key], f"method {group['method']!r}", read=False)


def _check(group: Group, k: int, anchors: Mapping[Tensor, Tensor]) -> None:
    """Raises RuntimeError when a parameter with a gradient cannot be treated as its group says."""
    param, label, method = group["params"][k], label_of(group, k), group["method"]
    if what := without_memory(param):
        raise RuntimeError(f"{label} is {what}")
    check_whole(param, label, rule_of_group(group))
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
    measured = rule_of_group(group).compares
    if measured and (what := without_memory(param.grad)):
        raise RuntimeError(f"{label} has a gradient that is {what}")
    if measured and (param.grad.layout != torch.strided or not param.grad.is_floating_point()):
        kind = f"{param.grad.layout} {param.grad.dtype}"
        raise RuntimeError(f"{label} has a {kind} gradient; method {method!r} needs a dense real one")


def _spec(group: Group) -> GroupSpec:
    """The spec of a group, from our settings alone. Its other keys are the wrapped optimizer's. Raises RuntimeError if
    it lacks a setting."""
    if missing := [key for key in SETTINGS if key not in group and key != "gate"]:
        raise RuntimeError(f"a group has no {missing[0]!r}: add groups with Anchored.add_param_group")
    return GroupSpec(rule_around(group["method"], group["norm"], group.get("gate", GATES[0])), is_anchored(group))


def _structure(groups: list[Group], addresses: bool) -> Hashable:
    """Equal for groups of the same rules, and with `addresses` of the same tensors of hyper-parameters."""
    specs = list(map(_spec, groups))
    live = [identities_of(group, NO_STEP, spec) for group, spec in zip(groups, specs, strict=True)] if addresses else ()
    of_groups = [(len(group["params"]), spec.rule, group["anchor"]) for group, spec in zip(groups, specs, strict=True)]
    return addresses, tuple(of_groups), tuple(live)


def _fingerprint(groups: list[Group], last: Hashable | None) -> Hashable:
    return fingerprint([param for group in groups for param in group["params"]], [], False, last)


def _form(param: Tensor) -> tuple[Any, ...]:
    return local(param).data_ptr(), param.shape, param.stride(), param.dtype, param.device
