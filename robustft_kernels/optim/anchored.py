"""What the optimizers of this package share: the protocol of torch.optim, groups, anchors, plans, checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import registry
from ..core import anchors
from ..core.anchors import Anchor
from ..core.bases import DTYPE_OPTIONS, Base, Group, as_dtype, check_hyper
from ..core.methods import method_of
from ..core.ranges import Range, check_number
from ..step.launch import label_of
from ..step.plan import Plan
from ..step.results import Results
from ..telemetry import Telemetry, collect
from .keeping import KeepingOptimizer

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

NO_BOUND = Range(above=True, finite=False)  # infinity clips nothing, and tells the norm
# What is the optimizer's own rather than a group's, and goes with copies but not with checkpoints.
_OWN = ("backend", "save_anchors", "max_grad_norm")


class AnchoredOptimizer(KeepingOptimizer):
    """What the optimizers of this package share; not to be constructed itself."""

    base: Base
    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets grad_scale and found_inf around a step

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
        self.backend, self.max_grad_norm = backend, max_grad_norm
        self.grad_norm: Tensor | None = None
        self.save_anchors = save_anchors
        self._plan: Plan | None = None
        self._results: Results = {}  # of the plan; outlives it
        self._graphed: list[Plan] = []  # CUDA graphs refer to their memory
        words = anchor is None or (isinstance(anchor, str) and anchor in ("initial", "zero"))
        self._given: list[Anchor] = []  # for the groups that are still to be added, while the optimizer is made
        listed, groups = _listed(params)
        self._given = [] if words else anchors.over_groups(anchor, groups)
        super().__init__(listed, {**defaults, "anchor": anchor if words else "initial"})
        self._given = []

    def _patch_step_function(self) -> None:
        """torch's, by which the step runs its hooks."""
        super()._patch_step_function()
        keep_from_compiler(type(self))

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its keys are the constructor's, and `params`. `pre` is another name for `anchor`.

        Raises ValueError, RuntimeError or TypeError naming the key or parameter, and adds nothing, where one is
        unfit.
        """
        group = dict(param_group)
        if "backend" in group:
            raise ValueError("backend is chosen for the whole optimizer, not for a group")
        if "anchor" in group and "pre" in group:
            raise ValueError("a group has both 'anchor' and 'pre', which mean the same; give one")
        own = "anchor" in group or "pre" in group
        spec: Anchor = group.pop("pre", None) if "pre" in group else group.pop("anchor", None)
        super().add_param_group(group)  # names, duplicates of other groups, defaults
        try:
            shared = self._given.pop(0) if self._given else group["anchor"]
            self._adopt(group, spec if own else shared, shared=not own)
        except BaseException:
            self.param_groups.pop()
            raise
        self._plan = None

    def _adopt(self, group: Group, spec: Anchor, *, shared: bool) -> None:
        params, names = group["params"], group.get("param_names")
        labels = [label_of(group, k) for k in range(len(params))]
        if len({id(param) for param in params}) != len(params):
            raise ValueError("a group has the same parameter twice")
        for param, label in zip(params, labels, strict=True):
            if not param.is_floating_point():
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
        group["anchor"], tensors = anchors.resolve(
            spec, params, names, labels, anchored=anchored, dtype=group["anchor_dtype"], device=group["anchor_device"]
        )
        for param, tensor in zip(params, tensors or (), strict=tensors is not None):
            self.state[param]["anchor"] = tensor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all groups. `closure` re-evaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plan is None or not self._plan.holds_for(self.param_groups, self.state):
            self._plan = Plan(self.base, self.param_groups, self.state, self.backend, self._results)
            self._results = self._plan.results
        scaler = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self.grad_norm = self._plan.run(*scaler, self.max_grad_norm)
        if self._plan.captured and self._plan not in self._graphed:
            self._graphed.append(self._plan)
        return loss

    def telemetry(self) -> dict[str, Telemetry]:
        """What the last step did to each parameter, {name: (deviation, relative_deviation, alpha, selected, selections,
        radius)}, each a float; see `telemetry.Telemetry`. Parameters without names go by their place over all groups:
        "0", "1", ...

        The steps leave these numbers on the device at no cost; this call reads them, in one transfer a device, and
        waits for it. Before the first step, and after loading, deviations are those of the weights as they are, and the
        counts begin at 0.
        """
        return collect(self.param_groups, self.state, self._results)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = self.__dict__["state"]  # torch has put a plain dictionary there
        self._plan, self._results, self.grad_norm = None, {}, None
        self._graphed = []
        self._given = []


def _listed(params: Params) -> tuple[Any, list[Group]]:
    """`params` as torch takes them, with lists in place of generators; and the groups that they are."""
    if isinstance(params, Tensor | set):  # which torch refuses
        return params, []
    listed: list[Any] = list(params)
    if not (listed and isinstance(listed[0], dict)):
        return listed, [{"params": listed}]
    for k, group in enumerate(listed):
        of = group.get("params", ())
        listed[k] = {**group, "params": [of] if isinstance(of, Tensor) else of if isinstance(of, set) else list(of)}
    return listed, listed


def keep_from_compiler(cls: type[Optimizer]) -> None:
    """Makes torch.compile call an optimizer's step, hooks included, as it is: one graph break, and nothing traced that
    a schedule could invalidate."""
    if not getattr(cls.step, "_torchdynamo_disable", False):
        cls.step = torch.compiler.disable(cls.step, reason="it is a fused kernel already")  # type: ignore[method-assign]
