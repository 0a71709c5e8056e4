"""Steps inside the backward pass: each gradient is used as soon as it is there, and freed."""

from collections import ChainMap
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.bases import Group
from ..step.plan import Plan
from .anchored import AnchoredOptimizer


class StepInBackward:
    """Steps each parameter of `optimizer` within `loss.backward()`, once its gradient is accumulated, and sets its
    `.grad` to None: of all gradients one or a few exist at a time, and their memory is saved.

    Every method decides for a tensor by itself, so that the result is that of `backward()` and then `step()`, bit for
    bit. The training loop stays as it is: `optimizer.step()` finds nothing left to do, except for gradients that came
    in another way, and runs closures, hooks and what a scheduler counts on. Until `remove()`, or as a context manager:

        with StepInBackward(optimizer):
            loss.backward()

    Every `backward()` is a step, so gradients cannot be accumulated over several. Not with torch.amp.GradScaler, whose
    scale is not to be had then, nor under DistributedDataParallel, which reduces gradients later. Parameters added, or
    thawed, afterwards are stepped in `step()`.

    Raises ValueError where the optimizer has a `max_grad_norm`, which asks for all gradients at once. `step()` raises
    RuntimeError where a GradScaler calls it.
    """

    def __init__(self, optimizer: AnchoredOptimizer) -> None:
        if optimizer.max_grad_norm is not None:
            raise ValueError("max_grad_norm needs all gradients at once, which a step in backward does not have")
        self._optimizer = optimizer
        self._plans: dict[Tensor, Plan] = {}
        self._places: dict[Tensor, tuple[Group, int, int]] = {}  # its group, its place there and among all
        for group in optimizer.param_groups:
            for k, param in enumerate(group["params"]):
                self._places[param] = group, k, len(self._places)
        self._handles = [
            param.register_post_accumulate_grad_hook(self._step) for param in self._places if param.requires_grad
        ]
        self._handles.append(optimizer.register_step_pre_hook(_refuse_scaler))

    def remove(self) -> None:
        """Ends it; gradients are kept again, for `step()`."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "StepInBackward":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @torch.no_grad()
    def _step(self, param: Tensor) -> None:
        optimizer = self._optimizer
        group, k, place = self._places[param]
        own = {"params": [param], **({"param_names": [group["param_names"][k]]} if "param_names" in group else {})}
        groups = [cast(Group, ChainMap(own, group))]  # with the hyper-parameters as they will be
        kept = {param: optimizer.state[param]}
        plan = self._plans.get(param)
        if plan is None or not plan.holds_for(groups, kept):
            results = {p: of for p, of in optimizer._results.items() if p is param}
            plan = Plan(optimizer.base, groups, kept, optimizer.backend, results, [place])
            self._plans[param] = plan
        optimizer._results[param] = plan.results[param]
        plan.run()
        param.grad = None


def _refuse_scaler(optimizer: Optimizer, *_: object) -> None:
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "a GradScaler steps an optimizer whose parameters were stepped in the backward pass, with gradients that "
            "were still scaled; use bfloat16 autocast, which needs no scaler, or remove StepInBackward"
        )
