"""What an optimizer keeps for its parameters: how it is shown, saved and loaded."""

from collections.abc import Mapping, Set
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import digests, registry
from ..core import checkpoint, state
from ..core.bases import ADAMW, Base, Group, spec_of
from ..step.guard import StepGuard
from ..step.launch import label_of
from ..step.plan import Plan
from ..step.plans import Plans
from .late import LateAnchors
from .shown_state import CompletingState, with_anchors

# Keys of torch.optim's own groups that choose an implementation, not a formula.
_TORCH_SWITCHES = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")


class KeepingOptimizer(Optimizer):
    """The state of `AnchoredOptimizer` and its checkpoints. Not to be constructed itself."""

    base: Base
    backend: str
    save_anchors: bool | str
    _plans: Plans[Plan]
    _guard: StepGuard
    _late: LateAnchors

    @property
    def state(self) -> CompletingState:
        """What is kept for each parameter, by name. It completes itself when it is asked whether it holds anything."""
        held: CompletingState = self.__dict__["state"]
        return held

    @state.setter
    def state(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        self.__dict__["state"] = CompletingState(WeakMethod(self._show_digests), state)

    def __repr__(self) -> str:
        """torch's, with the backend that made the last step, and how many parameters of each group have anchors."""
        plan = self._plans.current
        served = sorted({launch.backend.name for launch in plan.launches}) if plan is not None else []
        told = f"{self.backend} ({', '.join(served) or 'chosen at the first step'})"
        name, _, groups = super().__repr__().partition("\n")
        anchors = {param for param, of in self.state.items() if "anchor" in of}
        return with_anchors(f"{name}\nBackend: {told}\n{groups}", self.param_groups, anchors)

    def _complete_state(self) -> None:
        """Makes what a parameter does not keep yet."""
        for group in self.param_groups:
            spec = spec_of(group)
            for param in group["params"]:
                if not param.requires_grad:
                    continue
                backend = registry.choose_backend(self.backend, param.device, {param.dtype})
                steps_on = param.device if backend.keeps_addresses else torch.device("cpu")
                state.fill_state(param, self.state[param], self.base, spec, steps_on)

    def _drop_unused(self, here: Set[Tensor]) -> None:
        """Drops what a look has made for parameters that are no longer `here`, and that no step has used."""
        for param in [param for param in self.state if param not in here]:
            kept = self.state[param]
            if "anchor" not in kept and "step" in kept and not kept["step"]:
                del self.state[param]

    def _show_digests(self) -> None:
        """Makes what a parameter does not keep yet, the digest of its anchor too. A digest that is there is not taken
        anew, since not every process knows that an anchor was written; `state_dict` does that."""
        self._complete_state()
        if any("anchor" in of and "anchor_digest" not in of for of in self.state.values()):
            self._digested()
        for param, kept in self.state.items() if self.save_anchors else ():
            anchor = kept.get("anchor")
            # One that is right stays, or each look would void the plan.
            if anchor is not None and digests.is_known(anchor) and not digests.is_of(kept.get("anchor_digest"), anchor):
                kept["anchor_digest"] = digests.copy_for(anchor, param)

    def _digested(self) -> dict[Tensor, Tensor]:
        """The anchors whose digests are saved, and known from here on."""
        if not self.save_anchors:
            return {}
        anchors = {param: of["anchor"] for param, of in self.state.items() if "anchor" in of}
        return digests.taken(anchors)

    def _saves(self, group: Group) -> bool | str:
        """How a state_dict carries the anchors of a group: True, "digest", or False."""
        return "digest" if self.save_anchors and group["anchor"] == "file" else self.save_anchors

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the anchors in the state, and a digest of each. Anchors from a file, or all with
        `save_anchors="digest"`, give their digest alone. With `save_anchors=False` there is neither.

        Digests of anchors that are spread over processes are sums over them. They are taken when they are asked for
        first, by all of these processes.

        It is complete at any time. What a parameter does not keep yet is made here, as torch.distributed.checkpoint
        loads only what is there.
        """
        self._guard.check()
        self._complete_state()
        saved = super().state_dict()
        digested = self._digested()
        for group, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            how, own = self._saves(group), group["anchor"] != "given"
            for param, key in zip(group["params"], theirs["params"], strict=True):
                if (anchor := saved["state"].get(key, {}).get("anchor")) is not None:
                    shown = digests.shown(anchor, param) if param in digested else None
                    kept = anchor if how is True else None
                    saved["state"][key] = checkpoint.with_anchor(saved["state"][key], kept, shown, own=own)
        saved["state"] = {key: of for key, of in saved["state"].items() if of}
        saved["param_groups"] = list(map(checkpoint.plain_group, saved["param_groups"]))
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of what `state_dict` returned, or of a state dict of the torch.optim optimizer with the same
        base.

        Float32 state and anchors keep their dtypes. What the checkpoint lacks (anchors, method, strength ...) stays as
        it is here. Raises ValueError, before anything is changed, if shapes or parameter names differ, or an anchor
        does not fit its digest.
        """
        incoming: dict[str, Any] = {}

        def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            of_params = {key: checkpoint.present(of) for key, of in saved["state"].items()}
            groups = self._complete(saved["param_groups"], of_params)
            saved = {**saved, "state": of_params, "param_groups": groups}
            found = []
            for group, theirs in zip(self.param_groups, saved["param_groups"], strict=False):
                for k, (param, key) in enumerate(zip(group["params"], theirs["params"], strict=False)):
                    present = self.state[param].get("anchor") if param in self.state else None
                    label, of = label_of(group, k), saved["state"].get(key, {})
                    state.check_loadable(param, label, of)
                    found.append((label, of, present))
            digests.check_saved(found)
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

        # The user's hooks run before `check`, and after `restore`.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
            self._late.loaded(state_dict["param_groups"])
            self._guard.broke_off(False)
        finally:
            for hook in hooks:
                hook.remove()
            self._plans.clear()

    def _complete(self, saved: list[Group], saved_state: Mapping[Any, Any]) -> list[Group]:
        """The saved groups. What they lack is taken from ours."""
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
