"""What the optimizers of this package share: the protocol of torch.optim, groups, anchors, plans, checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import registry
from ..core import anchors, checkpoint, state
from ..core.anchors import Anchor
from ..core.bases import ADAMW, DTYPE_OPTIONS, Base, Group, as_dtype, check_hyper, spec_of
from ..core.methods import method_of
from ..core.ranges import Range, check_number
from ..step.launch import label_of
from ..step.plan import Plan
from ..step.results import Results
from ..telemetry import Telemetry, collect
from .shown_state import CompletingState

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

# Keys of torch.optim's own groups that choose an implementation, not a formula.
_TORCH_SWITCHES = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")
NO_BOUND = Range(above=True, finite=False)  # infinity clips nothing, and tells the norm
# What is the optimizer's own rather than a group's, and goes with copies but not with checkpoints.
_OWN = ("backend", "save_anchors", "max_grad_norm")


class AnchoredOptimizer(Optimizer):
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
        words = anchor is None or anchor in ("initial", "zero")
        self._given: Anchor = None if words else anchor
        super().__init__(params, {**defaults, "anchor": anchor if words else "initial"})
        if isinstance(self._given, Mapping):
            anchors.check_no_surplus(self._given, [n for g in self.param_groups for n in g.get("param_names", ())])
        self._given = None

    @property
    def state(self) -> CompletingState:
        """What is kept of each parameter, by name; complete when it is asked whether there is any."""
        held: CompletingState = self.__dict__["state"]
        return held

    @state.setter
    def state(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        self.__dict__["state"] = CompletingState(WeakMethod(self._complete_state), state)

    def _complete_state(self) -> None:
        """Begins what a parameter does not keep yet, and puts the digest of an anchor beside it if that is saved in its
        place."""
        for group in self.param_groups:
            spec = spec_of(group)
            for param in group["params"]:
                if not param.requires_grad:
                    continue
                backend = registry.choose_backend(self.backend, param.device, {param.dtype})
                steps_on = param.device if backend.keeps_addresses else torch.device("cpu")
                kept = self.state[param]
                state.fill_state(param, kept, self.base, spec, steps_on)
                if "anchor" in kept and self._saves(group) == "digest":
                    kept["anchor_digest"] = anchors.digest(kept["anchor"])

    def _saves(self, group: Group) -> bool | str:
        """How a state_dict has the anchors of a group: True, "digest", or False."""
        return "digest" if self.save_anchors and group["anchor"] == "file" else self.save_anchors

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
            shared = group["anchor"] if self._given is None else self._given
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
        if not shared and isinstance(spec, Mapping):
            anchors.check_no_surplus(spec, names or ())
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

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the anchors among the state; with their SHA-256 where they are in a file or
        `save_anchors="digest"`, without either where `save_anchors=False`. Complete at any time: what a parameter has
        not yet begins here, since torch.distributed.checkpoint loads only what is there."""
        self._complete_state()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for key in group["params"]:
                if "anchor" in (of := saved["state"].get(key, {})):
                    own = group["anchor"] != "given"
                    saved["state"][key] = checkpoint.with_anchor(of, of["anchor"], self._saves(group), own=own)
        saved["state"] = {key: of for key, of in saved["state"].items() if of}
        saved["param_groups"] = list(map(checkpoint.plain_group, saved["param_groups"]))
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of what `state_dict` returned, or of a torch.optim optimizer's of the same base.

        Float32 state and anchors keep their dtypes. What the checkpoint lacks (anchors, method, strength ...) stays
        as it is here. Raises ValueError, before anything is changed, where shapes or parameter names differ.
        """
        incoming: dict[str, Any] = {}

        def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            of_params = {key: checkpoint.present(of) for key, of in saved["state"].items()}
            groups = self._complete(saved["param_groups"], of_params)
            saved = {**saved, "state": of_params, "param_groups": groups}
            for group, theirs in zip(self.param_groups, saved["param_groups"], strict=False):
                for k, (param, key) in enumerate(zip(group["params"], theirs["params"], strict=False)):
                    present = self.state[param].get("anchor") if param in self.state else None
                    checkpoint.check_saved(param, label_of(group, k), saved["state"].get(key, {}), present)
            incoming.update(saved)
            return saved

        present = {param: of.get("anchor") for param, of in self.state.items()}

        def restore(_: Optimizer) -> None:  # torch has cast every floating state to its parameter's dtype
            for group, theirs in zip(self.param_groups, incoming["param_groups"], strict=True):
                spec = spec_of(group)
                for param, key in zip(group["params"], theirs["params"], strict=True):
                    loaded = state.load(param, incoming["state"].get(key, {}), spec, present.get(param))
                    if group["anchor"] != "zero" and "anchor" not in loaded and present.get(param) is not None:
                        loaded["anchor"] = present[param]
                    if loaded:
                        self.state[param] = loaded
                    else:
                        self.state.pop(param, None)

        # The user's hooks run before the one and after the other.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
            self._plan = None

    def _complete(self, saved: list[Group], saved_state: Mapping[Any, Any]) -> list[Group]:
        """The saved groups with what they lack taken from ours."""
        complete = []
        for group, theirs in zip(self.param_groups, saved, strict=False):
            if theirs.get("decoupled_weight_decay") is False and theirs.get("weight_decay") and self.base is ADAMW:
                raise ValueError(
                    "the checkpoint is of torch.optim.Adam with a coupled weight_decay, here it is decoupled; "
                    "set weight_decay to 0 in its groups, or start anew"
                )
            ours = [key for key in group if key not in ("params", "param_names")]
            bare = {key: value for key, value in theirs.items() if key not in _TORCH_SWITCHES}
            has_anchors = any("anchor" in saved_state.get(key, {}) for key in theirs["params"])
            complete.append(checkpoint.complete_group(group, bare, ours, has_anchors=has_anchors))
        return complete + saved[len(complete) :]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = self.__dict__["state"]  # torch has put a plain dictionary there
        self._plan, self._results, self.grad_norm = None, {}, None
        self._graphed = []
        self._given = None


def keep_from_compiler(cls: type[Optimizer]) -> None:
    """Makes torch.compile call an optimizer's step, hooks included, as it is: one graph break, and nothing traced that
    a schedule could invalidate."""
    if not getattr(cls.step, "_torchdynamo_disable", False):
        cls.step = torch.compiler.disable(cls.step, reason="it is a fused kernel already")  # type: ignore[method-assign]
