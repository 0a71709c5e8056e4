"""What the optimizers of this package share: the protocol of torch.optim, groups, anchors, plans, checkpoints."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import registry
from ..core import anchors
from ..core.anchors import Anchor
from ..core.bases import DTYPE_OPTIONS, Base, Group, as_dtype, check_hyper
from ..core.files import DISK, MappedFile, file_of, files_of
from ..core.methods import method_of
from ..core.mistakes import (
    check_fresh,
    check_group,
    check_keys,
    check_keywords,
    check_params,
    warn_of_decay,
    warn_of_hold,
    warn_of_no_gradient,
)
from ..core.ranges import Range, check_number
from ..core.unsharded import resharded
from ..finetune import by_radius
from ..step.guard import StepGuard
from ..step.launch import label_of
from ..step.plan import Plan
from ..step.plans import Plans
from ..step.results import Results
from ..telemetry import Telemetry, collect
from .keeping import KeepingOptimizer
from .late import AnchorsOfState, LateAnchors, resolved

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

NO_BOUND = Range(above=True, finite=False)  # infinity clips nothing, but the norm is still told
# What belongs to the optimizer and not to a group. Copies have it, checkpoints do not.
_OWN = ("backend", "save_anchors", "max_grad_norm", "_guard")


class AnchoredOptimizer(KeepingOptimizer):
    """What the optimizers of this package share. Not to be constructed itself."""

    base: Base
    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets grad_scale and found_inf around a step

    def __new__(cls, *_: Any, **named: Any) -> "AnchoredOptimizer":
        """Refuses keywords that `__init__` does not have, and tells which are meant."""
        check_keywords(cls, named)
        return super().__new__(cls)

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        anchor: Anchor,
        backend: str,
        save_anchors: bool | str,
        max_grad_norm: float | Tensor | None,
    ) -> None:
        registry.check_backend(backend)
        if save_anchors not in (True, False, "digest"):
            raise ValueError(f"save_anchors must be True, False or 'digest', got {save_anchors!r}")
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, NO_BOUND)
            _refuse_partition()
        self.backend, self.max_grad_norm = backend, max_grad_norm
        self.grad_norm: Tensor | None = None
        self.save_anchors = save_anchors
        self._plans: Plans[Plan] = Plans()
        self._results = Results()
        self._guard = StepGuard()
        self._gradless = False  # whether it was told that no parameter has a gradient
        self._graphed: list[Plan] = []  # CUDA graphs refer to their memory
        self._files: list[MappedFile] = []  # that anchors of the plan are in
        words = anchor is None or (isinstance(anchor, str) and anchor in ("initial", "zero"))
        self._late = LateAnchors()
        self._given: list[Anchor] = []  # for the groups that the constructor has still to add
        listed, groups = _listed(params)
        if groups and not by_radius.is_one(defaults["radius"]):
            listed = groups = by_radius.for_groups(groups, defaults)
            defaults = {**defaults, "radius": None}
        self._given = [] if words else anchors.over_groups(anchor, groups)
        super().__init__(listed, {**defaults, "anchor": anchor if words else "initial"})
        self._given = []

    def _patch_step_function(self) -> None:
        """torch's own, which makes the step run its hooks."""
        super()._patch_step_function()
        keep_from_compiler(type(self))

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group. Its keys are the constructor's, and `params`. `pre` is another name for `anchor`.

        If `radius` is not one number, it adds several: a group for each radius.

        Raises ValueError, RuntimeError or TypeError naming the key or parameter that is unfit. Nothing is added then.
        """
        check_group(param_group)
        with _all_or_nothing(self):
            for group in by_radius.for_groups([param_group], {}):
                self._add(group)

    def _add(self, param_group: Group) -> None:
        group = {**param_group, "params": with_shards(param_group["params"])}
        if "backend" in group:
            raise ValueError("backend is chosen for the whole optimizer, not for a group")
        check_keys(group, {*self.defaults, "gate"})
        if "anchor" in group and "pre" in group:
            raise ValueError("a group has both 'anchor' and 'pre', which mean the same; give one")
        own = "anchor" in group or "pre" in group
        spec: Anchor = group.pop("pre", None) if "pre" in group else group.pop("anchor", None)
        super().add_param_group(group)  # names, duplicates of other groups, defaults
        shared = self._given.pop(0) if self._given else group["anchor"]
        self._adopt(group, spec if own else shared, shared=not own)
        warn_of_decay(group, self.param_groups[:-1])
        warn_of_hold(group)
        self._plans.clear()

    def _adopt(self, group: Group, spec: Anchor, *, shared: bool) -> None:
        params = group["params"]
        labels = [label_of(group, k) for k in range(len(params))]
        if len({id(param) for param in params}) != len(params):
            raise ValueError("a group has the same parameter twice")
        for param, label in zip(params, labels, strict=True):
            if not param.is_floating_point() and param.requires_grad:
                raise ValueError(f"{label} is {param.dtype}; a real floating-point parameter is needed")
            if group["stochastic_rounding"] and param.dtype == torch.float16:
                raise ValueError(f"{label} is float16; stochastic_rounding is for bfloat16 (float32 needs none)")
            if group["stochastic_rounding"] and group["master_weights"] and param.dtype == torch.bfloat16:
                raise ValueError(f"{label} would have stochastic_rounding and master_weights; choose one of them")
        for key in DTYPE_OPTIONS:
            group[key] = as_dtype(key, group[key])
        check_hyper(group)
        anchors.check_options(group["anchor_dtype"], group["anchor_device"])
        anchored = method_of(group["method"]).anchored
        if shared and not anchored and isinstance(spec, Mapping):
            spec = "initial"  # the mapping is for the other groups
        dtype, device = group["anchor_dtype"], group["anchor_device"]
        group["anchor"], tensors = resolved(
            spec, group, anchored=anchored, waits=self.save_anchors is True, dtype=dtype, device=device
        )  # a checkpoint that lacks the anchors needs them to be here, trained or not
        for param, tensor in tensors.items():
            self.state[param]["anchor"] = tensor
        self._late.note(len(self.param_groups) - 1, group, tensors)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all groups. `closure` re-evaluates the model and returns the loss, which `step` returns.

        A step is whole, or it is known that it is not. If it is broken off between its first write and its last, later
        steps and `state_dict` raise RuntimeError until a checkpoint is loaded.
        """
        self._guard.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._plan_of_step(told=closure is not None)
        for file in self._files:
            file.check()
        scaler = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self.grad_norm = plan.run(*scaler, self.max_grad_norm)
        if plan.captured and plan not in self._graphed:
            self._graphed.append(plan)
        return loss

    def _plan_of_step(self, *, told: bool) -> Plan:
        """The plan for the gradients that there are, with what the last step left of its parameters. Warns if none was
        ever there, unless that is `told`."""
        last = self._plans.current
        key = Plan.key_of(self.base, self.param_groups, self.state, last)
        plan = self._plans.find(key)
        if plan is None:
            self._check_files()
            self._late.settle(self.param_groups, AnchorsOfState(self.state))
            here = {param for group in self.param_groups for param in group["params"]}
            self._drop_unused(here)
            results = self._results.only(here)
            if results is not self._results:  # parameters have left, and plans would keep them alive
                self._plans.clear()
            self._results = results
            plan = Plan(self.base, self.param_groups, self.state, self.backend, results, self._guard)
            self._plans.add(plan)
            if not (plan.launches or told or results or self._gradless):
                self._gradless = True
                warn_of_no_gradient(self.param_groups)
            self._files = files_of(AnchorsOfState(self.state).values())
        if plan is not last:
            plan.take_over()
        return plan

    def reanchor(self) -> None:
        """Takes the weights as they are now for θ₀, in every group that has anchors. Moments and step counts stay."""
        for param, tensor in self._late.retake(self.param_groups, AnchorsOfState(self.state)).items():
            self.state[param]["anchor"] = tensor
        self._plans.clear()

    def telemetry(self) -> dict[str, Telemetry]:
        """What the last step did to each parameter, by name. Each entry is a tuple of floats, `telemetry.Telemetry`:
        (deviation, relative_deviation, alpha, selected, selections, radius, inconsistencies). Parameters without names
        are called by their place over all groups: "0", "1", ...

        The steps leave these numbers on the device at no cost. This call reads them, in one transfer a device, and
        waits for it. Before the first step, and after loading, deviations are those of the weights as they are. The
        counts begin at 0.

        Over processes, each may call it alone, as nothing is exchanged. What only the other processes know is nan. That
        is the deviation before the first step, and under methods that measure nothing: call
        `robustft_kernels.deviation` in all of them.
        """
        self._check_files()
        return collect(self.param_groups, self.state, self._results)

    def _check_files(self) -> None:
        """Raises RuntimeError if a file that anchors are in was written since it was mapped."""
        for file in files_of(AnchorsOfState(self.state).values()):
            file.check()

    def __getstate__(self) -> dict[str, Any]:
        self._check_files()
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = self.__dict__["state"]  # torch has put a plain dictionary there
        self._plans, self._results, self._guard = Plans(), Results(), self.__dict__.get("_guard") or StepGuard()
        self._graphed, self.grad_norm = [], None
        self._given, self._gradless = [], False
        self._files = []
        for group in self.param_groups:
            anchors_of = [self.state[p]["anchor"] for p in group["params"] if "anchor" in self.state.get(p, {})]
            if group.get("anchor_device") == DISK and any(file_of(anchor) is None for anchor in anchors_of):
                group["anchor_device"] = None  # those of a copy are in memory
        self._late = self.__dict__.get("_late") or LateAnchors()  # torch comes here to load, too


@contextmanager
def _all_or_nothing(optimizer: Optimizer) -> Iterator[None]:
    """Takes groups that are added within away again, with the state of their parameters, if there is an error."""
    before, known = len(optimizer.param_groups), set(optimizer.state)
    try:
        yield
    except BaseException:
        for param in [param for param in optimizer.state if param not in known]:
            del optimizer.state[param]
        del optimizer.param_groups[before:]
        raise


def _listed(params: Params) -> tuple[Any, list[Group]]:
    """`params` as torch takes them, with lists in place of generators. Second, the groups that they make."""
    check_params(params)
    if isinstance(params, Tensor | set):  # which torch refuses
        return params, []
    listed: list[Any] = list(params)
    check_fresh(params, listed)
    if not (listed and isinstance(listed[0], dict)):
        return listed, [{"params": listed}]
    for k, group in enumerate(listed):
        check_group(group)
        of = group["params"]
        listed[k] = {**group, "params": [of] if isinstance(of, Tensor) else of if isinstance(of, set) else list(of)}
    return listed, listed


def _refuse_partition() -> None:
    """Raises ValueError inside the constructor of a ZeroRedundancyOptimizer, whose processes have some parameters
    each."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if module is not None else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            raise ValueError(
                "max_grad_norm would clip by the gradients of one process's parameters, as ZeroRedundancyOptimizer "
                "gives it no others; call torch.nn.utils.clip_grad_norm_ before step(), or use fully_shard"
            )
        frame = frame.f_back


def with_shards(params: Any) -> Any:
    """A group's `params` as torch takes them, with the shard in place of each of FSDP2's unsharded copies."""
    if isinstance(params, set):  # which torch refuses
        return params
    listed = [params] if isinstance(params, Tensor) else list(params)
    shards = resharded(of[1] if isinstance(of, tuple) else of for of in listed)
    return [(of[0], shard) if isinstance(of, tuple) else shard for of, shard in zip(listed, shards, strict=True)]


def keep_from_compiler(cls: type[Optimizer]) -> None:
    """Makes torch.compile call an optimizer's step, hooks included, as it is. That is one graph break, and there is no
    trace that a schedule could invalidate."""
    if getattr(cls.step, "_torchdynamo_disable", False):
        return
    step: Any = torch.compiler.disable(cls.step, reason="it is a fused kernel already")
    if not hasattr(step, "_torchdynamo_wrapper_id"):  # in torch 2.10, torch.compile loses `self` by the way back
        del step._torchdynamo_orig_callable
    cls.step = step  # type: ignore[method-assign]
