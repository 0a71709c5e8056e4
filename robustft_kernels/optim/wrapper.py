"""A pull toward the anchor around the step of any torch.optim.Optimizer: Muon, Lion, 8-bit optimizers, one's own."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import registry
from ..core import anchors, checkpoint
from ..core.anchors import Anchor
from ..core.bases import Group
from ..core.methods import documents, method_of
from ..step.launch import label_of
from ..telemetry import Telemetry, collect
from .anchored import AnchoredOptimizer, keep_from_compiler
from .around import METHODS_AROUND, SETTINGS, Around, check_settings, rule_around
from .shown_state import StateWithAnchors

SCALER = ("grad_scale", "found_inf")  # what torch.amp.GradScaler sets where _step_supports_amp_scaling


@documents(METHODS_AROUND)
class Anchored(Optimizer):
    r"""The step of the wrapped optimizer, θ → θ̃, and then the pull

        θ ← θ₀ + α(θ̃ − θ₀)

    with α chosen by `method` (d = θ − θ₀ before the step, c = θ̃ − θ₀ after it, g the gradient, nᵢ = Σ|cᵢ| of row i):

    {methods}

    It takes the wrapped optimizer's place: `param_groups`, `state` and `defaults` are those of the wrapped one, so that
    a scheduler works on either; closures, hooks and copies work as usual; what else the wrapped one has is found here.
    A parameter without a gradient is left alone.

    torch.amp.GradScaler is to be given this optimizer. Where it skips a step, nothing is pulled. An optimizer that
    takes the scale itself (torch's with fused=True) goes on doing so, and nothing is pulled where it skips the step.

    Args:
        optimizer: what makes the steps. Its groups may have keys `method`, `norm`, `strength`, `radius` and `anchor`,
            which then go before the arguments here; a fresh head takes {"params": ..., "method": "none"}. All but
            `anchor` can be changed there at any time.
        method: one of these names.
        norm: what "spd" and "project" measure with; None for "l2".
        strength: λ ≥ 0, without a unit for "spd" (1 projects onto the previous radius), per unit of lr for "l2sp",
            with the lr of each group of the wrapped optimizer.
        radius: γ > 0 of "project", in units of the weights. Like `strength` and lr, it may be a tensor.
        anchor: θ₀: "initial" (a copy of the weights now), "zero" (no memory, no reads), a list of tensors parallel to
            the parameters of all groups (but for those with an anchor of their own), or, if the wrapped optimizer was
            made with names, a mapping from parameter name to tensor or the path of a safetensors file.
        backend: "auto" (the fastest that can serve), "triton", "native" or "reference".
        save_anchors: whether `state_dict` carries the anchors.

    Precision: ‖c‖ − ‖d‖ is here the difference of two sums, in `AnchoredAdamW` a sum over the step itself. In float32
    r has an error of 6e-8 at most (measured; the less, the larger the tensor): 5 digits where a step changes the norm
    by 1%, 4 at 0.1%, 3 at 0.01%, against 7 there. As 1 − α is strength·r, no weight feels more than its last bit.

    Cost, over the wrapped step: "spd" reads weights, anchor and gradient before it, weights and anchor after it (12 + 8
    bytes a float32 parameter), "project" only the latter; the pull, where α ≠ 1, takes 12 more. Memory: the anchor.
    Nothing waits for the device. The pull rounds to nearest, whatever the wrapped step does with bfloat16.

    Raises:
        TypeError: something else than a torch.optim.Optimizer.
        ValueError: another method, an argument or a group's key out of its range, an anchor that does not fit, one of
            our keys among the wrapped optimizer's own hyper-parameters; the message names it.
        RuntimeError: from `step`, a sparse gradient for "spd", or a parameter that the wrapped optimizer replaced or
            gave another form (it must write in place).
    """

    optimizer: Optimizer
    backend: str
    save_anchors: bool
    _settings: Group
    _anchors: dict[Tensor, Tensor]
    _around: Around | None

    def __init__(
        self,
        optimizer: Optimizer,
        method: str = "spd",
        *,
        norm: str | None = None,
        strength: float | Tensor = 1.0,
        radius: float | Tensor | None = None,
        anchor: Anchor = "initial",
        backend: str = "auto",
        save_anchors: bool = True,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Anchored wraps a torch.optim.Optimizer, not a {type(optimizer).__name__}")
        if isinstance(optimizer, AnchoredOptimizer | Anchored):
            raise ValueError(f"{type(optimizer).__name__} has methods and anchors of its own: set them there")
        if clashing := [key for key in SETTINGS if key in optimizer.defaults]:
            name = type(optimizer).__name__
            raise ValueError(f"{name} has a hyper-parameter {clashing[0]!r} of its own, which its groups need for it")
        registry.check_backend(backend)
        rule_around(method, norm)
        word = anchor is None or isinstance(anchor, str | PathLike)
        settings = {"method": method, "norm": norm, "strength": strength, "radius": radius}
        super().__setstate__({
            "defaults": {}, "optimizer": optimizer, "backend": backend, "save_anchors": save_anchors,
            "_settings": {**settings, "anchor": anchor if word else "initial"}, "_anchors": {}, "_around": None,
        })  # fmt: skip
        self.defaults = optimizer.defaults
        groups = optimizer.param_groups
        specs = anchors.over_groups(anchor, groups)
        adopted = [self._adopt(g, g.get("anchor", spec)) for g, spec in zip(groups, specs, strict=True)]
        for group, (own, tensors) in zip(groups, adopted, strict=True):
            group.update(own)
            self._anchors.update(tensors)

    def _patch_step_function(self) -> None:
        """torch's, by which the step runs its hooks."""
        super()._patch_step_function()
        keep_from_compiler(type(self))

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> StateWithAnchors:  # type: ignore[override]
        """The wrapped optimizer's, with the anchors; what is written there goes to the wrapped optimizer."""
        return StateWithAnchors(self.optimizer, self._anchors)

    def __getattr__(self, name: str) -> Any:
        """What else the wrapped optimizer has, such as a `train()` of its own."""
        if name.startswith("__") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"Anchored({self.optimizer!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer, and the pull; returns what that step returns.

        `closure` goes to the wrapped optimizer; the gradients of its first evaluation are those that SPD measures.
        """
        scaler = [name for name in SCALER if name in self.__dict__]
        for name in scaler:
            setattr(self.optimizer, name, getattr(self, name))
        try:
            if closure is None:
                self._before()
                loss = self.optimizer.step()
            else:
                loss = self._step_with(closure)
        finally:
            for name in scaler:
                delattr(self.optimizer, name)
        self._after()
        return loss

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        evaluations = 0

        def measured() -> Any:
            nonlocal evaluations
            loss = closure()
            if not evaluations:
                self._before()
            evaluations += 1
            return loss

        loss = self.optimizer.step(measured)
        if not evaluations:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} did not call its closure, so there is nothing to pull by; call it "
                "yourself, then step() without it"
            )
        return loss

    @torch.no_grad()
    def _before(self) -> None:
        groups = self.param_groups
        if self._around is None or not self._around.holds_for(groups):
            self._around = Around(groups, self._anchors, self.backend, self._around.results if self._around else {})
        self._around.measure(self.__dict__.get("grad_scale"))

    @torch.no_grad()
    def _after(self) -> None:
        assert self._around is not None
        self._around.pull(self.param_groups, self.__dict__.get("found_inf"))

    def telemetry(self) -> dict[str, Telemetry]:
        """As of `AnchoredAdamW`: what the last step did to each parameter."""
        kept = {param: {"anchor": anchor} for param, anchor in self._anchors.items()}
        return collect(self.param_groups, kept, self._around.results if self._around else {})

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group to the wrapped optimizer, with our keys: `method`, `norm`, `strength`, `radius` and `anchor`.

        Raises what the wrapped optimizer raises, and ValueError or TypeError as the constructor does; nothing is then
        added.
        """
        group = dict(param_group)
        spec: Anchor = group.pop("anchor", self._settings["anchor"])
        self.optimizer.add_param_group(group)
        added = self.param_groups[-1]
        try:
            own, tensors = self._adopt({**added, "anchor": spec}, spec)
        except BaseException:
            self.param_groups.pop()
            raise
        added.update(own)
        self._anchors.update(tensors)

    def _adopt(self, group: Group, spec: Anchor) -> tuple[Group, dict[Tensor, Tensor]]:
        """A group's settings, and its anchors by `spec`, its own or the one for all; changes nothing."""
        own = {**self._settings, **{key: group[key] for key in SETTINGS if key in group}}
        if "norm" not in group and own["norm"] not in method_of(own["method"]).rules:
            own["norm"] = None  # it was meant for the other groups
        check_settings({**group, **own})
        params, labels = group["params"], [label_of(group, k) for k in range(len(group["params"]))]
        anchored = method_of(own["method"]).anchored
        for param, label in zip(params, labels, strict=True):
            if anchored and not param.is_floating_point():
                raise ValueError(f"{label} is {param.dtype}; a real floating-point parameter is needed")
        shared = "anchor" not in group
        if shared and not anchored and isinstance(spec, Mapping):
            spec = "initial"  # the mapping is for the other groups
        own["anchor"], tensors = anchors.resolve(spec, params, group.get("param_names"), labels, anchored=anchored)
        return own, dict(zip(params, tensors or (), strict=tensors is not None))

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with "anchor" among the state of each parameter (not where `save_anchors=False`)
        and our settings among its group's."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = self.optimizer.state_dict()
        if self.save_anchors:
            of = dict(saved["state"])
            for param, key, group in _keys(self.param_groups, saved["param_groups"]):
                if param in self._anchors:
                    own = group["anchor"] != "given"
                    of[key] = checkpoint.with_anchor(of.get(key, {}), self._anchors[param], True, own=own)
            saved = {**saved, "state": of}
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, saved)
            saved = saved if result is None else result
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or the wrapped optimizer's; copies anchors, in the dtypes they have.

        What the checkpoint lacks (anchors, settings) stays as it is here. Raises ValueError, before anything is
        changed, where settings, parameter names or the shapes of anchors do not fit, and what the wrapped one raises.
        """
        saved = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            result = before(self, saved)
            saved = saved if result is None else result
        pairs = list(zip(self.param_groups, saved["param_groups"], strict=False))
        of_params = {key: checkpoint.present(of) if isinstance(of, dict) else of for key, of in saved["state"].items()}
        loaded = {
            param: of_params[key]["anchor"]
            for param, key, _ in _keys(self.param_groups, saved["param_groups"])
            if "anchor" in of_params.get(key, {})
        }
        groups = [_complete(ours, theirs, loaded) for ours, theirs in pairs] + saved["param_groups"][len(pairs) :]
        for group, _ in pairs:
            for k, param in enumerate(group["params"]):
                if param in loaded:
                    checkpoint.check_saved(param, label_of(group, k), {"anchor": loaded[param]}, None)
        self.optimizer.load_state_dict({**saved, "state": _without_anchors(of_params), "param_groups": groups})
        for group in self.param_groups:
            for param in group["params"]:
                if param in loaded:
                    self._anchors[param] = checkpoint.loaded_anchor(param, loaded[param])
                elif group["anchor"] == "zero":
                    self._anchors.pop(param, None)
        self._around = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "backend", "save_anchors", "_settings", "_anchors")
        return {**{name: self.__dict__[name] for name in names}, "_around": None, "defaults": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults = self.optimizer.defaults


def _keys(groups: list[Group], saved: list[Group]) -> Iterable[tuple[Tensor, Any, Group]]:
    """Each parameter with its key in a state_dict, and its group."""
    for group, theirs in zip(groups, saved, strict=False):
        for param, key in zip(group["params"], theirs["params"], strict=False):
            yield param, key, group


def _without_anchors(saved: Mapping[Any, Any]) -> dict[Any, Any]:
    """A saved state as the wrapped optimizer had it."""
    bare = {}
    for key, of in saved.items():
        if isinstance(of, dict) and "anchor" in of:
            of = checkpoint.without_anchor(of)
            if not of:
                continue
        bare[key] = of
    return bare


def _complete(group: Group, saved: Group, loaded: Mapping[Tensor, Tensor]) -> Group:
    """A saved group with those of our settings that it lacks. Raises ValueError when it does not fit."""
    has_anchors = any(param in loaded for param in group["params"])
    merged = checkpoint.complete_group(group, saved, SETTINGS, has_anchors=has_anchors)
    check_settings(merged)
    return merged
