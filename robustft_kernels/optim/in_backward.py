"""Steps inside the backward pass. Each gradient is used as soon as it is there, and freed."""

import gc
from collections import ChainMap
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.bases import Group
from ..core.files import file_of
from ..step.plan import Plan
from .anchored import AnchoredOptimizer
from .late import AnchorsOfState


class StepInBackward:
    """Steps each parameter of `optimizer` within `loss.backward()`, once its gradient is accumulated.

    It then sets the parameter's `.grad` to None. So only one or a few gradients exist at a time, and the memory of the
    others is saved. Every method decides for a tensor by itself. So the result equals that of `backward()` and then
    `step()`, bit for bit.

    The training loop stays as it is. `optimizer.step()` still runs closures, hooks and what a scheduler counts on. It
    finds nothing left to do, except for gradients that came in another way. This holds until `remove()`, or in a `with`
    block:

        with StepInBackward(optimizer):
            loss.backward()

    Every `backward()` is a step, so gradients cannot be accumulated over several. It does not go with
    torch.amp.GradScaler, whose scale is not known then. It does not go with DistributedDataParallel, which reduces
    gradients later. Parameters that are added or thawed afterwards are stepped in `step()`.

    Raises ValueError if the optimizer has a `max_grad_norm`, which needs all gradients at once, and RuntimeError for
    parameters under DistributedDataParallel. `step()` raises RuntimeError if a GradScaler calls it.
    """

    def __init__(self, optimizer: AnchoredOptimizer) -> None:
        _refuse_replicas(optimizer)
        if optimizer.max_grad_norm is not None:
            raise ValueError("max_grad_norm needs all gradients at once, which a step in backward does not have")
        self._optimizer = optimizer
        self._plans: dict[Tensor, Plan] = {}
        self._places: dict[Tensor, tuple[int, int, int]] = {}
        self._note_places()
        self._handles = [
            param.register_post_accumulate_grad_hook(self._step) for param in self._places if param.requires_grad
        ]
        self._handles.append(optimizer.register_step_pre_hook(_refuse_scaler))

    def remove(self) -> None:
        """Ends it. Gradients are kept again, for `step()`."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "StepInBackward":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _note_places(self) -> None:
        """Notes for each parameter the index of its group, its index in the group, and its index among all
        parameters."""
        self._places.clear()
        for row, group in enumerate(self._optimizer.param_groups):
            for k, param in enumerate(group["params"]):
                self._places[param] = row, k, len(self._places)

    def _place_of(self, param: Tensor) -> tuple[int, int, int] | None:
        """The index of the parameter's group, its index in the group, and its index among all, as they are now.
        `load_state_dict` replaces the groups, and groups may change. None for a parameter that has left."""
        groups = self._optimizer.param_groups
        for _ in range(2):
            row, k, place = self._places.get(param, (len(groups), 0, 0))
            if row < len(groups) and k < len(params := groups[row]["params"]) and params[k] is param:
                return row, k, place
            self._note_places()
        return None

    @torch.no_grad()
    def _step(self, param: Tensor) -> None:
        optimizer = self._optimizer
        if not self._plans:  # the model may have been wrapped meanwhile
            _refuse_replicas(optimizer)
        if (found := self._place_of(param)) is None:
            self._plans.pop(param, None)
            return
        row, k, place = found
        group = optimizer.param_groups[row]
        own = {"params": [param], **({"param_names": [group["param_names"][k]]} if "param_names" in group else {})}
        groups = [cast(Group, ChainMap(own, group))]  # with the hyper-parameters as they will be
        kept = {param: optimizer.state[param]}
        optimizer._guard.check()
        if "anchor" in kept[param] and (file := file_of(kept[param]["anchor"])) is not None:
            file.check()
        plan = self._plans.get(param)
        if plan is None or not plan.holds_for(groups, kept, optimizer._results):
            optimizer._late.settle_one(optimizer.param_groups, row, k, AnchorsOfState(optimizer.state))
            plan = Plan(optimizer.base, groups, kept, optimizer.backend, optimizer._results, optimizer._guard, [place])
            self._plans[param] = plan
        if not plan.has_tables:
            plan.take_over()
        plan.run()
        param.grad = None


def _refuse_replicas(optimizer: Optimizer) -> None:
    """Raises RuntimeError for parameters of a DistributedDataParallel, which reduces gradients after their steps."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    ours = {id(param) for group in optimizer.param_groups for param in group["params"]}
    kind = nn.parallel.DistributedDataParallel
    for wrapper in (of for of in gc.get_objects() if type(of) is kind or issubclass(type(of), kind)):
        if name := next((name for name, param in wrapper.module.named_parameters() if id(param) in ours), ""):
            raise RuntimeError(
                f"parameter {name!r} is under DistributedDataParallel, which reduces its gradient only after "
                "StepInBackward has used it, so that replicas would part; use optimizer.step(), or fully_shard"
            )


def _refuse_scaler(optimizer: Optimizer, *_: object) -> None:
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "a GradScaler steps an optimizer whose parameters were stepped in the backward pass, with gradients that "
            "were still scaled; use bfloat16 autocast, which needs no scaler, or remove StepInBackward"
        )
