"""What an optimizer around another passes on to it, and how both are saved and loaded."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import digests
from ..core import checkpoint
from ..core.bases import Group
from ..core.mistakes import warn_of_no_gradient
from ..core.state import check_loadable, copy_beside, same_numbers
from ..step.guard import StepGuard
from ..step.launch import label_of
from ..step.plans import Plans
from ..step.results import Results
from ..telemetry import Telemetry, collect
from .around import SETTINGS, Around, check_settings
from .late import LateAnchors
from .shown_state import StateWithAnchors, with_anchors

OURS = ("anchor", "anchor_digest")  # in the state of a parameter


class WrappingOptimizer(Optimizer):
    """The protocol of torch.optim for `Anchored`; not to be constructed itself."""

    optimizer: Optimizer
    backend: str
    save_anchors: bool
    _settings: Group
    _anchors: dict[Tensor, Tensor]
    _plans: Plans[Around]
    _results: Results
    _guard: StepGuard
    _late: LateAnchors
    _gradless: bool  # whether it was told that no parameter has a gradient

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> StateWithAnchors:  # type: ignore[override]
        """The wrapped optimizer's, with the anchors. What is written there goes to the wrapped optimizer."""
        return StateWithAnchors(self.optimizer, self._anchors, digests=self.save_anchors)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the wrapped optimizer has, such as a `train()` of its own."""
        if name.startswith("__") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"Anchored({with_anchors(repr(self.optimizer), self.param_groups, self._anchors)})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def _before(self, *, told: bool = False) -> None:
        """Measures what must be known before the wrapped step. Warns if no gradient was ever there, unless that is
        `told`."""
        groups = self.param_groups
        last = self._plans.current
        around = self._plans.find(Around.key_of(groups, last))
        if around is None:
            self._late.settle(groups, self._anchors)
            here = {param for group in groups for param in group["params"]}
            for param in [param for param in self._anchors if param not in here]:
                del self._anchors[param]
            results = self._results.only(here)
            if results is not self._results:  # parameters have left, and plans would keep them alive
                self._plans.clear()
            self._results = results
            around = Around(groups, self._anchors, self.backend, results)
            self._plans.add(around)
            if not (around.launches or told or results or self._gradless):
                self._gradless = True
                warn_of_no_gradient(groups)
        if around is not last:
            around.take_over()
        around.measure(self.__dict__.get("grad_scale"))

    @torch.no_grad()
    def _after(self) -> None:
        """Measures the rest, and pulls."""
        around = self._plans.current
        assert around is not None
        around.pull(self.param_groups, self.__dict__.get("found_inf"))
        if around.moved:
            self._plans.clear()

    def telemetry(self) -> dict[str, Telemetry]:
        """As of `AnchoredAdamW`: what the last step did to each parameter."""
        kept = {param: {"anchor": anchor} for param, anchor in self._anchors.items()}
        return collect(self.param_groups, kept, self._results)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's. The state of each parameter also has its "anchor", and the anchor's digest, unless
        `save_anchors=False`. Each group also has our settings."""
        self._guard.check()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = self.optimizer.state_dict()
        if self.save_anchors:
            of = dict(saved["state"])
            digested = digests.taken(self._anchors)
            for param, key, group in _keys(self.param_groups, saved["param_groups"]):
                if param in self._anchors:
                    own, shown = group["anchor"] != "given", None
                    if param in digested:
                        shown = digests.shown(self._anchors[param], param)
                    of[key] = checkpoint.with_anchor(of.get(key, {}), self._anchors[param], shown, own=own)
            saved = {**saved, "state": of}
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, saved)
            saved = saved if result is None else result
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or the wrapped optimizer's. Anchors are copied in the dtypes they have.

        What the checkpoint lacks (anchors, settings) stays as it is here. Raises ValueError, before anything is
        changed, if settings, parameter names or the shapes of anchors do not fit, or an anchor does not fit its
        digest. Also raises what the wrapped optimizer raises.
        """
        saved = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            result = before(self, saved)
            saved = saved if result is None else result
        pairs = list(zip(self.param_groups, saved["param_groups"], strict=False))
        loaded = {
            param: anchor
            for param, key, _ in _keys(self.param_groups, saved["param_groups"])
            if isinstance(anchor := saved["state"].get(key, {}).get("anchor"), Tensor)
        }
        groups = [_complete(ours, theirs, loaded) for ours, theirs in pairs] + saved["param_groups"][len(pairs) :]
        found = []
        for group, theirs in pairs:
            for k, (param, key) in enumerate(zip(group["params"], theirs["params"], strict=False)):
                if param in loaded:
                    of_param = checkpoint.present(saved["state"][key])
                    check_loadable(
                        param, label_of(group, k), {name: of_param[name] for name in OURS if name in of_param}
                    )
                    found.append((label_of(group, k), of_param, self._anchors.get(param)))
        digests.check_saved(found)
        self.optimizer.load_state_dict({**saved, "state": _without_anchors(saved["state"]), "param_groups": groups})
        for group in self.param_groups:
            for param in group["params"]:
                if param in loaded:
                    if param not in self._anchors or not same_numbers(loaded[param], self._anchors[param]):
                        self._anchors[param] = copy_beside(param, loaded[param])
                elif group["anchor"] == "zero":
                    self._anchors.pop(param, None)
        self._plans.clear()
        self._results = Results()
        self._guard.broke_off(False)
        self._late.loaded(state_dict["param_groups"])
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "backend", "save_anchors", "_settings", "_anchors", "_guard")
        kept = {name: self.__dict__[name] for name in names}
        return {**kept, "defaults": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**fresh(), **state})
        self.defaults = self.optimizer.defaults


def fresh() -> dict[str, Any]:
    """What an `Anchored` keeps of its steps, before the first."""
    return {"_plans": Plans(), "_results": Results(), "_guard": StepGuard(), "_late": LateAnchors(), "_gradless": False}


def _keys(groups: list[Group], saved: list[Group]) -> Iterable[tuple[Tensor, Any, Group]]:
    """Each parameter with its key in a state_dict, and its group."""
    for group, theirs in zip(groups, saved, strict=False):
        for param, key in zip(group["params"], theirs["params"], strict=False):
            yield param, key, group


def _without_anchors(saved: Mapping[Any, Any]) -> dict[Any, Any]:
    """A saved state without our anchors, as the wrapped optimizer saved it."""
    bare = {}
    for key, of in saved.items():
        if isinstance(of, dict) and any(key in of for key in OURS):
            of = checkpoint.without_anchor(of)
            if not of:
                continue
        bare[key] = of
    return bare


def _complete(group: Group, saved: Group, loaded: Mapping[Tensor, Tensor]) -> Group:
    """A saved group, with those of our settings that it lacks added. Raises ValueError when it does not fit."""
    has_anchors = any(param in loaded for param in group["params"])
    merged = checkpoint.complete_group(group, saved, SETTINGS, has_anchors=has_anchors)
    check_settings(merged)
    return merged
