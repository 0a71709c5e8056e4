"""A pull toward the anchor around the step of any torch.optim.Optimizer: Muon, Lion, 8-bit optimizers, one's own."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import registry
from ..core import anchors
from ..core.anchors import Anchor
from ..core.bases import Group
from ..core.methods import GATES, documents, gate_key, method_of
from ..core.mistakes import check_group, check_keys, warn_of_hold
from ..core.sharding import version_of
from ..core.unsharded import shards_of
from ..step.guard import uninterrupted
from ..step.launch import label_of
from .anchored import keep_from_compiler, with_shards
from .around import METHODS_AROUND, SETTINGS, check_settings, rule_around
from .late import resolved
from .wrappable import check_wrappable
from .wrapping import WrappingOptimizer, fresh

SCALER = ("grad_scale", "found_inf")  # what torch.amp.GradScaler sets if _step_supports_amp_scaling


@documents(METHODS_AROUND)
class Anchored(WrappingOptimizer):
    r"""Makes the step of the wrapped optimizer, θ → θ̃, and then pulls toward the anchor θ₀:

        θ ← θ₀ + α(θ̃ − θ₀)

    `method` chooses α. It looks at the gradient g, at d = θ − θ₀ before the step, and at c = θ̃ − θ₀ after it. The norm
    of row i is nᵢ = Σ|cᵢ|. The methods are:

    {methods}

    It takes the wrapped optimizer's place. `param_groups`, `state` and `defaults` are those of the wrapped optimizer,
    so a scheduler works on either. Closures, hooks and copies work as usual. Whatever else the wrapped optimizer has is
    found here too. A parameter without a gradient is left alone.

    Give this optimizer to torch.amp.GradScaler. When the scaler skips a step, nothing is pulled. An optimizer that
    takes the scale itself (torch's with fused=True) still does so. When it skips the step, nothing is pulled either.

    Args:
        optimizer: what makes the steps. Its groups may have the keys `method`, `norm`, `gate`, `strength`,
            `radius` and `anchor`. They go before the arguments here. A fresh head takes {"params": ..., "method":
            "none"}. All but `anchor` can be changed there at any time.
        method: one of these names.
        norm: what "spd" and "project" measure with. None is "l2".
        gate: which steps "spd" may hold back: "inconsistent", those with ⟨g,d⟩ > 0, or "away", all that lead away.
        strength: λ ≥ 0. For "spd" it has no unit, and 1 projects onto the previous radius. For "l2sp" it is per unit of
            lr, with the lr of each group of the wrapped optimizer.
        radius: γ > 0 of "project", in units of the weights. Like `strength` and lr, it may be a tensor.
        anchor: θ₀. It is one of
            - "initial": a copy of the weights now, or at their first step if they are frozen or written before it.
            - "zero": it needs no memory and no reads.
            - A list of tensors parallel to the parameters of all groups that have no anchor of their own.
            - A mapping from parameter name to tensor, or the path of a safetensors file. Either needs a wrapped
              optimizer that was made with names.
        backend: "auto" (the fastest that can serve), "cuda", "triton", "native" or "reference".
        save_anchors: whether `state_dict` carries the anchors, with a digest of each. Loading compares the digests.

    Precision: ‖c‖ − ‖d‖ is the difference of two sums here, and a sum over the step itself in `AnchoredAdamW`. In
    float32 r has an error of at most 6e-8 (measured), and less for larger tensors. When a step changes the norm by 1%,
    that leaves 5 digits. At 0.1% it leaves 4, at 0.01% 3. `AnchoredAdamW` has 7. As 1 − α is strength·r, no weight
    feels more than its last bit.

    Cost, over the wrapped step: "spd" reads weights, anchor and gradient before it, 12 bytes a float32 parameter. After
    it, "spd" and "project" read weights and anchor, 8 bytes. The pull takes 12 more if α ≠ 1. Memory: the anchor.
    Nothing waits for the device. The pull rounds to nearest, whatever the wrapped step does with bfloat16.

    Raises:
        TypeError: something else than a torch.optim.Optimizer.
        ValueError: another method, an argument or a group's key out of its range, or an anchor that does not fit. Also
            one of our keys among the wrapped optimizer's own hyper-parameters, one of FSDP2's unsharded copies among
            its parameters, or an optimizer that evaluates other weights than it steps, such as a Schedule-Free one. The
            message names it.
        RuntimeError: from `step`, a sparse gradient for "spd". Also a parameter that the wrapped optimizer replaced or
            gave another form: it must write in place.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        method: str = "spd",
        *,
        norm: str | None = None,
        gate: str = GATES[0],
        strength: float | Tensor = 1.0,
        radius: float | Tensor | None = None,
        anchor: Anchor = "initial",
        backend: str = "auto",
        save_anchors: bool = True,
    ) -> None:
        check_wrappable(optimizer)
        registry.check_backend(backend)
        rule_around(method, norm, gate)
        word = anchor is None or isinstance(anchor, str | PathLike)
        settings = {"method": method, "norm": norm, **gate_key(gate), "strength": strength, "radius": radius}
        super().__setstate__({
            "defaults": {}, "optimizer": optimizer, "backend": backend, "save_anchors": save_anchors,
            "_settings": {**settings, "anchor": anchor if word else "initial"}, "_anchors": {}, **fresh(),
        })  # fmt: skip
        self.defaults = optimizer.defaults
        groups = optimizer.param_groups
        specs = anchors.over_groups(anchor, groups)
        adopted = [self._adopt(g, g.get("anchor", spec)) for g, spec in zip(groups, specs, strict=True)]
        for row, added in enumerate(adopted):
            self._add(row, *added)

    def _patch_step_function(self) -> None:
        """torch's own, which makes the step run its hooks."""
        super()._patch_step_function()
        keep_from_compiler(type(self))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer, and then the pull. Returns what the wrapped step returns.

        `closure` goes to the wrapped optimizer. SPD measures the gradients of its first evaluation.

        A step is whole, or it is known that it is not. If it is broken off after the wrapped optimizer has written
        something, later steps and `state_dict` raise RuntimeError until a checkpoint is loaded.
        """
        self._guard.check()
        scaler = [name for name in SCALER if name in self.__dict__]
        for name in scaler:
            setattr(self.optimizer, name, getattr(self, name))
        params = [param for group in self.param_groups for param in group["params"]]
        versions = list(map(version_of, params))
        whole = False
        try:
            with nullcontext() if closure else uninterrupted():
                if closure is None:
                    self._before()
                loss = self._step_with(closure) if closure else self.optimizer.step()
                self._after()
                whole = True
        except BaseException:
            self._guard.broke_off(not whole and versions != list(map(version_of, params)))
            raise
        finally:
            for name in scaler:
                delattr(self.optimizer, name)
        return loss

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        evaluations = 0

        def measured() -> Any:
            nonlocal evaluations
            loss = closure()
            if not evaluations:
                self._before(told=True)
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
    def reanchor(self) -> None:
        """As of `AnchoredAdamW`: takes the weights as they are now for θ₀, in every group that has anchors."""
        self._anchors.update(self._late.retake(self.param_groups, self._anchors))
        self._plans.clear()

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group to the wrapped optimizer, with our keys: `method`, `norm`, `gate`, `strength`, `radius`
        and `anchor`.

        Raises what the wrapped optimizer raises, and ValueError or TypeError as the constructor does. Nothing is added
        then.
        """
        check_group(param_group)
        group = {**param_group, "params": with_shards(param_group["params"])}
        spec: Anchor = group.pop("anchor", self._settings["anchor"])
        self.optimizer.add_param_group(group)
        added = self.param_groups[-1]
        try:
            own, tensors = self._adopt({**added, "anchor": spec}, spec)
        except BaseException:
            self.param_groups.pop()
            raise
        self._add(len(self.param_groups) - 1, own, tensors)

    def _add(self, row: int, own: Group, tensors: dict[Tensor, Tensor]) -> None:
        """Gives group `row` our settings and its anchors."""
        group = self.param_groups[row]
        group.update(own)
        self._anchors.update(tensors)
        self._late.note(row, group, tensors)

    def _adopt(self, group: Group, spec: Anchor) -> tuple[Group, dict[Tensor, Tensor]]:
        """A group's settings, and its anchors. `spec` is its own anchor, or the one for all groups. Changes nothing."""
        own = {**self._settings, **{key: group[key] for key in SETTINGS if key in group}}
        if "norm" not in group and own["norm"] not in method_of(own["method"]).rules:
            own["norm"] = None  # it was meant for the other groups
        check_settings({**group, **own})
        warn_of_hold(own)
        check_keys(group, SETTINGS, self.optimizer.defaults)
        params, labels = group["params"], [label_of(group, k) for k in range(len(group["params"]))]
        anchored = method_of(own["method"]).anchored
        for param, shard, label in zip(params, shards_of(params), labels, strict=True):
            if shard is not param:
                raise ValueError(
                    f"{label} is an unsharded copy, which FSDP2 keeps after an evaluation and never trains; call "
                    "reshard() of its module before the wrapped optimizer is made"
                )
            if anchored and param.requires_grad and not param.is_floating_point():
                raise ValueError(f"{label} is {param.dtype}; a real floating-point parameter is needed")
        shared = "anchor" not in group
        if shared and not anchored and isinstance(spec, Mapping):
            spec = "initial"  # the mapping is for the other groups
        own["anchor"], tensors = resolved(spec, group, anchored=anchored, waits=self.save_anchors is True)
        return own, tensors
